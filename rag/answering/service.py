"""AnsweringService: the one door from a question to a cited answer with its receipt."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from threading import Event

from rag.answering.asked import Asked, askable
from rag.answering.conversation import Turn, stand_alone
from rag.answering.escalation import Escalation
from rag.answering.extraction import extract
from rag.answering.naming import named_documents
from rag.answering.outcome import Outcome, finished_answer, not_found, stopped_short
from rag.answering.planning import Plan, Planner
from rag.answering.quoting import quote_answer, quotes_only
from rag.answering.scan import ScanDone, frame_tokens, scan
from rag.answering.scan_receipt import (
    count_outcome,
    extracted_outcome,
    predicted_scan_seconds,
    scan_extent,
    scan_outcome,
    stride_tokens,
)
from rag.answering.table import Table
from rag.answering.writing import write
from rag.errors import EmptyLibraryError, FathomError, OutOfMemoryError, QuestionError
from rag.lm.engine import Engine, PrefillProgress, TextPiece
from rag.retrieval.retriever import Retriever
from rag.routing.utility import RouteFeatures
from rag.settings import Settings
from rag.store.calibrations import CalibrationStore
from rag.store.documents import DocumentStore
from rag.store.receipts import ReceiptStore
from rag.types import Answer, AnswerMode, Document, Receipt, Route, RouteDecision, storable

logger = logging.getLogger(__name__)

# So many questions of a table are planned before the first of them is answered: enough for the
# engine to answer many side by side, few enough that the first answers come soon.
_PLANNED_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class RouteChosen:
    """The decision, and what will be read, in words.

    It comes first; and again where another plan begins, since memory ran out or nothing was found:
    what was written until then is void.
    """

    decision: RouteDecision
    read: str


@dataclass(frozen=True, slots=True)
class QuestionRewritten:
    """A follow-up as it is asked, made to stand alone; it comes before everything else."""

    question: str


@dataclass(frozen=True, slots=True)
class AnswerReady:
    """The last event: the finished answer; its receipt is stored."""

    answer: Answer


AnswerEvent = QuestionRewritten | RouteChosen | PrefillProgress | TextPiece | AnswerReady


class AnsweringService:
    """Answers questions about the documents of one library with one model."""

    def __init__(
        self,
        store: DocumentStore,
        receipts: ReceiptStore,
        retriever: Retriever,
        engine: Engine,
        settings: Settings,
        calibrations: CalibrationStore | None = None,
    ) -> None:
        self._store = store
        self._receipts = receipts
        self._retriever = retriever
        self._engine = engine
        self._settings = settings
        self._planner = Planner(store, retriever, engine, settings, calibrations)
        self._escalation = Escalation(self._planner, settings)

    def answer(
        self,
        question: str,
        *,
        document_ids: Sequence[int] | None = None,
        route: Route | None = None,
        mode: AnswerMode | None = None,
        history: Sequence[Turn] = (),
        thrift: float | None = None,
    ) -> Answer:
        """Return the finished answer; see `stream`."""
        events = self.stream(
            question,
            document_ids=document_ids,
            route=route,
            mode=mode,
            history=history,
            thrift=thrift,
        )
        return next(event.answer for event in events if isinstance(event, AnswerReady))

    def stream(
        self,
        question: str,
        *,
        document_ids: Sequence[int] | None = None,
        route: Route | None = None,
        mode: AnswerMode | None = None,
        history: Sequence[Turn] = (),
        thrift: float | None = None,
        stop: Event | None = None,
    ) -> Iterator[AnswerEvent]:
        """Answer a question, yielding each event as it happens; AnswerReady is last.

        Args:
            question: in words.
            document_ids: the documents asked about; None asks all latest versions.
            route: the route to take if it is possible; None lets the router choose, and read more
                where nothing is found.
            mode: QUOTED to have a quotation; None lets model, question and settings decide.
            history: the conversation so far, oldest turn first; a question that leans on it is
                rewritten to stand alone, and no word of it goes into the prompt that answers.
            thrift: the probability of being right that 1,000 prompt tokens are worth, 0 to 1: with
                0 the likelier route is taken; None takes that of the settings.
            stop: set it to end the generation; what was written until then is still cited.

        Raises:
            QuestionError: if it has no word or is too long, or if no document is named.
            EmptyLibraryError: if there is no document.
            DocumentNotFoundError: if a document is gone.
            ModelError: if the model cannot read even the retrieved passages.
            OutOfMemoryError: if memory ran out with every plan.
        """
        started = time.perf_counter()
        stop = stop or Event()
        question = askable(question)
        documents = self.documents(document_ids)

        # 1. make the question stand alone; a document that it names is asked alone
        standalone = stand_alone(
            question,
            history,
            engine=self._engine,
            may_write=not quotes_only(self._engine),
            stop=stop,
        )
        if standalone != question:
            yield QuestionRewritten(standalone)
        named = named_documents(standalone, documents)

        # 2-5. count, classify, retrieve, decide, build the prompt
        plan = self._planner.plan(
            standalone, named.documents, route=route, mode=mode, calibrate=True, thrift=thrift
        )

        # 6-9. read and answer, resolve citations; read more if need be; store the receipt
        may_read_more = route is None and mode is None
        asked = Asked(question, standalone, documents, named, started, route, may_read_more)
        yield from self._answered(asked, plan, stop)

    def again(self, question: str, receipt: Receipt, document_ids: Sequence[int]) -> Answer:
        """Answer as a receipt tells: by the last plan that was tried, and no other.

        Args:
            question: as it was typed.
            receipt: of the past answer.
            document_ids: what it was asked of.

        Raises:
            DocumentNotFoundError: if a document is gone.
        """
        started = time.perf_counter()
        documents = self.documents(document_ids)
        standalone = receipt.standalone_question or question
        named = named_documents(standalone, documents)
        is_quoted = receipt.mode is AnswerMode.QUOTED
        plan = self._planner.plan(
            standalone,
            named.documents,
            route=None if is_quoted else receipt.route,
            mode=receipt.mode if is_quoted else None,
            calibrate=True,
            breadth=receipt.breadth,
            kv_dtype=receipt.kv_dtype,
            thrift=receipt.thrift,
        )
        asked = Asked(question, standalone, documents, named, started, receipt.asked_for, False)
        return self._last(self._answered(asked, plan, Event()))

    def answer_many(
        self,
        questions: Sequence[str],
        *,
        document_ids: Sequence[int] | None = None,
        route: Route | None = None,
        stop: Event | None = None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Iterator[tuple[int, Answer | FathomError]]:
        """Answer a table of questions about the same documents, side by side where memory allows.

        Each has its receipt stored, as if it had been asked alone; what it waited for others counts
        in its total seconds. In float32 the texts are those of `answer`; in 16 bits a batch rounds
        otherwise, and a close choice of a word may fall the other way.

        Args:
            questions: in words.
            document_ids: the documents asked about; None asks all latest versions.
            route: the route to take where it is possible; None lets the router choose.
            stop: set it to end; a question that is not answered by then is not yielded.
            on_progress: called with the questions done and all of them.

        Yields:
            The number of a question from 0, and its answer or why it has none, as they come.

        Raises:
            QuestionError: if no document is named.
            EmptyLibraryError: if there is no document.
            DocumentNotFoundError: if a document is gone.
        """
        stop = stop or Event()
        documents = self.documents(document_ids)
        table = Table(
            self._planner,
            self._store,
            max_new_tokens=self._settings.max_new_tokens,
            answered=lambda asked, plan, stop, outcome: (
                event.answer
                for event in self._answered(asked, plan, stop, outcome)
                if isinstance(event, AnswerReady)
            ),
        )
        num_done = 0
        for begin in range(0, len(questions), _PLANNED_AT_ONCE):
            numbers = range(begin, min(begin + _PLANNED_AT_ONCE, len(questions)))
            some = {number: questions[number] for number in numbers}
            for number, outcome in table.answer(some, documents, route, stop):
                num_done += 1
                on_progress(num_done, len(questions))
                yield number, outcome

    def plan(
        self,
        question: str,
        documents: Sequence[Document],
        *,
        route: Route | None = None,
        mode: AnswerMode | None = None,
        calibrate: bool = False,
        thrift: float | None = None,
    ) -> Plan:
        """Return what would be done with a question; see `Planner.plan`."""
        question = storable(question)
        return self._planner.plan(
            question,
            named_documents(question, documents).documents,
            route=route,
            mode=mode,
            calibrate=calibrate,
            thrift=thrift,
        )

    def features(self, question: str, documents: Sequence[Document]) -> RouteFeatures:
        """Return what the router knows of a question before it is answered."""
        return self._planner.features(question, documents)

    def longest_context_tokens(self) -> int | None:
        """Return the longest prompt and answer that fit here, in tokens; None without a limit."""
        return self._planner.longest_context_tokens()

    def documents(self, document_ids: Sequence[int] | None = None) -> list[Document]:
        """Return the documents asked about; None means the latest version of all.

        Raises:
            QuestionError: if no document is named.
            EmptyLibraryError: if there is none to name.
            DocumentNotFoundError: if one of the ids is unknown.
        """
        if document_ids is not None:
            if not document_ids:
                raise QuestionError(
                    "no document is asked: the list of them is empty, or the collection is",
                    hint="name documents, or leave the list out to ask all",
                )
            return self._store.with_ids(document_ids)
        documents = self._store.all()
        if not documents:
            raise EmptyLibraryError(
                "the library holds no document to ask about",
                hint="add one first: fathom ingest PATH, or fathom ingest --sample",
            )
        return documents

    # ---- one question ---------------------------------------------------------------------------

    def _answered(
        self, asked: Asked, plan: Plan, stop: Event, outcome: Outcome | None = None
    ) -> Iterator[AnswerEvent]:
        """Try a plan; where memory runs out a smaller one, where nothing is found a larger one.

        `outcome` is what the plan came to if it has been tried already. AnswerReady is missing
        where a stop came before a whole answer that was asked for.
        """
        given_up: list[str] = []
        is_half = False
        num_further, may_read_more = 0, asked.may_read_more
        while True:
            problem = ""
            if outcome is None:
                yield RouteChosen(plan.decision, self._what_is_read(asked, plan))
                try:
                    for event in self._tried(asked, plan, stop):
                        if isinstance(event, Outcome):
                            outcome, is_half = event, stop.is_set()
                        else:
                            yield event
                except OutOfMemoryError as error:
                    problem = error.message
            next_plan: Plan | None
            # Out here, where the error that held the pass's tensors is gone.
            if outcome is None:
                next_plan, words = self._escalation.smaller(
                    asked.question, asked.documents, plan, problem
                )
                logger.warning("%s", words)
                may_read_more = False
            elif outcome.is_answer or asked.asked_for is not None:
                break
            elif stop.is_set():  # more would have been read
                is_half = True
                break
            else:
                outcome = not_found(outcome)
                if not may_read_more or num_further == self._settings.escalations:
                    break
                next_plan, words = self._escalation.further(
                    asked.question, asked.documents, plan, outcome.read
                )
                if next_plan is None:
                    outcome = replace(outcome, notes=(*outcome.notes, words))
                    break
                num_further += 1
            given_up.append(words)
            plan, outcome = next_plan, None
        if is_half:
            outcome = stopped_short(outcome)
        if asked.keeps_half or not is_half:
            yield AnswerReady(self._stored(asked, plan, outcome, given_up))

    def _tried(
        self, asked: Asked, plan: Plan, stop: Event
    ) -> Iterator[PrefillProgress | TextPiece | Outcome]:
        """Answer by a plan, in one of five ways; the Outcome is last."""
        question, documents = asked.question, asked.documents
        if plan.counted:
            yield count_outcome(plan.counted, self._planner.read_extent(plan, documents))
        elif plan.is_extracted:
            begun = time.perf_counter()
            found = extract(question, documents, store=self._store, stop=stop)
            seconds = time.perf_counter() - begun
            yield extracted_outcome(found, documents, plan.document_tokens, seconds=seconds)
        elif plan.decision.mode is AnswerMode.QUOTED:
            yield quote_answer(
                question,
                documents,
                store=self._store,
                retriever=self._retriever,
                engine=self._engine,
                settings=self._settings,
                document_tokens=plan.document_tokens,
                breadth=plan.breadth,
                stop=stop,
            )
        elif plan.decision.route is Route.SCAN:
            frame = frame_tokens(self._engine, question, plan.decision.question_class)
            for event in scan(
                question,
                plan.decision.question_class,
                documents,
                store=self._store,
                engine=self._engine,
                stride_tokens=stride_tokens(self._planner.limits(), frame),
                retrieval_tokens=self._settings.retrieval_tokens,
                max_new_tokens=self._settings.max_new_tokens,
                stop=stop,
            ):
                if isinstance(event, ScanDone):
                    read = scan_extent(event, documents, plan.document_tokens)
                    yield scan_outcome(
                        event,
                        read,
                        plan.decision,
                        self._engine.spec,
                        retrieve_seconds=plan.retrieve_seconds,
                    )
                else:
                    yield event
        else:
            yield from write(
                question,
                plan,
                self._planner.read_extent(plan, documents),
                store=self._store,
                predicted_seconds=self._planner.predicted_seconds(
                    plan.prompt, plan.prefix, engine=plan.engine
                ),
                max_new_tokens=self._settings.max_new_tokens,
                stop=stop,
            )

    def _what_is_read(self, asked: Asked, plan: Plan) -> str:
        """Return what is about to be read, in words."""
        named = f"; {asked.named.words}" if asked.named.words else ""
        if plan.is_extracted:
            return f"every sentence, without the model{named}"
        if plan.decision.mode is AnswerMode.QUOTED:
            return f"the sentences found{named}"
        read = self._planner.read_extent(plan, asked.documents)
        words = f"{read.tokens:,} of {read.of_tokens:,} tokens{named}"
        if plan.decision.route is not Route.SCAN or plan.counted:
            return words
        seconds = predicted_scan_seconds(plan.decision)
        return f"{words}, in windows" + ("" if seconds is None else f", about {seconds:,.0f} s")

    def _stored(
        self, asked: Asked, plan: Plan, outcome: Outcome, given_up: Sequence[str]
    ) -> Answer:
        """Return the answer, once its receipt is stored."""
        answer = finished_answer(
            outcome,
            plan.decision,
            escalations=given_up,
            total_seconds=time.perf_counter() - asked.started,
            model=self._engine.name,
            embedder=self._retriever.embedder_name,
            breadth=plan.breadth,
            kv_dtype=plan.kv_dtype,
            thrift=plan.thrift,
            asked_for=asked.asked_for,
            standalone_question=None if asked.question == asked.typed else asked.question,
            named=asked.named.words,
        )
        self._receipts.save(asked.typed, answer, [document.id for document in asked.about])
        logger.info(
            "answered by %s: %d prompt tokens, %d new, %.1f s",
            answer.receipt.route,
            answer.receipt.prompt_tokens,
            answer.receipt.new_tokens,
            answer.receipt.seconds.total,
        )
        return answer

    @staticmethod
    def _last(events: Iterator[AnswerEvent]) -> Answer:
        return next(event.answer for event in events if isinstance(event, AnswerReady))
