"""Is the router worth having? Its choices on LaRA's stored predictions, beside simple rules.

No model runs: eleven language models have answered every question both ways, and a rule scores
both (`eval/lara.py`). The router sees what it would see before answering, and nothing else: the
question, the document's length and the lexical scores of its passages. It is fitted on dev.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eval.bench.bm25_floor import word_windows
from eval.fit_router import LabelledPair, fit_router
from eval.lara import LaraDocument, PairedPrediction
from eval.statistics import Interval, cluster_bootstrap
from rag.errors import TooFewPairsError
from rag.retrieval.lexical_score import (
    Candidate,
    lexical_scores,
    question_words,
    stems_in,
    words_in,
)
from rag.routing.question_class import classify_question
from rag.routing.utility import (
    NUM_HITS,
    RouteFeatures,
    RouterWeights,
    estimate_routes,
    places_of,
)
from rag.types import QuestionClass, Route

# Those of LaRA: five chunks of 600 tokens, and models that declare 128k.
RETRIEVED_TOKENS = 3_000
CONTEXT_TOKENS = 131_072
THRIFTS = (0.0, 0.0002, 0.0005, 0.001, 0.002, 0.005)

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """One way to choose: its score, the prompt tokens it costs, how often it reads everything.

    `behind_router` is the router's score less this one's, paired, with its interval.
    """

    policy: str
    score: Interval
    cost_tokens: float
    share_full: float
    behind_router: Interval


@dataclass(frozen=True, slots=True)
class SliceRow:
    """The router and the better single route on one part of the questions.

    Which route is the better one is known only afterwards, so the comparison favours it.
    """

    slice: str
    num_questions: int
    full: float
    retrieval: float
    router: float
    router_less_better: Interval


@dataclass(frozen=True, slots=True)
class FrontierRow:
    """Score and cost of the router at one thrift."""

    thrift: float
    score: float
    cost_tokens: float
    share_full: float


@dataclass(frozen=True, slots=True)
class RouterBench:
    """What `fathom bench router` shows."""

    split: str
    num_questions: int
    num_models: int
    num_documents: int
    policies: tuple[PolicyRow, ...]
    slices: tuple[SliceRow, ...]
    frontier: tuple[FrontierRow, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the object that `fathom bench router` prints last."""
        return {"bench": "router", **asdict(self)}


def label_pairs(
    documents: Sequence[LaraDocument],
    predictions: Sequence[PairedPrediction],
    *,
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[LabelledPair]:
    """Return each prediction with what the router would have known of its question."""
    asked: dict[str, dict[str, str]] = {}
    for prediction in predictions:
        asked.setdefault(prediction.document_id, {})[prediction.question_id] = prediction.question
    features: dict[str, RouteFeatures] = {}
    for number, document in enumerate(documents, start=1):
        features |= _features(document, asked.get(document.id, {}))
        on_progress("reading", number, len(documents))
    return [
        LabelledPair(
            model=prediction.model,
            document=prediction.document_id,
            features=features[prediction.question_id],
            full=prediction.full,
            retrieval=prediction.retrieval,
        )
        for prediction in predictions
    ]


@dataclass(frozen=True, slots=True)
class Round:
    """What is learned from, what is reported on, and weights fitted on nothing of the latter."""

    fit: Sequence[LabelledPair]
    report: Sequence[LabelledPair]
    shared: RouterWeights


def cross_validation(pairs: Sequence[LabelledPair], *, num_folds: int = 5) -> list[Round]:
    """Return rounds that report each document once, fitted on the others: to tune on dev."""
    documents = sorted({pair.document for pair in pairs})
    rounds = []
    for fold in range(num_folds):
        held_out = set(documents[fold::num_folds])
        fit = [pair for pair in pairs if pair.document not in held_out]
        report = [pair for pair in pairs if pair.document in held_out]
        rounds.append(Round(fit, report, fit_router(fit, fitted_on=f"all but fold {fold}")))
    return rounds


def bench_router(rounds: Sequence[Round], *, split: str) -> RouterBench:
    """Compare the ways to choose on all that the rounds report on.

    Args:
        rounds: one for the test split, several for a cross-validation.
        split: what the pairs are called.
    """
    test = [pair for part in rounds for pair in part.report]
    full = np.array([pair.full for pair in test])
    retrieval = np.array([pair.retrieval for pair in test])
    clusters = [pair.document for pair in test]
    lengths = np.array([pair.features.document_tokens for pair in test], dtype=np.float64)

    refitted = [_refitted(part) for part in rounds]
    as_shipped = [
        dict.fromkeys(own, part.shared) for own, part in zip(refitted, rounds, strict=True)
    ]

    def reads_all(weights: Sequence[Mapping[str, RouterWeights]], thrift: float) -> BoolArray:
        pairs = zip(rounds, weights, strict=True)
        return np.concatenate([_reads_all(part.report, own, thrift) for part, own in pairs])

    chosen = reads_all(refitted, 0.0)
    router = np.where(chosen, full, retrieval)
    mix = float(chosen.mean())
    everywhere = np.ones(len(test), dtype=bool)
    by_size = np.concatenate([_by_size(part) for part in rounds])
    shipped = reads_all(as_shipped, 0.0)
    policies: list[tuple[str, FloatArray, float | BoolArray]] = [
        ("always retrieval", retrieval, ~everywhere),
        ("always full", full, everywhere),
        ("by size", np.where(by_size, full, retrieval), by_size),
        ("random, same mix", mix * full + (1 - mix) * retrieval, mix),
        ("router, as shipped", np.where(shipped, full, retrieval), shipped),
        ("router, refitted", router, chosen),
        ("oracle", np.maximum(full, retrieval), full > retrieval),
    ]
    return RouterBench(
        split=split,
        num_questions=len({(pair.document, pair.features.question) for pair in test}),
        num_models=len({pair.model for pair in test}),
        num_documents=len(set(clusters)),
        policies=tuple(
            PolicyRow(
                policy=name,
                score=cluster_bootstrap(scores, clusters),
                cost_tokens=_mean_cost(lengths, picks),
                share_full=float(np.mean(picks)),
                behind_router=cluster_bootstrap(router - scores, clusters),
            )
            for name, scores, picks in policies
        ),
        slices=tuple(_slices(test, full, retrieval, router)),
        frontier=tuple(
            FrontierRow(
                thrift=thrift,
                score=float(np.where(picks, full, retrieval).mean()),
                cost_tokens=_mean_cost(lengths, picks),
                share_full=float(picks.mean()),
            )
            for thrift in THRIFTS
            for picks in [reads_all(refitted, thrift)]
        ),
    )


def card(bench: RouterBench) -> str:
    """Return the figures for people; `*` marks a difference whose interval excludes zero."""
    lines = [
        f"LaRA, {bench.split}: {bench.num_questions} questions on {bench.num_documents} documents,"
        f" answered both ways by {bench.num_models} models; intervals by document, 95%",
        f"{'':<20} {'score':>6} {'interval':>15} {'tokens':>8} {'full':>5}  router less this",
    ]
    for row in bench.policies:
        lines.append(
            f"{row.policy:<20} {row.score.mean:>6.3f} {_interval(row.score):>15}"
            f" {row.cost_tokens:>8,.0f} {row.share_full:>5.0%}"
            f"  {row.behind_router.mean:+.4f} {_interval(row.behind_router)}"
            f"{'*' if row.behind_router.excludes_zero else ''}"
        )
    lines += [
        "",
        f"{'slice':<22} {'questions':>9} {'full':>6} {'retr.':>6} {'router':>6}  less the better",
    ]
    for part in bench.slices:
        lines.append(
            f"{part.slice:<22} {part.num_questions:>9,} {part.full:>6.3f} {part.retrieval:>6.3f}"
            f" {part.router:>6.3f}  {part.router_less_better.mean:+.4f}"
            f" {_interval(part.router_less_better)}"
        )
    lines += ["", f"{'thrift':>8} {'score':>6} {'tokens':>8} {'full':>5}"]
    lines += [
        f"{row.thrift:>8} {row.score:>6.3f} {row.cost_tokens:>8,.0f} {row.share_full:>5.0%}"
        for row in bench.frontier
    ]
    return "\n".join(lines)


def _features(document: LaraDocument, questions: Mapping[str, str]) -> dict[str, RouteFeatures]:
    windows = word_windows(document.text)
    texts = [document.text[start:end] for start, end in windows]
    candidates = [Candidate(words_in(text), "", "") for text in texts]
    held = [stems_in(text) for text in texts]
    found = {}
    for name, question in questions.items():
        words = question_words(question)
        frequencies = {
            word: sum(stem in stems for stems in held) for word in words for stem in stems_in(word)
        }
        shares = lexical_scores(
            words, candidates, frequencies=frequencies, num_chunks=len(candidates)
        )
        best = sorted(range(len(shares)), key=lambda place: -shares[place])[:NUM_HITS]
        found[name] = RouteFeatures(
            question=question,
            document_tokens=document.num_tokens,
            effective_tokens=CONTEXT_TOKENS,
            shares=tuple(shares[place] for place in best),
            places=places_of(best, len(windows)),
            question_class=classify_question(question).question_class,
        )
    return found


def _refitted(part: Round) -> dict[str, RouterWeights]:
    """Return each language model's own weights; those of all where its pairs are too few."""
    weights = {}
    for model in {pair.model for pair in part.report}:
        own = [pair for pair in part.fit if pair.model == model]
        try:
            weights[model] = fit_router(own, fitted_on=model, prior=part.shared)
        except TooFewPairsError:
            weights[model] = part.shared
    return weights


def _reads_all(
    pairs: Sequence[LabelledPair], weights: Mapping[str, RouterWeights], thrift: float
) -> BoolArray:
    """Return for each pair whether the router reads everything."""
    chosen = []
    for pair in pairs:
        cost = {
            Route.FULL: pair.features.document_tokens,
            Route.RETRIEVAL: RETRIEVED_TOKENS,
        }
        best = estimate_routes(pair.features, weights[pair.model], cost, thrift=thrift)[0]
        chosen.append(best.route is Route.FULL)
    return np.array(chosen)


def _by_size(part: Round) -> BoolArray:
    """Return whether a document is below the length that did best for its model where it fits."""
    longest: dict[str, int] = {}
    for model in {pair.model for pair in part.report}:
        own = [pair for pair in part.fit if pair.model == model]
        longest[model] = max(
            [0, *sorted({pair.features.document_tokens for pair in own})],
            key=lambda limit, own=own: sum(  # type: ignore[misc]
                pair.full - pair.retrieval for pair in own if pair.features.document_tokens <= limit
            ),
        )
    return np.array([pair.features.document_tokens <= longest[pair.model] for pair in part.report])


def _slices(
    test: Sequence[LabelledPair], full: FloatArray, retrieval: FloatArray, router: FloatArray
) -> list[SliceRow]:
    lengths = np.array([pair.features.document_tokens for pair in test])
    classes = np.array([pair.features.question_class for pair in test])
    parts = {f"class {kind}": classes == kind for kind in QuestionClass} | {
        "shorter documents": lengths <= np.median(lengths),
        "longer documents": lengths > np.median(lengths),
    }
    rows = []
    for words, among in parts.items():
        if not among.any():
            continue
        single = full if full[among].mean() > retrieval[among].mean() else retrieval
        clusters = [pair.document for pair, here in zip(test, among, strict=True) if here]
        rows.append(
            SliceRow(
                slice=words,
                num_questions=int(among.sum()),
                full=float(full[among].mean()),
                retrieval=float(retrieval[among].mean()),
                router=float(router[among].mean()),
                router_less_better=cluster_bootstrap((router - single)[among], clusters),
            )
        )
    return rows


def _mean_cost(lengths: FloatArray, reads_all: float | BoolArray) -> float:
    return float(np.mean(reads_all * lengths + (1 - np.asarray(reads_all)) * RETRIEVED_TOKENS))


def _interval(interval: Interval) -> str:
    return f"[{interval.low:.3f}, {interval.high:.3f}]"
