"""Policies between reading everything and retrieving, judged from what both arms answered.

They need no run of their own: an oracle, a simple rule, and the router's two models over thrift.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from eval.arms import Arm
from eval.examples import EvalExample
from eval.journal import Journal, Row
from eval.scoring import Scored
from rag.lm.catalog import load_catalog
from rag.lm.engine import model_named
from rag.routing.question_class import classify_question
from rag.routing.utility import (
    NUM_HITS,
    RouteFeatures,
    RouterWeights,
    estimate_routes,
    places_of,
)
from rag.types import Route

ORACLE_ROUTER = "oracle router"
SELF_ROUTE = "self-route"
DERIVED: Mapping[str, str] = {
    ORACLE_ROUTER: "the better of hybrid and full, known afterwards: a ceiling, lucky as it is",
    SELF_ROUTE: "hybrid, and the whole document where that declines: both are paid for",
}
_THRIFTS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

Scores = dict[str, dict[str, Scored]]  # arm, example id


@dataclass(frozen=True, slots=True)
class Point:
    """A way to answer by what it costs: prompt tokens computed a question, and all of them."""

    name: str
    computed_tokens: float
    prompt_tokens: float
    score: float


def derived_policies(scored: Scores) -> Scores:
    """Return the policies that need no run of their own, on questions that both arms answered."""
    hybrid, full = scored.get(Arm.HYBRID, {}), scored.get(Arm.FULL, {})
    both = [name for name in hybrid if name in full]
    oracle = {
        name: max(hybrid[name], full[name], key=lambda s: (s.score, -s.computed_tokens))
        for name in both
    }
    routed = {
        name: _after(hybrid[name], full[name]) if hybrid[name].abstained else hybrid[name]
        for name in both
    }
    return {ORACLE_ROUTER: oracle, SELF_ROUTE: routed} if both else {}


def _after(first: Scored, second: Scored) -> Scored:
    """Return the second answer at the cost of both."""
    return replace(
        second,
        prompt_tokens=first.prompt_tokens + second.prompt_tokens,
        computed_tokens=first.computed_tokens + second.computed_tokens,
        new_tokens=first.new_tokens + second.new_tokens,
        seconds=first.seconds + second.seconds,
    )


def thrift_curve(
    by_id: Mapping[str, EvalExample],
    rows: Sequence[Row],
    scored: Scores,
    journal: Journal,
    weights: RouterWeights,
) -> tuple[Point, ...]:
    """Return what the router's two models would choose between hybrid and full, over thrift.

    They see what a router sees: the question, the lengths, and the ranking of hybrid.
    """
    hybrid, full = scored.get(Arm.HYBRID, {}), scored.get(Arm.FULL, {})
    both = [name for name in hybrid if name in full]
    ranked = {row.example_id: row for row in rows if row.arm == Arm.HYBRID}
    if not both:
        return ()
    run = journal.runs[0] if journal.runs else None
    listed = load_catalog().get(model_named(run.model)) if run else None
    effective = run and (run.effective_tokens or (listed and listed.effective_tokens))
    effective = effective or (run and run.context_tokens)
    points = []
    for thrift in _THRIFTS:
        chosen = []
        for name in both:
            row = ranked[name]
            nearest = row.ranked[:NUM_HITS]
            features = RouteFeatures(
                question=by_id[name].question,
                document_tokens=row.document_tokens,
                effective_tokens=effective or row.document_tokens,
                shares=tuple(sorted((found.lexical for found in nearest), reverse=True)),
                places=places_of([found.ordinal for found in nearest], row.num_chunks),
                question_class=classify_question(by_id[name].question).question_class,
            )
            costs = {
                Route.FULL: full[name].prompt_tokens,
                Route.RETRIEVAL: hybrid[name].prompt_tokens,
            }
            best = estimate_routes(features, weights, costs, thrift=thrift)[0].route
            chosen.append((full if best is Route.FULL else hybrid)[name])
        points.append(
            Point(
                f"thrift {thrift:g}",
                mean([s.computed_tokens for s in chosen]),
                mean([s.prompt_tokens for s in chosen]),
                mean([s.score for s in chosen]),
            )
        )
    return tuple(points)


def gap_closed(scored: Scores, derived: Scores) -> float | None:
    """Return how much of the way from the best single arm to the oracle the router went.

    None where there is no such way, or no router.
    """
    router, oracle = scored.get(Arm.ROUTER, {}), derived.get(ORACLE_ROUTER, {})
    both = [name for name in oracle if name in router]
    if not both:
        return None
    best = max(mean([scored[arm][name].score for name in both]) for arm in (Arm.HYBRID, Arm.FULL))
    ceiling = mean([oracle[name].score for name in both])
    return (
        (mean([router[n].score for n in both]) - best) / (ceiling - best)
        if ceiling > best
        else None
    )


def mean(values: Sequence[float]) -> float:
    """Return the mean, NaN of nothing."""
    return sum(values) / len(values) if values else math.nan
