"""The same questions through both routes, paired."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from scipy.stats import binomtest

from eval.examples import EvalExample
from eval.metrics import (
    abstained_rightly,
    citations_are_verbatim,
    contains_answer,
    exact_match,
    token_f1,
)
from rag.answering.citations import UNVERIFIED
from rag.answering.service import AnsweringService
from rag.store.documents import DocumentStore
from rag.types import Answer, Document, Route

SIGNIFICANCE = 0.05

_MARKS = re.compile(rf"\[\d+\]|{re.escape(UNVERIFIED)}")


@dataclass(frozen=True, slots=True)
class Row:
    """One question by one route.

    `correct` is: contains a reference and does not abstain, or, where the document does not hold
    the answer, abstains. `f1` and `exact` follow SQuAD 2.0: there they are 1 for abstaining.
    `seconds` is wall-clock time; `cached_tokens` of the `prompt_tokens` cost none of it, so two
    routes' seconds compare only where both read their prompt afresh (None: a server did not tell).
    """

    example_id: str
    asked: Route
    taken: Route
    correct: bool
    exact: bool
    f1: float
    abstained: bool
    abstained_rightly: bool
    verbatim: bool
    num_citations: int
    prompt_tokens: int
    cached_tokens: int | None
    new_tokens: int
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
    """What each route got right, and both on the questions where each was really taken.

    `taken` counts every question that a route really answered, so its totals may differ and the
    two are not to be compared; `shares` counts the pairs alone. `only_full` and `only_retrieval`
    count the pairs that one route alone got right; `p_value` is McNemar's, exact, two-sided; None
    without pairs, and then nothing can be said.
    """

    taken: dict[Route, Share]
    shares: dict[Route, Share]
    only_full: int
    only_retrieval: int
    p_value: float | None
    words: str


def compare(
    examples: Sequence[EvalExample],
    service: AnsweringService,
    store: DocumentStore,
    routes: Sequence[Route] = (Route.RETRIEVAL, Route.FULL),
    on_row: Callable[[Row], None] | None = None,
) -> Iterator[Row]:
    """Yield a row for each question and route, in order.

    Every document is looked up before the first question, so a wrong name costs no model time.

    Args:
        examples: the questions.
        service: answers them; the route asked for is taken only where it is possible.
        store: the library that holds their documents.
        routes: the routes to ask each question by, in this order.
        on_row: called with each row before it is yielded, e.g. to save it or show progress.

    Raises:
        DocumentNotFoundError: if an example names a document that the library does not hold.
        ModelError: if the model cannot read even the retrieved passages.
    """
    documents = {example.document: store.find(example.document) for example in examples}
    for example in examples:
        for route in routes:
            row = _ask(example, documents[example.document], route, service, store)
            if on_row:
                on_row(row)
            yield row


def score(
    example: EvalExample, asked: Route, answer: Answer, text_of: Callable[[int, int, int], str]
) -> Row:
    """Return the row of one finished answer; no model is needed.

    Args:
        example: the question.
        asked: the route that was asked for.
        answer: what came of it.
        text_of: from document id, start and end to the canonical text there.
    """
    text = _MARKS.sub(" ", answer.answer)
    stretch = _quoted_stretch(answer) or text
    rightly = abstained_rightly(answer.abstained, example.answerable)
    scored = example.answerable and not answer.abstained
    return Row(
        example_id=example.id,
        asked=asked,
        taken=answer.receipt.route,
        correct=contains_answer(text, example.answers) if scored else rightly,
        exact=exact_match(stretch, example.answers) if scored else rightly,
        f1=token_f1(stretch, example.answers) if scored else float(rightly),
        abstained=answer.abstained,
        abstained_rightly=rightly,
        verbatim=citations_are_verbatim(answer, text_of),
        num_citations=len(answer.citations),
        prompt_tokens=answer.receipt.prompt_tokens,
        cached_tokens=answer.receipt.cached_tokens,
        new_tokens=answer.receipt.new_tokens,
        seconds=answer.receipt.seconds.total,
    )


def summarise(rows: Sequence[Row]) -> Verdict:
    """Return the paired verdict on the questions that were answered by both routes.

    Source: Wilson 1927; McNemar 1947, in its exact binomial form.

    Raises:
        ValueError: if a question was asked twice by one route; its pairs would be ambiguous.
    """
    if len({(row.example_id, row.asked) for row in rows}) < len(rows):
        raise ValueError("a question stands twice in the rows of one route")
    by_route = {
        route: {r.example_id: r for r in rows if r.asked is r.taken is route}
        for route in (Route.FULL, Route.RETRIEVAL)
    }
    taken = {
        route: _share([r.correct for r in found.values()]) for route, found in by_route.items()
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
        words = "not measurable: no question was answered by both"
        return Verdict(taken, shares, 0, 0, None, words)
    discordant = only_full + only_retrieval
    p_value = float(binomtest(only_full, discordant).pvalue) if discordant else 1.0
    words = "no difference shown"
    if p_value < SIGNIFICANCE:
        better = Route.FULL if only_full > only_retrieval else Route.RETRIEVAL
        words = f"{better} is better"
    words = f"{words} (p = {p_value:.3g})"
    return Verdict(taken, shares, only_full, only_retrieval, p_value, words)


def _ask(
    example: EvalExample,
    document: Document,
    route: Route,
    service: AnsweringService,
    store: DocumentStore,
) -> Row:
    answer = service.answer(example.question, document_ids=[document.id], route=route)
    return score(example, route, answer, store.text)


def _quoted_stretch(answer: Answer) -> str:
    """Return the stretch that a quotation answers with, "" where the answer is no quotation."""
    for c in answer.citations:
        if c.answer_start is not None and c.answer_end is not None:
            return c.quote[c.answer_start - c.start : c.answer_end - c.start]
    return ""


def _share(correct: list[bool]) -> Share:
    if not correct:
        return Share(0, 0, 0.0, 1.0)
    interval = binomtest(sum(correct), len(correct)).proportion_ci(method="wilson")
    return Share(sum(correct), len(correct), float(interval.low), float(interval.high))
