"""Intervals and tests against published counts, numbers worked by hand, and LaRA's predictions."""

import gzip
import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from conftest import SHARED_DATA
from eval.evidence_sets import load_example_set
from eval.metrics import number_match
from eval.statistics import (
    Interval,
    clopper_pearson,
    cluster_bootstrap,
    cluster_bootstrap_of,
    clustered_difference,
    clustered_mean,
    design_effect,
    detectable_difference,
    holm,
    intraclass_correlation,
    is_equivalent,
    mcnemar,
    questions_needed,
    rate,
    wilson,
)

needs_lara = pytest.mark.skipif(
    not (SHARED_DATA / "lara").exists(), reason="no evaluation data here"
)


@pytest.mark.parametrize(
    ("correct", "low", "high"),
    [(75, 0.421, 0.579), (37, 0.185, 0.321), (118, 0.714, 0.845), (128, 0.788, 0.901)],
)
def test_wilson_of_financebench(correct: int, low: float, high: float) -> None:
    """GPT-4-1106 on 150 questions: retrieval, full with the question first, then last, oracle."""
    found = wilson(correct, 150)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-4)
    assert found.mean == correct / 150


@pytest.mark.parametrize(
    ("only_first", "only_second", "p_value"), [(52, 14, 2.8e-6), (8, 51, 9e-9), (2, 83, 2e-22)]
)
def test_mcnemar_of_financebench(only_first: int, only_second: int, p_value: float) -> None:
    """The order of the prompt decides who wins: retrieval against full, question first and last."""
    found = mcnemar(only_first, only_second)
    assert found.p_value == pytest.approx(p_value, rel=0.06)
    assert found.mid_p < found.p_value
    assert mcnemar(only_second, only_first).p_value == pytest.approx(found.p_value)


def test_mcnemar_by_hand() -> None:
    assert mcnemar(0, 6).p_value == pytest.approx(2 / 64)
    assert mcnemar(0, 6).mid_p == pytest.approx(1 / 64)
    assert mcnemar(1, 5).p_value == pytest.approx(2 * 7 / 64)
    assert (mcnemar(0, 0).p_value, mcnemar(4, 4).p_value) == (1.0, 1.0)
    assert mcnemar(2, 2).mid_p == pytest.approx(1 - 6 / 16 / 2)


def test_clopper_pearson_by_hand() -> None:
    assert clopper_pearson(0, 10).high == pytest.approx(1 - 0.025**0.1)
    assert clopper_pearson(10, 10).low == pytest.approx(0.025**0.1)
    for correct in range(11):
        exact, score = clopper_pearson(correct, 10), wilson(correct, 10)
        assert exact.half_width > score.half_width
    assert rate(5, 49) == clopper_pearson(5, 49)
    assert rate(5, 50) == wilson(5, 50)
    assert (rate(0, 0).low, rate(0, 0).high) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("difference", "discordance", "questions"),
    [(0.05, 0.13, 406), (0.08, 0.13, 158), (0.03, 0.13, 1132), (0.05, 0.4, 1254), (0.1, 0.4, 312)],
)
def test_questions_needed(difference: float, discordance: float, questions: int) -> None:
    assert questions_needed(difference, discordance) == questions
    assert detectable_difference(questions, discordance) == pytest.approx(difference, abs=5e-4)


def test_135_questions_detect_eight_to_ten_points() -> None:
    """At 10 to 17% discordance: what may look equal there has not been shown to be."""
    assert detectable_difference(135, 0.10) == pytest.approx(0.076, abs=1e-3)
    assert detectable_difference(135, 0.17) == pytest.approx(0.099, abs=1e-3)
    assert detectable_difference(5, 0.1) == 1.0  # not even all discordant pairs one way
    with pytest.raises(ValueError, match="no difference"):
        questions_needed(0.2, 0.1)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_likeness_by_hand() -> None:
    assert intraclass_correlation([1, 1, 0, 0], list("aabb")) == pytest.approx(1.0)
    assert intraclass_correlation([1, 0, 1, 0], list("aabb")) == pytest.approx(-1.0)
    assert design_effect([1, 1, 0, 0], list("aabb")) == pytest.approx(2.0)
    assert design_effect([1, 0, 1, 0], list("aabb")) == 1.0
    assert math.isnan(intraclass_correlation([1, 0], list("aa")))
    assert math.isnan(intraclass_correlation([1, 0], list("ab")))
    assert design_effect([1, 0], list("ab")) == 1.0


def test_a_bootstrap_by_document_is_wider_where_its_questions_are_alike() -> None:
    values = np.repeat([1.0, 0.0, 1.0, 0.0, 1.0, 1.0], 30)
    documents = [str(n // 30) for n in range(len(values))]
    by_document = cluster_bootstrap(values, documents)
    by_question = cluster_bootstrap(values, [str(n) for n in range(len(values))])
    assert by_document.half_width > 3 * by_question.half_width
    assert clustered_mean(values, documents) == by_document
    # One document: there is nothing to draw, so the questions' own interval stands.
    alone = clustered_mean(values, ["one"] * len(values))
    assert alone == rate(120, 180)
    shifted = clustered_mean(values - 0.5, ["one"] * len(values))
    expected = (by_question.low - 0.5, by_question.high - 0.5)
    assert (shifted.low, shifted.high) == pytest.approx(expected)
    assert clustered_mean([1.0] * 5, list("aabbc")).low == pytest.approx(0.025**0.2)
    assert cluster_bootstrap(values, documents) == by_document  # seeded


def test_the_bootstrap_of_any_statistic_agrees_with_that_of_the_mean() -> None:
    values = np.random.default_rng(0).random(200)
    documents = [str(n // 10) for n in range(200)]
    found = cluster_bootstrap_of(lambda rows: float(values[rows].mean()), documents, samples=2000)
    expected = cluster_bootstrap(values, documents)
    assert found.mean == pytest.approx(expected.mean)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.01)


def test_equivalence_needs_evidence() -> None:
    random = np.random.default_rng(3)
    few, many = random.choice([-1, 0, 1], 40, p=[0.05, 0.9, 0.05]), np.zeros(400)
    many[::40], many[20::40] = 1, -1
    name: Callable[[int], str] = lambda n: str(n // 10)  # noqa: E731
    assert not is_equivalent(few, [name(n) for n in range(40)], margin=0.05)
    assert is_equivalent(many, [name(n) for n in range(400)], margin=0.05)
    assert not is_equivalent(many + 0.05, [name(n) for n in range(400)], margin=0.05)
    assert not is_equivalent(many, ["one"] * 400, margin=0.05)


def test_few_pairs_without_a_difference_prove_nothing() -> None:
    """Agresti and Min by hand: of 6 pairs, all alike, (1/2 + 1/2)^(1/2) / 8 = 1/8."""
    few = clustered_difference([0.0] * 6, list("aabbcc"))
    assert (few.low, few.high) == pytest.approx((-1.96 / 8, 1.96 / 8), abs=1e-4)
    assert not is_equivalent([0.0] * 6, list("aabbcc"), margin=0.05)
    assert is_equivalent([0.0] * 200, list("ab") * 100, margin=0.05)
    three = clustered_difference([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], list("abcdef"))
    reach = 1.96 * math.sqrt(4 - 9 / 8) / 8
    assert three.mean == 0.5
    assert three.low == pytest.approx(3 / 8 - reach, abs=1e-4)
    assert not three.excludes_zero
    graded = clustered_difference([0.25, 0.5] * 20, [str(n // 4) for n in range(40)])
    assert graded.low > 0.25
    empty = clustered_difference([], [])
    assert math.isnan(empty.mean)


def test_zero_in_the_interval() -> None:
    assert not Interval(0.1, -0.01, 0.2).excludes_zero
    assert not Interval(0.1, 0.0, 0.2).excludes_zero
    assert Interval(0.1, 0.01, 0.2).excludes_zero
    assert Interval(-0.1, -0.2, -0.01).excludes_zero


# ---- LaRA: what eleven models answered, whole and retrieved -------------------------------------


@dataclass(frozen=True)
class Answered:
    """Whether one model's two answers name the number asked for; `part` of the filing holds it."""

    document: str
    part: int
    full: bool
    retrieval: bool


def number_questions(length: str) -> dict[str, list[Answered]]:
    """Return, of each model, the questions that ask for a number of a filing of this length."""
    examples = {
        example.id: example
        for split in ("dev", "test")
        for example in load_example_set(SHARED_DATA / "lara", split).examples
        if example.metric == "number" and example.id.startswith(f"lara-{length}-financial-location")
    }
    with gzip.open(SHARED_DATA / "lara" / "questions.jsonl.gz", "rt") as lines:
        part_of = {row["qid"]: row["context_order"] for row in map(json.loads, lines)}
    found: dict[str, list[Answered]] = {}
    with gzip.open(SHARED_DATA / "lara" / "predictions_rag_vs_full.jsonl.gz", "rt") as lines:
        for line in map(json.loads, lines):
            example = examples.get(line["qid"])
            if example is None:
                continue
            for model, arms in line["predictions"].items():
                if {"full", "rag"} <= arms.keys():
                    full, retrieval = (
                        number_match(str(arms[arm]), example.answers) for arm in ("full", "rag")
                    )
                    row = Answered(example.document, part_of[example.id], full, retrieval)
                    found.setdefault(model, []).append(row)
    return found


@needs_lara
def test_at_usual_sizes_one_model_alone_differs() -> None:
    """Fact 3: of eleven models, only Mistral-Nemo's arms can be told apart on this slice."""
    tests = {}
    for model, rows in number_questions("32k").items():
        pairs = [(row.full, row.retrieval) for row in rows]
        tests[model] = mcnemar(pairs.count((True, False)), pairs.count((False, True)))
        discordance = (tests[model].only_first + tests[model].only_second) / len(rows)
        assert detectable_difference(len(rows), discordance) > 0.07  # what 106 questions can show
    adjusted = dict(zip(tests, holm([test.p_value for test in tests.values()]), strict=True))
    assert len(adjusted) == 11
    assert [model for model, p_value in adjusted.items() if p_value < 0.05] == ["mistral-nemo"]
    assert tests["mistral-nemo"].only_second > 3 * tests["mistral-nemo"].only_first


@needs_lara
def test_late_questions_are_harder_in_both_arms() -> None:
    """Fact 7: filings of 128k by fifth: the retrieved prompt knows no depth, yet falls too.

    So a heatmap over depth must show the difference of two arms, or move the evidence.
    """
    rows = [row for rows in number_questions("128k").values() for row in rows]
    by_fifth = [[row for row in rows if row.part // 2 == fifth] for fifth in range(5)]
    full = [float(np.mean([row.full for row in part])) for part in by_fifth]
    retrieval = [float(np.mean([row.retrieval for row in part])) for part in by_fifth]
    assert full == pytest.approx([0.76, 0.81, 0.78, 0.57, 0.47], abs=0.15)  # of the whole set
    assert full[3] < full[1]
    assert retrieval[3] < retrieval[1]


@needs_lara
def test_questions_of_a_document_are_alike_their_differences_are_not() -> None:
    """Fact 10: 0.11 in full, 0.08 retrieved; of the paired difference about none. Pair first."""
    ways: tuple[Callable[[Answered], float], ...] = (
        lambda row: float(row.full),
        lambda row: float(row.retrieval),
        lambda row: float(row.full) - float(row.retrieval),
    )
    full, retrieval, difference = (
        np.mean(
            [
                intraclass_correlation([value(row) for row in rows], [row.document for row in rows])
                for rows in number_questions("32k").values()
            ]
        )
        for value in ways
    )
    assert full == pytest.approx(0.11, abs=0.04)
    assert retrieval == pytest.approx(0.08, abs=0.04)
    assert difference == pytest.approx(0.0, abs=0.05)
