"""The same questions through both routes, paired."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from scipy.stats import binomtest

from eval.examples import EvalExample
from eval.metrics import citations_are_verbatim, contains_answer, token_f1
from rag.answering.service import AnsweringService
from rag.store.documents import DocumentStore
from rag.types import Route

SIGNIFICANCE = 0.05


@dataclass(frozen=True, slots=True)
class Row:
    """One question by one route. `correct` is: contains a reference, or abstains rightly."""

    example_id: str
    asked: Route
    taken: Route
    correct: bool
    f1: float
    abstained: bool
    verbatim: bool
    prompt_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Share:
    """`correct` of `total`, with the Wilson interval at 95%."""

    correct: int
    total: int
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """Both routes on the questions where each was really taken.

    `only_full` and `only_retrieval` count the questions that one route alone got right; `p_value`
    is McNemar's, exact, two-sided; None without pairs, and then nothing can be said.
    """

    shares: dict[Route, Share]
    only_full: int
    only_retrieval: int
    p_value: float | None
    words: str


def compare(
    examples: Sequence[EvalExample], service: AnsweringService, store: DocumentStore
) -> Iterator[Row]:
    """Yield a row for each question and route, in order."""
    for example in examples:
        document = store.find(example.document)
        for route in Route:
            answer = service.answer(example.question, document_ids=[document.id], route=route)
            correct = contains_answer(answer.answer, example.answers)
            yield Row(
                example_id=example.id,
                asked=route,
                taken=answer.receipt.route,
                correct=correct if example.answerable else answer.abstained,
                f1=token_f1(answer.answer, example.answers),
                abstained=answer.abstained,
                verbatim=citations_are_verbatim(answer, store.text),
                prompt_tokens=answer.receipt.prompt_tokens,
                seconds=answer.receipt.seconds.total,
            )


def summarise(rows: Sequence[Row]) -> Verdict:
    """Return the paired verdict on the questions that were answered by both routes.

    Source: Wilson 1927; McNemar 1947, in its exact binomial form.
    """
    by_route = {
        route: {r.example_id: r for r in rows if r.asked is r.taken is route} for route in Route
    }
    full, retrieval = by_route[Route.FULL], by_route[Route.RETRIEVAL]
    pairs = [(full[i].correct, retrieval[i].correct) for i in full if i in retrieval]
    only_full = pairs.count((True, False))
    only_retrieval = pairs.count((False, True))
    shares = {
        Route.FULL: _share([a for a, _ in pairs]),
        Route.RETRIEVAL: _share([b for _, b in pairs]),
    }
    if not pairs:
        return Verdict(shares, 0, 0, None, "not measurable: no question was answered by both")
    discordant = only_full + only_retrieval
    p_value = float(binomtest(only_full, discordant).pvalue) if discordant else 1.0
    words = "no difference shown"
    if p_value < SIGNIFICANCE:
        better = Route.FULL if only_full > only_retrieval else Route.RETRIEVAL
        words = f"{better} is better"
    return Verdict(shares, only_full, only_retrieval, p_value, f"{words} (p = {p_value:.3g})")


def _share(correct: list[bool]) -> Share:
    if not correct:
        return Share(0, 0, 0.0, 1.0)
    interval = binomtest(sum(correct), len(correct)).proportion_ci(method="wilson")
    return Share(sum(correct), len(correct), float(interval.low), float(interval.high))
