"""The ways to answer that are compared: what each shows the model of a document.

All but three (closed book, windowed, question first) differ only in which chunks they show, so they
are the product's own service over a retriever that ranks otherwise: the same prompt with the
question last, the same budget, greedy.
Nothing is cut: where a document does not fit, there is no answer.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from random import Random
from threading import Event
from typing import Protocol, runtime_checkable

from eval.examples import EvalExample
from eval.journal import ANSWERED, DOES_NOT_FIT, FAILED, NOT_APPLICABLE, Found, Row
from eval.metrics import Span, citations_are_verbatim
from rag.answering.outcome import finished_answer
from rag.answering.planning import Plan
from rag.answering.service import AnsweringService
from rag.answering.writing import written_outcome
from rag.errors import FathomError, ModelError
from rag.lm.engine import (
    DocumentPrefix,
    Engine,
    GenerationDone,
    GenerationStep,
    Message,
    Prompt,
    TextPiece,
)
from rag.retrieval.retriever import Hit, Retriever
from rag.settings import Settings
from rag.store.calibrations import CalibrationStore
from rag.store.documents import DocumentStore, StoredChunk
from rag.store.receipts import ReceiptStore
from rag.types import Answer, AnswerMode, Document, ReadExtent, Route


class Arm(StrEnum):
    """A way to answer."""

    CLOSED = "closed"
    RANDOM = "random"
    LEXICAL = "lexical"
    DENSE = "dense"
    HYBRID = "hybrid"
    QUESTION_FIRST = "question_first"
    LAST = "last"
    ORACLE = "oracle"
    WINDOWED = "windowed"
    ROUTER = "router"
    FULL = "full"


ABOUT: Mapping[str, str] = {
    Arm.CLOSED: "no passage: what the model knows, or guesses",
    Arm.RANDOM: "chunks drawn at random, up to the retrieval budget",
    Arm.LEXICAL: "chunks by the words of the question alone",
    Arm.DENSE: "chunks by meaning alone",
    Arm.HYBRID: "chunks by both: the retrieval of the product",
    Arm.QUESTION_FIRST: "hybrid's chunks, with the question before them: what the order does",
    Arm.LAST: "the last chunks of the document, up to the retrieval budget",
    Arm.ORACLE: "the chunks that hold the evidence, and those beside them",
    Arm.WINDOWED: "everything, through a sliding window of the retrieval budget with sinks",
    Arm.ROUTER: "whatever the product chooses",
    Arm.FULL: "the whole document",
}
DEFAULT_ARMS = (Arm.CLOSED, Arm.HYBRID, Arm.FULL, Arm.ROUTER)
# First tokens that a windowed cache keeps; Xiao et al., arXiv:2309.17453, find 4 to be enough.
NUM_SINKS = 64
# The product's own words have a model refuse where it is shown nothing; to see what it knows, or
# guesses, it is asked to answer.
_CLOSED_BOOK = (
    "You answer questions from what you know. Answer in one or two short, complete sentences."
)
_STOPPED = (FAILED, "stopped before it was asked")
# Chunks of a ranking that a row keeps.
_KEPT_HITS = 50


@dataclass(frozen=True, slots=True)
class Workplace:
    """What questions are answered with.

    `calibrations` tell how long a prompt the model uses well, if that was measured; `forget` drops
    what is kept of a document already read.
    """

    store: DocumentStore
    retriever: Retriever
    engine: Engine
    settings: Settings
    forget: Callable[[Document], None]
    calibrations: CalibrationStore | None = None


@runtime_checkable
class ReadsThroughWindow(Protocol):
    """An engine that can read prompts through a sliding window."""

    def generate_windowed(
        self,
        prompts: Sequence[Prompt],
        prefix: DocumentPrefix,
        *,
        num_sinks: int,
        window: int,
        max_new_tokens: int,
        stop: Event,
    ) -> Iterator[tuple[int, GenerationStep]]:
        """Answer prompts that begin with the same document, which is read once."""


def answer_by(
    arm: Arm,
    examples: Sequence[EvalExample],
    document: Document,
    place: Workplace,
    *,
    seed: int,
    stop: Event | None = None,
    on_answer: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Ask one document's questions by one arm, and return their rows in order.

    Args:
        arm: the way to answer.
        examples: questions on this document, by distinct ids.
        document: what they are asked of.
        place: store, retriever and model.
        seed: of the random chunks.
        stop: set it to end; the rows then say of some that no answer came, and are none.
        on_answer: called after each.
    """
    asking = _Asking(arm, examples, document, place, seed, stop or Event())
    # Planned before anything is timed: it is only to tell what will be shown.
    plans = [_STOPPED if asking.stopped else asking.plan(example) for example in examples]
    fits = [isinstance(plan, Plan) for plan in plans]
    begun = time.perf_counter()
    answers: dict[int, Answer | FathomError] = {}
    numbers = [number for number, fit in enumerate(fits) if fit]
    for number, outcome in asking.answers(numbers, plans):
        answers[number] = outcome
        on_answer()
    seconds = (time.perf_counter() - begun) / max(1, len(numbers))
    return [
        asking.row(example, plan, answers.get(number), seconds)
        for number, (example, plan) in enumerate(zip(examples, plans, strict=True))
    ]


class _Asking:
    """One document's questions by one arm."""

    def __init__(
        self,
        arm: Arm,
        examples: Sequence[EvalExample],
        document: Document,
        place: Workplace,
        seed: int,
        stop: Event,
    ) -> None:
        self._arm, self._document, self._place, self._stop = arm, document, place, stop
        self._examples = examples
        self._ranked: dict[str, tuple[Found, ...]] = {}
        self._retriever = ArmRetriever(
            arm,
            place.retriever,
            place.store,
            seed=seed,
            evidence={
                example.asked: spans_of(example, document, place.store) for example in examples
            },
        )
        self._service = AnsweringService(
            place.store,
            _Unsaved(),
            self._retriever,
            place.engine,
            place.settings,
            place.calibrations,
        )
        self._tokens: dict[int, int] = {}
        self._document_tokens = 0
        self._plans: dict[str, tuple[Plan, list[Hit]]] = {}

    @property
    def stopped(self) -> bool:
        """Whether no more is to be asked."""
        return self._stop.is_set()

    @property
    def _route(self) -> Route | None:
        if self._arm is Arm.ROUTER:
            return None
        return Route.FULL if self._arm in (Arm.FULL, Arm.WINDOWED) else Route.RETRIEVAL

    def plan(self, example: EvalExample) -> Plan | tuple[str, str]:
        """Return what will be shown; or the outcome, and why, where there can be no answer."""
        if self._arm is Arm.ORACLE and not spans_of(example, self._document, self._place.store):
            return NOT_APPLICABLE, "no evidence is known"
        if self._arm is Arm.WINDOWED and not isinstance(self._place.engine, ReadsThroughWindow):
            return NOT_APPLICABLE, f"{self._place.engine.name} is read by a server"
        # Without passages one plan serves all: only its prompt, set below, holds the question.
        asked = "" if self._arm is Arm.CLOSED else example.asked
        try:
            plan, hits = self._planned(asked)
        except FathomError as error:
            return FAILED, error.message
        self._document_tokens = plan.document_tokens
        self._ranked[example.id] = tuple(self._found(hit) for hit in hits[:_KEPT_HITS])
        if self._arm is Arm.FULL and plan.decision.route is not Route.FULL:
            return DOES_NOT_FIT, plan.decision.reason
        if self._arm is Arm.WINDOWED and plan.prefix is None:
            return DOES_NOT_FIT, plan.decision.reason
        if self._arm is Arm.CLOSED:
            words = [Message("system", _CLOSED_BOOK), Message("user", f"Question: {example.asked}")]
            return replace(plan, prompt=self._place.engine.encode_chat(words))
        if self._arm is Arm.QUESTION_FIRST:
            words = _question_first(plan.prompt.messages, f"Question: {example.asked.strip()}")
            return replace(plan, prompt=self._place.engine.encode_chat(words))
        return plan

    def _planned(self, asked: str) -> tuple[Plan, list[Hit]]:
        """Return the plan for a question and the ranking behind it, made once."""
        if asked not in self._plans:
            self._retriever.last_ranking = []  # a quotation is planned without one
            plan = self._service.plan(asked, [self._document], route=self._route, calibrate=True)
            self._plans[asked] = plan, self._retriever.last_ranking
        return self._plans[asked]

    def answers(
        self, numbers: Sequence[int], plans: Sequence[Plan | tuple[str, str]]
    ) -> Iterator[tuple[int, Answer | FathomError]]:
        """Yield the number and the answer of each of these examples, as they come."""
        if self._arm in (Arm.CLOSED, Arm.WINDOWED, Arm.QUESTION_FIRST):
            yield from self._written(
                {n: plan for n in numbers if isinstance(plan := plans[n], Plan)}
            )
            return
        outcomes = self._service.answer_many(
            [self._examples[number].asked for number in numbers],
            document_ids=[self._document.id],
            route=self._route,
            stop=self._stop,
        )
        for place, outcome in outcomes:
            yield numbers[place], outcome

    def row(
        self,
        example: EvalExample,
        plan: Plan | tuple[str, str],
        answer: Answer | FathomError | None,
        seconds: float,
    ) -> Row:
        """Return what came of one question."""
        outcome, reason = plan if isinstance(plan, tuple) else (ANSWERED, "")
        shown: tuple[Span, ...] | None = ()
        prompt = ""
        if isinstance(plan, Plan):
            whole = plan.decision.route is not Route.RETRIEVAL
            shown = tuple((p.passage.start, p.passage.end) for p in plan.context.passages)
            prompt = "" if whole or not plan.prompt.messages else plan.prompt.messages[-1].content
            if plan.decision.route is Route.SCAN:
                shown = ((0, self._document.num_chars),)
            elif plan.decision.mode is AnswerMode.QUOTED:
                shown = None
        if isinstance(answer, FathomError):
            outcome, reason = FAILED, answer.message
        elif isinstance(answer, Answer):
            if self._arm is Arm.FULL and answer.receipt.route is not Route.FULL:
                outcome, reason = DOES_NOT_FIT, answer.receipt.reason
            if answer.receipt.escalations:
                shown = None  # less was read than planned, or more
        elif outcome == ANSWERED:
            outcome, reason = FAILED, "no answer came"
        return Row(
            example_id=example.id,
            arm=self._arm,
            outcome=outcome,
            reason=reason,
            document=example.document,
            document_tokens=self._document_tokens,
            num_chars=self._document.num_chars,
            num_chunks=self._document.num_chunks,
            gold=spans_of(example, self._document, self._place.store),
            shown=shown,
            ranked=self._ranked.get(example.id, ()),
            prompt=prompt,
            answer=answer if isinstance(answer, Answer) and outcome == ANSWERED else None,
            verbatim=isinstance(answer, Answer)
            and citations_are_verbatim(answer, self._place.store.text),
            seconds=round(seconds, 4) if outcome == ANSWERED else 0.0,
        )

    def _found(self, hit: Hit) -> Found:
        chunk = hit.chunk
        if chunk.id not in self._tokens:
            self._tokens[chunk.id] = self._place.engine.count_tokens(chunk.chunk.text)
        return Found(
            chunk.chunk.start,
            chunk.chunk.end,
            self._tokens[chunk.id],
            chunk.chunk.ordinal,
            round(hit.lexical, 5),
            round(hit.score, 5),
        )

    def _written(self, plans: Mapping[int, Plan]) -> Iterator[tuple[int, Answer | FathomError]]:
        """Let the model write what the service would not: from nothing, or through a window."""
        numbers = list(plans)
        written: dict[int, list[str]] = {number: [] for number in numbers}
        try:
            for place, step in self._steps([plans[number] for number in numbers]):
                number = numbers[place]
                if isinstance(step, TextPiece):
                    written[number].append(step.text)
                elif isinstance(step, GenerationDone):
                    text = "".join(written.pop(number))
                    yield number, self._answer_of(text, plans[number], step, number)
        except ModelError as error:
            yield from ((number, error) for number in written)

    def _steps(self, plans: Sequence[Plan]) -> Iterator[tuple[int, GenerationStep]]:
        engine, settings = self._place.engine, self._place.settings
        prompts = [plan.prompt for plan in plans]
        if not plans:
            return
        if self._arm is not Arm.WINDOWED:
            yield from engine.generate_many(
                prompts, max_new_tokens=settings.max_new_tokens, stop=self._stop
            )
            return
        assert isinstance(engine, ReadsThroughWindow)
        assert plans[0].prefix is not None  # else the plan does not fit
        yield from engine.generate_windowed(
            prompts,
            plans[0].prefix,
            num_sinks=NUM_SINKS,
            window=settings.retrieval_tokens,
            max_new_tokens=settings.max_new_tokens,
            stop=self._stop,
        )

    def _answer_of(self, text: str, plan: Plan, done: GenerationDone, number: int) -> Answer:
        place, of = self._place, self._document
        if self._arm is Arm.CLOSED:
            read = ReadExtent(0, plan.document_tokens, 0, of.num_chunks, "nothing was read")
            decision = replace(plan.decision, reason="nothing is to be read")
        elif self._arm is Arm.QUESTION_FIRST:
            tokens, chunks = plan.context.num_tokens, plan.context.num_chunks
            read = ReadExtent(tokens, plan.document_tokens, chunks, of.num_chunks, "")
            decision = replace(plan.decision, reason="the question before the passages")
        else:
            tokens = plan.document_tokens
            read = ReadExtent(tokens, tokens, of.num_chunks, of.num_chunks, "")
            reason = f"read through a window of {place.settings.retrieval_tokens:,} tokens"
            decision = replace(plan.decision, route=Route.FULL, reason=reason)
        outcome = written_outcome(
            self._examples[number].asked,
            plan,
            read,
            text,
            done,
            None,
            store=place.store,
        )
        return finished_answer(
            outcome,
            decision,
            escalations=(),
            total_seconds=done.prefill_seconds + done.decode_seconds,
            model=place.engine.name,
            embedder=self._retriever.embedder_name,
            breadth=1,
            kv_dtype=plan.kv_dtype,
            thrift=plan.thrift,
            asked_for=None,
            standalone_question=None,
        )


def _question_first(messages: Sequence[Message], question: str) -> list[Message]:
    """Return a chat with the question before the passages that it stands behind."""
    *before, last = messages
    passages = last.content.removesuffix(question).rstrip()
    return [*before, Message(last.role, f"{question}\n\n{passages}")]


def spans_of(example: EvalExample, document: Document, store: DocumentStore) -> tuple[Span, ...]:
    """Return the evidence in characters of the document's text, whole pages included."""
    pages = {page.number: (page.start, page.end) for page in store.pages(document.id)}
    return example.evidence + tuple(pages[n] for n in example.pages if n in pages)


class ArmRetriever(Retriever):
    """A retriever that ranks a document's chunks as one arm does."""

    def __init__(
        self,
        arm: Arm,
        base: Retriever,
        store: DocumentStore,
        *,
        seed: int,
        evidence: Mapping[str, Sequence[Span]],
    ) -> None:
        """Wrap a retriever.

        Args:
            arm: how to rank.
            base: the product's; what it finds for the arms that search.
            store: the chunks of a document, for those that do not.
            seed: of the random order, which differs from question to question.
            evidence: the gold stretches of each question, which the oracle alone may see.
        """
        self._arm, self._base, self._documents = arm, base, store
        self._seed, self._evidence = seed, evidence
        self.last_ranking: list[Hit] = []

    @property
    def embedder_name(self) -> str:
        """The embedder's fingerprint, for receipts."""
        return self._base.embedder_name

    def similarities(self, question: str, texts: Sequence[str]) -> list[float]:
        """Return the cosine of the question's meaning to that of each text, -1 to 1."""
        return self._base.similarities(question, texts)

    def retrieve(
        self, question: str, documents: Sequence[Document], *, num_candidates: int
    ) -> list[Hit]:
        """Return chunks in the order of the arm, best first."""
        self.last_ranking = self._ranked(question, documents, num_candidates)
        return self.last_ranking

    def _ranked(
        self, question: str, documents: Sequence[Document], num_candidates: int
    ) -> list[Hit]:
        if self._arm is Arm.CLOSED:
            return []
        if self._arm not in (Arm.RANDOM, Arm.LAST, Arm.ORACLE):
            hits = self._base.retrieve(question, documents, num_candidates=num_candidates)
            if self._arm is Arm.LEXICAL:
                return sorted(hits, key=lambda hit: -hit.lexical)
            return sorted(hits, key=lambda hit: -hit.cosine) if self._arm is Arm.DENSE else hits
        chunks = [c for document in documents for c in self._documents.chunks_of(document.id)]
        if self._arm is Arm.RANDOM:
            Random(f"{self._seed} {question}").shuffle(chunks)
        elif self._arm is Arm.LAST:
            chunks.reverse()
        else:
            chunks = _holding(chunks, self._evidence.get(question, ()))
        return [Hit(chunk, float(-rank), 0.0, 0.0) for rank, chunk in enumerate(chunks)]


def _holding(chunks: Sequence[StoredChunk], gold: Sequence[Span]) -> list[StoredChunk]:
    """Return the chunks that overlap the gold, then those before and after them."""
    holding = {
        place
        for place, stored in enumerate(chunks)
        if any(stored.chunk.start < end and start < stored.chunk.end for start, end in gold)
    }
    beside = {place + step for place in holding for step in (-1, 1)} - holding
    return [chunks[p] for p in (*sorted(holding), *sorted(beside)) if 0 <= p < len(chunks)]


class _Unsaved(ReceiptStore):
    """Takes receipts and keeps none: the rows of a comparison hold them."""

    def __init__(self) -> None:
        pass

    def save(self, question: str, given: Answer, document_ids: Sequence[int]) -> None:
        """Do nothing."""
