"""What the rows of a comparison say: rates with intervals, paired differences, and a verdict.

Every number is made from scored rows alone, so all of it can be made again without a model. Two
arms are compared on the questions that both answered; what does not fit a model is counted apart.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from eval.arms import ABOUT, Arm
from eval.examples import EvalExample
from eval.journal import DOES_NOT_FIT, FAILED, Journal, Row, Run
from eval.metrics import area_under_risk, balanced_accuracy, risk_coverage
from eval.policies import (
    DERIVED,
    Point,
    Scores,
    derived_policies,
    gap_closed,
    mean,
    thrift_curve,
)
from eval.scoring import NAMES_OF_RECALL, Scored, score_row
from eval.statistics import (
    NO_DIFFERENCE,
    SIGNIFICANCE,
    Interval,
    clustered_difference,
    clustered_mean,
    design_effect,
    detectable_difference,
    holm,
    is_equivalent,
    mcnemar,
)
from rag.routing.utility import RouterWeights

MARGIN = 0.05  # what counts as "as good as", declared before any run
SLICES = ("length", "question_class", "depth", "kind")
# The comparisons that are made, the second being what is known already.
_SECOND = (Arm.HYBRID, Arm.FULL)


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One arm over all questions that it answered; shares are 0 to 1, means are a question's.

    `does_not_fit` and `failed` questions are in no mean. `score` is by each example's metric;
    `rest` is the same without the questions answered right closed book. `correct_if_shown` and
    `correct_if_not` part it by whether the evidence was in the prompt, of which `shown` is the
    share. `escalated` answers were tried more than once: their seconds are of all tries, their
    tokens of the last. None is what cannot be known.
    """

    arm: str
    about: str
    num_questions: int
    does_not_fit: int
    failed: int
    score: Interval
    rest: Interval | None
    contains: float
    exact: float
    f1: float
    crag: float
    balanced_accuracy: float | None
    answers_what_can_be: float | None
    declines_what_cannot: float | None
    aurc: float
    verbatim: float
    citation_precision: Interval | None
    citation_recall: Interval | None
    shown: float | None
    correct_if_shown: float | None
    correct_if_not: float | None
    recall: Mapping[str, float]
    words: float
    prompt_tokens: float
    computed_tokens: float
    new_tokens: float
    kv_bytes: float | None
    seconds: float
    seconds_a_right_answer: float | None
    routes: Mapping[str, int]
    escalated: int


@dataclass(frozen=True, slots=True)
class Pair:
    """Two arms on the questions that both answered: `difference` is first less second.

    `only_first` and `only_second` count the pairs that one alone got right. `p_value` is McNemar's
    exact one, `holm` adjusted for all pairs of the comparison; both None where scores are not
    right or wrong. `detectable` is the smallest difference that so many pairs, less their
    `design_effect`, show in 4 of 5 runs. `equivalent` is shown to lie within the margin.
    """

    first: str
    second: str
    num_pairs: int
    num_documents: int
    difference: Interval
    only_first: int
    only_second: int
    p_value: float | None
    mid_p: float | None
    holm: float | None
    design_effect: float
    detectable: float
    equivalent: bool
    words: str

    @property
    def shows_difference(self) -> bool:
        """Whether zero is outside the interval, and the adjusted p-value low, if there is one."""
        return self.difference.excludes_zero and (self.holm is None or self.holm < SIGNIFICANCE)


@dataclass(frozen=True, slots=True)
class Cell:
    """One arm on one slice of the questions."""

    slice: str
    value: str
    arm: str
    num_questions: int
    score: Interval


@dataclass(frozen=True, slots=True)
class Analysis:
    """Everything that the report shows.

    `grid` holds, of each arm, cells whose `slice` is a length and whose `value` a depth; since some
    depths ask harder questions, `grid_of_differences` holds full less hybrid, paired.
    `frontier` are the arms and policies as points, `curve` the router's two models over thrift.
    `waterfall` goes from knowing nothing to being shown the evidence. `risk` are points (share
    answered, share of those wrong) of each arm. `gap_closed` is how much of the way from the best
    single arm to the better of hybrid and full for each question the router went.
    """

    runs: tuple[Run, ...]
    num_examples: int
    num_documents: int
    num_rows_missing: int
    arms: tuple[ArmResult, ...]
    pairs: tuple[Pair, ...]
    cells: tuple[Cell, ...]
    grid: tuple[Cell, ...]
    grid_of_differences: tuple[Cell, ...]
    frontier: tuple[Point, ...]
    curve: tuple[Point, ...]
    waterfall: tuple[tuple[str, float], ...]
    risk: Mapping[str, tuple[tuple[float, float], ...]]
    gap_closed: float | None
    verdict: tuple[str, ...]


def analyse(
    examples: Sequence[EvalExample], journal: Journal, weights: RouterWeights | None = None
) -> Analysis:
    """Score every row and return what they say.

    Args:
        examples: the questions of the comparison.
        journal: its rows.
        weights: the router's two models, for its curve; None draws none.
    """
    by_id = {example.id: example for example in examples}
    rows = [row for row in journal.rows if row.example_id in by_id]
    arms = [arm for arm in Arm if any(row.arm == arm for row in rows)]
    scored: Scores = {arm: {} for arm in arms}
    for row in rows:
        if (scores := score_row(by_id[row.example_id], row)) is not None:
            scored[row.arm][row.example_id] = scores
    scored = _alike_confident(scored)
    derived = derived_policies(scored)
    closed = {name for name, s in scored.get(Arm.CLOSED, {}).items() if s.correct}
    closed &= {example.id for example in examples if example.answerable}
    results = tuple(
        _arm_result(name, found, rows, closed if Arm.CLOSED in scored else None)
        for name, found in (scored | derived).items()
        if found
    )
    pairs = _pairs(scored)
    frontier = tuple(
        Point(r.arm, r.computed_tokens, r.prompt_tokens, r.score.mean) for r in results
    )
    analysis = Analysis(
        runs=journal.runs,
        num_examples=len(examples),
        num_documents=len({example.document for example in examples}),
        num_rows_missing=len(examples) * len(arms) - len(rows),
        arms=results,
        pairs=pairs,
        cells=tuple(_cells(scored)),
        grid=tuple(_grid(scored)),
        grid_of_differences=tuple(_grid_of_differences(scored)),
        frontier=frontier,
        curve=thrift_curve(by_id, rows, scored, journal, weights) if weights else (),
        waterfall=_waterfall(scored),
        risk={arm: tuple(_risk(list(found.values()))) for arm, found in scored.items() if found},
        gap_closed=gap_closed(scored, derived),
        verdict=(),
    )
    return _with_verdict(analysis)


# ---- one arm ------------------------------------------------------------------------------------


def _arm_result(
    name: str, found: Mapping[str, Scored], rows: Sequence[Row], closed: set[str] | None
) -> ArmResult:
    answers = list(found.values())
    mine = [row for row in rows if row.arm == name]
    rest = [s for s in answers if closed is not None and s.example_id not in closed]
    answerable = [s for s in answers if s.answerable]
    others = [s for s in answers if not s.answerable]
    known = [s for s in answerable if s.evidence_in_prompt is not None]
    num_right = sum(s.correct for s in answers)
    return ArmResult(
        arm=name,
        about=_ABOUT[name],
        num_questions=len(answers),
        does_not_fit=sum(row.outcome == DOES_NOT_FIT for row in mine),
        failed=sum(row.outcome == FAILED for row in mine),
        score=_mean_score(answers),
        rest=_mean_score(rest) if rest and name != Arm.CLOSED else None,
        contains=mean([s.contains for s in answerable]),
        exact=mean([s.exact for s in answers]),
        f1=mean([s.f1 for s in answers]),
        crag=mean([s.crag for s in answers]),
        balanced_accuracy=_or_none(
            balanced_accuracy([s.abstained for s in answers], [s.answerable for s in answers])
        ),
        answers_what_can_be=_or_none(mean([not s.abstained for s in answerable])),
        declines_what_cannot=_or_none(mean([s.abstained for s in others])),
        aurc=area_under_risk(_risk(answers)),
        verbatim=mean([s.verbatim for s in answers]),
        citation_precision=_known_mean(answers, lambda s: s.citation_precision),
        citation_recall=_known_mean(answers, lambda s: s.citation_recall),
        shown=_or_none(mean([s.evidence_in_prompt or 0.0 for s in known])),
        correct_if_shown=_or_none(mean([s.score for s in known if s.evidence_in_prompt == 1])),
        correct_if_not=_or_none(mean([s.score for s in known if s.evidence_in_prompt != 1])),
        recall=_recall(answerable) if name in _SEARCHING else {},
        words=mean([s.words for s in answers]),
        prompt_tokens=mean([s.prompt_tokens for s in answers]),
        computed_tokens=mean([s.computed_tokens for s in answers]),
        new_tokens=mean([s.new_tokens for s in answers]),
        kv_bytes=_or_none(mean([s.kv_bytes for s in answers if s.kv_bytes is not None])),
        seconds=mean([s.seconds for s in answers]),
        seconds_a_right_answer=(sum(s.seconds for s in answers) / num_right if num_right else None),
        routes=_counts([s.route for s in answers]),
        escalated=sum(s.escalated for s in answers),
    )


_ABOUT: Mapping[str, str] = {**ABOUT, **DERIVED}
_SEARCHING = (Arm.RANDOM, Arm.LEXICAL, Arm.DENSE, Arm.HYBRID)


# ---- two arms -----------------------------------------------------------------------------------


def _pairs(scored: Scores) -> tuple[Pair, ...]:
    seconds = [arm for arm in _SECOND if scored.get(arm)]
    wanted = [(arm, seconds[0]) for arm in scored if seconds and arm != seconds[0]]
    if len(seconds) > 1 and Arm.ROUTER in scored:
        wanted.append((Arm.ROUTER, seconds[1]))
    found = [pair for a, b in wanted if (pair := _pair(a, b, scored)) is not None]
    tested = [pair.p_value for pair in found if pair.p_value is not None]
    adjusted = iter(holm(tested))
    return tuple(
        _worded(pair, next(adjusted) if pair.p_value is not None else None) for pair in found
    )


def _pair(first: str, second: str, scored: Scores) -> Pair | None:
    both = [name for name in scored[first] if name in scored[second]]
    if not both:
        return None
    left, right = (np.array([scored[arm][name].score for name in both]) for arm in (first, second))
    differences = left - right
    documents = [scored[first][name].document for name in both]
    is_binary = set(left.tolist()) | set(right.tolist()) <= {0.0, 1.0}
    test = mcnemar(int((differences == 1).sum()), int((differences == -1).sum()))
    effect = design_effect(differences, documents)
    # For graded scores the mean square of the difference is what discordance is for right or wrong.
    discordance = max(float((differences**2).mean()), 1 / len(both))
    return Pair(
        first=first,
        second=second,
        num_pairs=len(both),
        num_documents=len(set(documents)),
        difference=clustered_difference(differences, documents),
        only_first=int((differences > 0).sum()),
        only_second=int((differences < 0).sum()),
        p_value=test.p_value if is_binary else None,
        mid_p=test.mid_p if is_binary else None,
        holm=None,
        design_effect=effect,
        detectable=detectable_difference(len(both) / effect, discordance),
        equivalent=is_equivalent(differences, documents, margin=MARGIN),
        words="",
    )


def _worded(pair: Pair, adjusted: float | None) -> Pair:
    pair = replace(pair, holm=adjusted)
    if pair.shows_difference:
        better, worse = pair.first, pair.second
        if pair.difference.mean < 0:
            better, worse = worse, better
        words = f"{better} is better than {worse}"
    elif pair.equivalent:
        words = f"{NO_DIFFERENCE}, and shown to be within {100 * MARGIN:.0f} points"
    else:
        words = NO_DIFFERENCE
    return replace(pair, words=words)


# ---- slices, depth, cost ------------------------------------------------------------------------


def _slice_of(s: Scored, name: str) -> str:
    if name == "kind":
        return "has an answer" if s.answerable else "has no answer"
    return str(getattr(s, name))


def _cells(scored: Scores) -> list[Cell]:
    cells = []
    for name in SLICES:
        values = sorted({_slice_of(s, name) for found in scored.values() for s in found.values()})
        for value in values:
            for arm, found in scored.items():
                part = [s for s in found.values() if _slice_of(s, name) == value]
                if part:
                    cells.append(Cell(name, value.strip(), arm, len(part), _mean_score(part)))
    return cells


def _grid(scored: Scores) -> list[Cell]:
    cells = []
    for arm, found in scored.items():
        answerable = [s for s in found.values() if s.answerable and s.depth != "unknown"]
        for place in sorted({(s.length, s.depth) for s in answerable}):
            part = [s for s in answerable if (s.length, s.depth) == place]
            cells.append(Cell(place[0].strip(), place[1], arm, len(part), _mean_score(part)))
    return cells


def _grid_of_differences(scored: Scores) -> list[Cell]:
    full, hybrid = scored.get(Arm.FULL, {}), scored.get(Arm.HYBRID, {})
    both = [n for n in full if n in hybrid and full[n].answerable and full[n].depth != "unknown"]
    cells = []
    for length, depth in sorted({(full[n].length, full[n].depth) for n in both}):
        part = [n for n in both if (full[n].length, full[n].depth) == (length, depth)]
        difference = clustered_difference(
            [full[n].score - hybrid[n].score for n in part], [full[n].document for n in part]
        )
        cells.append(Cell(length.strip(), depth, "full - hybrid", len(part), difference))
    return cells


def _waterfall(scored: Scores) -> tuple[tuple[str, float], ...]:
    """Return the score of each step, on the questions that every one of them answered."""
    steps = [
        arm
        for arm in (Arm.CLOSED, Arm.RANDOM, Arm.HYBRID, Arm.FULL, Arm.ROUTER, Arm.ORACLE)
        if scored.get(arm)
    ]
    if not steps:
        return ()
    common = set.intersection(*(set(scored[arm]) for arm in steps))
    if not common:
        return ()
    return tuple((arm, mean([scored[arm][name].score for name in sorted(common)])) for arm in steps)


def _alike_confident(scored: Scores) -> Scores:
    """Return the answers with the confidence that hybrid's ranking gives their question.

    Not every arm ranks; and by one order of the questions their curves compare.
    """
    known = scored.get(Arm.HYBRID, {})
    return {
        arm: {
            name: replace(s, confidence=known[name].confidence) if name in known else s
            for name, s in found.items()
        }
        for arm, found in scored.items()
    }


def _risk(answers: Sequence[Scored]) -> list[tuple[float, float]]:
    """Return the points of those that were answered, the declined being the last to be let through.

    An answer that declines has made no claim: it has no risk and no coverage.
    """
    given = [s for s in answers if not s.abstained]
    points = risk_coverage([s.confidence for s in given], [s.score for s in given])
    return [(coverage * len(given) / len(answers), risk) for coverage, risk in points]


# ---- the verdict --------------------------------------------------------------------------------


def _with_verdict(analysis: Analysis) -> Analysis:
    lines = []
    if analysis.num_rows_missing:
        lines.append(
            f"Not finished: {analysis.num_rows_missing:,} answers are still to come; what follows"
            " is of those that are there."
        )
    shown = [pair for pair in analysis.pairs if pair.shows_difference]
    if analysis.pairs and not shown:
        lines.append("No difference is shown between any two ways to answer.")
    for pair in (*shown, *(pair for pair in analysis.pairs if pair not in shown)):
        words = pair.words if pair in shown else f"{pair.first} against {pair.second}: {pair.words}"
        mean, ends = pair.difference.mean, (pair.difference.low, pair.difference.high)
        if pair in shown and mean < 0:  # as it is said: the better one first
            mean, ends = -mean, (-ends[1], -ends[0])
        lines.append(
            f"{words[0].upper()}{words[1:]}: {100 * mean:+.1f} points"
            f" [{100 * ends[0]:+.1f}, {100 * ends[1]:+.1f}] on"
            f" {pair.num_pairs:,} questions of {pair.num_documents:,}"
            f" document{'s' * (pair.num_documents != 1)}, {_can_show(pair)}."
        )
    for result in analysis.arms:
        if result.does_not_fit:
            lines.append(
                f"{result.arm}: {result.does_not_fit:,} questions are on documents that do not fit"
                " this model here; they are in no comparison with it."
            )
        if result.failed:
            lines.append(f"{result.arm}: {result.failed:,} questions failed.")
    return replace(analysis, verdict=tuple(lines))


def _can_show(pair: Pair) -> str:
    if pair.detectable == 1:
        dividing = pair.only_first + pair.only_second
        return f"of which {dividing} divide them: too few to show any in 4 of 5 runs"
    return f"which show a difference of {100 * pair.detectable:.0f} points in 4 of 5 runs"


# ---- small things -------------------------------------------------------------------------------


def _mean_score(answers: Sequence[Scored]) -> Interval:
    return clustered_mean([s.score for s in answers], [s.document for s in answers])


def _known_mean(
    answers: Sequence[Scored], value: Callable[[Scored], float | None]
) -> Interval | None:
    known = [(found, s.document) for s in answers if (found := value(s)) is not None]
    return clustered_mean([v for v, _ in known], [d for _, d in known]) if known else None


def _recall(answers: Sequence[Scored]) -> dict[str, float]:
    known = [s.recall + s.recall_at_tokens for s in answers if s.recall]
    return {
        name: mean([values[place] for values in known])
        for place, name in enumerate(NAMES_OF_RECALL)
        if known
    }


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _counts(values: Sequence[str]) -> dict[str, int]:
    return {value: values.count(value) for value in sorted(set(values))}
