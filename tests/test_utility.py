"""The router's two models: what they say, what they learn, what they refuse; LaRA's answers."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.bench.router import Round, bench_router, card, cross_validation, label_pairs
from eval.fit_router import FEWEST_PAIRS, LabelledPair, fit_router, load_pairs
from eval.lara import load_lara, numbers, score_prediction
from rag.errors import ReadError, SettingsError, TooFewPairsError
from rag.routing.utility import (
    RightModel,
    RouteFeatures,
    RouterWeights,
    estimate_routes,
    load_weights,
    save_weights,
)
from rag.types import QuestionClass, Route

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not (DATA / "lara").exists(), reason="no evaluation data here")

FEATURES = RouteFeatures(
    question="What is the fee in section 12?",
    document_tokens=30_000,
    effective_tokens=8_000,
    shares=(0.9, 0.5, 0.4),
    places=(0.1, 0.5, 0.9),
    question_class=QuestionClass.LOOKUP,
)


def test_features_of_nothing_found_are_numbers() -> None:
    empty = replace(FEATURES, question="", document_tokens=0, shares=(), places=())
    assert all(math.isfinite(value) for value in empty.values().values())
    assert FEATURES.values()["log2_length_over_effective"] == pytest.approx(math.log2(30 / 8))
    assert FEATURES.values()["has_digit"] == FEATURES.values()["asks_what"] == 1.0


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8, unique=True), st.floats(0, 1))
def test_a_calibrated_probability_stays_between_its_points_and_rises(
    points: list[float], at: float
) -> None:
    curve = tuple(zip(sorted(points), sorted(points), strict=True))
    logit = math.log(max(at, 1e-9) / max(1 - at, 1e-9))
    model = RightModel(logit, {}, curve)
    low, high = curve[0][1], curve[-1][1]
    assert low <= model.probability({}) <= high
    assert model.probability({}) <= RightModel(logit + 1, {}, curve).probability({})


def test_thrift_trades_probability_for_tokens() -> None:
    weights = RouterWeights(RightModel(2.0, {}), RightModel(1.0, {}), "by hand")
    cost = {Route.FULL: 30_000, Route.RETRIEVAL: 1_500}
    lavish = estimate_routes(FEATURES, weights, cost, thrift=0.0)
    thrifty = estimate_routes(FEATURES, weights, cost, thrift=0.01)
    assert [e.route for e in lavish] == [Route.FULL, Route.RETRIEVAL]
    assert [e.route for e in thrifty] == [Route.RETRIEVAL, Route.FULL]
    assert lavish[0].utility == lavish[0].probability
    assert thrifty[1].utility == pytest.approx(thrifty[1].probability - 0.3)
    # a document whose cache is kept costs its question alone
    kept = estimate_routes(FEATURES, weights, cost | {Route.FULL: 40}, thrift=0.01)
    assert kept[0].route is Route.FULL


def _pairs(count: int, *, num_documents: int = 20) -> list[LabelledPair]:
    """Full is right where the document is short, retrieval where the words are found."""
    generator = np.random.default_rng(3)
    pairs = []
    for number in range(count):
        tokens, share = int(2 ** generator.uniform(9, 17)), float(generator.uniform(0, 1))
        features = replace(FEATURES, document_tokens=tokens, shares=(share,), places=(0.5,))
        pairs.append(
            LabelledPair(
                model="m",
                document=f"d{number % num_documents}",
                features=features,
                full=float(tokens < 8_000),
                retrieval=float(share > 0.5),
            )
        )
    return pairs


def test_what_separates_the_routes_is_learned() -> None:
    weights = fit_router(_pairs(400), fitted_on="made up")
    short = replace(FEATURES, document_tokens=1_000, shares=(0.1,), places=(0.5,))
    long = replace(FEATURES, document_tokens=100_000, shares=(0.9,), places=(0.5,))
    cost = {Route.FULL: 0, Route.RETRIEVAL: 0}
    assert estimate_routes(short, weights, cost, thrift=0)[0].route is Route.FULL
    assert estimate_routes(long, weights, cost, thrift=0)[0].route is Route.RETRIEVAL
    assert weights.full.probability(short.values()) > 0.9
    assert weights.full.probability(long.values()) < 0.1


def test_few_pairs_stay_near_the_prior() -> None:
    prior = fit_router(_pairs(400), fitted_on="made up")
    fewest = [replace(pair, full=0.5, retrieval=0.5) for pair in _pairs(FEWEST_PAIRS)]
    name = "log2_length_over_effective"
    drawn = fit_router(fewest, fitted_on="few", prior=prior).full.weights[name]
    alone = fit_router(fewest, fitted_on="few").full.weights.get(name, 0.0)
    assert prior.full.weights[name] < drawn < alone <= 0.01


def test_below_200_pairs_nothing_is_fitted() -> None:
    with pytest.raises(TooFewPairsError, match="199 labelled pairs on 20 documents"):
        fit_router(_pairs(199), fitted_on="few")
    with pytest.raises(TooFewPairsError, match="on 2 documents"):
        fit_router(_pairs(300, num_documents=2), fitted_on="few")


def test_weights_survive_a_file_and_the_shipped_ones_load(tmp_path: Path) -> None:
    shipped = load_weights()
    assert "LaRA dev" in shipped.fitted_on
    save_weights(shipped, tmp_path / "router.json")
    assert load_weights(tmp_path / "router.json") == shipped
    (tmp_path / "router.json").write_text('{"full": 3}')
    with pytest.raises(SettingsError, match="holds no router weights"):
        load_weights(tmp_path / "router.json")


def test_a_line_that_is_no_pair_is_named(tmp_path: Path) -> None:
    good = {
        "model": "m",
        "document": "d",
        "question": "Who?",
        "document_tokens": 10,
        "effective_tokens": 10,
        "shares": [0.5],
        "places": [0.0],
        "question_class": "lookup",
        "full": 1,
        "retrieval": 0,
    }
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(good) + "\n\n" + json.dumps(good | {"full": 2}) + "\n")
    with pytest.raises(ReadError, match=r"line 3: .*0 to 1"):
        load_pairs(file)
    file.write_text(json.dumps(good) + "\n")
    (pair,) = load_pairs(file)
    assert (pair.full, pair.retrieval, pair.features.shares) == (1.0, 0.0, (0.5,))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$13,547,000 in 2023", [13_547_000]),
        ("8.8 million and (1,234)", [8_800_000, 1_234]),
        ("12% of 3.5 billion", [12, 3.5e9]),
        ("in section A12, x86", []),
    ],
)
def test_numbers_are_read_with_their_scale(text: str, expected: list[float]) -> None:
    assert numbers(text) == pytest.approx(expected)


def test_predictions_are_scored_by_what_they_say() -> None:
    def score(prediction: str, reference: str) -> float:
        return score_prediction(prediction, reference, answerable=True)

    assert score("It sold about $8.8 million.", "Sales were $8,829,000.") == 1.0
    assert score("It sold $8.2 million.", "Sales were $8,829,000.") == 0.0
    assert score("From 5 to 7.", "It rose from 5 to 9.") == 0.5
    assert score("The clerk comes early.", "He must come in early, the clerk.") > 0.3
    assert score("Everything I know.", "") == 0.0
    for refusal in (
        "The document does not mention a merger.",
        "There is no information on that.",
        "This isn't specified in the text.",
    ):
        assert score_prediction(refusal, "not there", answerable=False) == 1.0
    assert score_prediction("The merger costs $3m.", "not there", answerable=False) == 0.0


@needs_data
def test_the_bench_on_a_part_of_lara() -> None:
    documents, predictions = load_lara(DATA)
    some = [d for d in documents if d.split == "dev" and d.num_tokens < 40_000][:10]
    names = {document.id for document in some}
    pairs = label_pairs(some, [p for p in predictions if p.document_id in names])
    assert len(pairs) > 5 * FEWEST_PAIRS
    rounds = cross_validation(pairs, num_folds=4)
    assert all(
        not {p.document for p in part.fit} & {p.document for p in part.report} for part in rounds
    )
    bench = bench_router(rounds, split="dev")
    rows = {row.policy: row for row in bench.policies}
    assert rows["oracle"].score.mean >= max(row.score.mean for row in bench.policies)
    assert rows["always retrieval"].cost_tokens < rows["router, refitted"].cost_tokens
    assert rows["always retrieval"].share_full == 0.0
    costs = [row.cost_tokens for row in bench.frontier]
    assert costs == sorted(costs, reverse=True)
    assert "router, refitted" in card(bench)
    assert isinstance(rounds[0], Round)
