"""How far the router is from the better single route, on every slice of length and class.

The questions were asked in three ways (`eval.compare`): by retrieval, by reading everything, and as
the router would have it. Which route is the better one of a slice is known only afterwards, so the
comparison favours it; and a slice of few questions shows little: see the intervals.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from eval.arms import Arm
from eval.examples import EvalExample
from eval.journal import Journal
from eval.policies import Scores, mean
from eval.scoring import Scored, score_row
from eval.statistics import NO_DIFFERENCE, Interval, clustered_difference

# What the router may lack of the better single route, declared before any run.
WITHIN = 0.01
_WAYS = (Arm.HYBRID, Arm.FULL, Arm.ROUTER)


@dataclass(frozen=True, slots=True)
class RouteSlice:
    """One slice: scores, 0 to 1, of the questions that all three ways answered.

    `router_less_better` is paired. Tokens are a question's: those of the prompt, and those of it
    that were computed, since a document is kept between its questions. `words` is the verdict.
    """

    length: str
    question_class: str
    num_questions: int
    num_documents: int
    hybrid: float
    full: float
    router: float
    router_less_better: Interval
    router_prompt_tokens: float
    full_prompt_tokens: float
    router_computed_tokens: float
    full_computed_tokens: float
    words: str


def judge_slices(examples: Sequence[EvalExample], journal: Journal) -> list[RouteSlice]:
    """Return all questions, each length, each class, and each class of each length.

    Args:
        examples: the questions.
        journal: their rows.
    """
    by_id = {example.id: example for example in examples}
    scored: Scores = {arm: {} for arm in _WAYS}
    for row in journal.rows:
        found = score_row(by_id[row.example_id], row) if row.arm in scored else None
        if found is not None:
            scored[row.arm][row.example_id] = found
    names = [e.id for e in examples if all(e.id in scored[arm] for arm in _WAYS)]
    known = scored[Arm.ROUTER]
    lengths = sorted({known[name].length for name in names})
    classes = sorted({known[name].question_class for name in names})
    wanted = [("", ""), *((length, "") for length in lengths), *(("", kind) for kind in classes)]
    wanted += [(length, kind) for length in lengths for kind in classes]
    return [
        _slice(scored, part, length.strip(), kind)
        for length, kind in wanted
        if (part := [n for n in names if _is_in(known[n], length, kind)])
    ]


def slices_card(slices: Sequence[RouteSlice]) -> str:
    """Return the table for people."""
    lines = [
        f"{'length':<12} {'class':<11} {'n':>4} {'docs':>4} {'retr.':>6} {'full':>6} {'router':>6}"
        f"  {'less the better, points':<24} {'tokens of full':>14}"
    ]
    for part in slices:
        gap = part.router_less_better
        points = f"{100 * gap.mean:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]"
        share = part.router_prompt_tokens / max(1.0, part.full_prompt_tokens)
        lines.append(
            f"{part.length or 'all':<12} {part.question_class or 'all':<11} {part.num_questions:>4}"
            f" {part.num_documents:>4} {part.hybrid:>6.3f} {part.full:>6.3f} {part.router:>6.3f}"
            f"  {points:<24} {share:>14.0%}  {part.words}"
        )
    return "\n".join(lines)


def _is_in(scored: Scored, length: str, question_class: str) -> bool:
    return length in ("", scored.length) and question_class in ("", scored.question_class)


def _slice(scored: Scores, names: Sequence[str], length: str, question_class: str) -> RouteSlice:
    hybrid, full, router = ([scored[arm][name] for name in names] for arm in _WAYS)
    scores = {
        arm: mean([s.score for s in found])
        for arm, found in zip(_WAYS, (hybrid, full, router), strict=True)
    }
    better = full if scores[Arm.FULL] > scores[Arm.HYBRID] else hybrid
    gap = clustered_difference(
        [ours.score - other.score for ours, other in zip(router, better, strict=True)],
        [s.document for s in router],
    )
    return RouteSlice(
        length=length,
        question_class=question_class,
        num_questions=len(names),
        num_documents=len({s.document for s in router}),
        hybrid=scores[Arm.HYBRID],
        full=scores[Arm.FULL],
        router=scores[Arm.ROUTER],
        router_less_better=gap,
        router_prompt_tokens=mean([s.prompt_tokens for s in router]),
        full_prompt_tokens=mean([s.prompt_tokens for s in full]),
        router_computed_tokens=mean([s.computed_tokens for s in router]),
        full_computed_tokens=mean([s.computed_tokens for s in full]),
        words=_words(gap),
    )


def _words(gap: Interval) -> str:
    if gap.low > 0:
        return "above"
    if gap.high < 0:
        return "below"
    if gap.low >= -WITHIN:
        return f"shown to be within {100 * WITHIN:.0f} point"
    return NO_DIFFERENCE
