"""AnsweringService: the one door from a question to a cited answer with its receipt."""

import hashlib
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from threading import Event

from rag.answering.citations import nearest_citation, resolve_citations
from rag.answering.counting import Counted
from rag.answering.planning import Plan, Planner
from rag.answering.prompt import CANNOT_ANSWER, is_refusal
from rag.answering.quoting import quoted_answer
from rag.answering.scan import ScanDone, scan
from rag.answering.scan_receipt import (
    answer_by_count,
    predicted_scan_seconds,
    scan_answer,
    scan_extent,
    stride_tokens,
)
from rag.errors import EmptyLibraryError, FathomError, ModelError, OutOfMemoryError
from rag.lm.engine import DocumentPrefix, Engine, GenerationDone, PrefillProgress, Prompt, TextPiece
from rag.lm.kv_bytes import kv_cache_bytes
from rag.retrieval.retriever import Retriever
from rag.settings import Settings
from rag.store.documents import DocumentStore
from rag.store.receipts import ReceiptStore
from rag.types import (
    Answer,
    AnswerMode,
    Document,
    KVBytes,
    Receipt,
    Route,
    RouteDecision,
    Seconds,
)

logger = logging.getLogger(__name__)

# So many questions of a table are planned before the first of them is answered: enough for the
# engine to answer many side by side, few enough that the first answers come soon.
_PLANNED_AT_ONCE = 32

# What stands before the quotation of an answer that has no other.
NEAREST = "The nearest sentence found:"


@dataclass(frozen=True, slots=True)
class RouteChosen:
    """The decision, and what will be read, in words.

    It comes first; and again where memory ran out and the next smaller plan begins, so that what
    was written until then is void.
    """

    decision: RouteDecision
    read: str


@dataclass(frozen=True, slots=True)
class AnswerReady:
    """The last event: the finished answer; its receipt is stored."""

    answer: Answer


AnswerEvent = RouteChosen | PrefillProgress | TextPiece | AnswerReady


class AnsweringService:
    """Answers questions about the documents of one library with one model."""

    def __init__(
        self,
        store: DocumentStore,
        receipts: ReceiptStore,
        retriever: Retriever,
        engine: Engine,
        settings: Settings,
    ) -> None:
        self._store = store
        self._receipts = receipts
        self._retriever = retriever
        self._engine = engine
        self._settings = settings
        self._planner = Planner(store, retriever, engine, settings)

    def answer(
        self,
        question: str,
        *,
        document_ids: Sequence[int] | None = None,
        route: Route | None = None,
        mode: AnswerMode | None = None,
    ) -> Answer:
        """Return the finished answer; see `stream`."""
        events = self.stream(question, document_ids=document_ids, route=route, mode=mode)
        return next(event.answer for event in events if isinstance(event, AnswerReady))

    def stream(
        self,
        question: str,
        *,
        document_ids: Sequence[int] | None = None,
        route: Route | None = None,
        mode: AnswerMode | None = None,
        stop: Event | None = None,
    ) -> Iterator[AnswerEvent]:
        """Answer a question, yielding each event as it happens; AnswerReady is last.

        Args:
            question: in words.
            document_ids: the documents asked about; None asks all latest versions.
            route: the route to take if it is possible; None lets the router choose.
            mode: QUOTED to have a quotation; None lets model, question and settings decide.
            stop: set it to end the generation; what was written until then is still cited.

        Raises:
            EmptyLibraryError: if there is no document, or no question.
            DocumentNotFoundError: if a document is gone.
            ModelError: if the model cannot read even the retrieved passages.
            OutOfMemoryError: if memory ran out with every plan.
        """
        started = time.perf_counter()
        stop = stop or Event()
        documents = self.documents(document_ids)

        # 1-5. count, classify, retrieve, decide, build the prompt
        plan = self._planner.plan(question, documents, route=route, mode=mode, calibrate=True)

        # 6-8. read and answer, resolve citations, store the receipt: in one of four ways
        if plan.counted:
            yield from self._count(question, documents, plan, plan.counted, started)
        elif plan.decision.mode is AnswerMode.QUOTED:
            yield from self._quote(question, documents, plan, stop)
        elif plan.decision.route is Route.SCAN:
            yield from self._scan(question, documents, plan, stop, started)
        else:
            yield from self._write(question, documents, plan, stop, started)

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
            EmptyLibraryError: if there is no document.
            DocumentNotFoundError: if a document is gone.
        """
        stop = stop or Event()
        documents = self.documents(document_ids)
        num_done = 0
        for begin in range(0, len(questions), _PLANNED_AT_ONCE):
            numbers = range(begin, min(begin + _PLANNED_AT_ONCE, len(questions)))
            for number, outcome in self._answer_some(numbers, questions, documents, route, stop):
                num_done += 1
                on_progress(num_done, len(questions))
                yield number, outcome

    def _answer_some(
        self,
        numbers: Sequence[int],
        questions: Sequence[str],
        documents: Sequence[Document],
        route: Route | None,
        stop: Event,
    ) -> Iterator[tuple[int, Answer | FathomError]]:
        """Plan these questions, then answer together those whose prompts begin with the same."""
        started = {number: time.perf_counter() for number in numbers}
        groups: dict[DocumentPrefix | None, dict[int, Plan]] = {}
        for number in numbers:
            if stop.is_set():
                return
            started[number] = time.perf_counter()
            try:
                plan = self._planner.plan(questions[number], documents, route=route, calibrate=True)
                if not plan.is_written:  # nothing to share with others
                    yield number, self._answer_alone(questions[number], documents, route, stop)
                    continue
            except FathomError as error:
                yield number, error
            else:
                groups.setdefault(plan.prefix, {})[number] = plan
        for prefix, plans in groups.items():
            left = dict(plans)
            try:
                for number, text, done, predicted_seconds in self._generate_group(
                    plans, prefix, stop
                ):
                    plan = left.pop(number)
                    if not done.stopped:
                        yield (
                            number,
                            self._finished(
                                questions[number],
                                documents,
                                plan,
                                text,
                                done,
                                predicted_prefill_seconds=predicted_seconds,
                                total_seconds=time.perf_counter() - started[number],
                                escalations=[],
                            ),
                        )
            except ModelError as error:
                logger.warning("questions asked together are asked one by one: %s", error.message)
            for number in left:
                if stop.is_set():
                    return
                try:
                    yield number, self._answer_alone(questions[number], documents, route, stop)
                except FathomError as error:
                    yield number, error

    def _generate_group(
        self, plans: dict[int, Plan], prefix: DocumentPrefix | None, stop: Event
    ) -> Iterator[tuple[int, str, GenerationDone, float | None]]:
        """Yield number, text, last step and predicted prefill seconds of each plan as it ends."""
        numbers = list(plans)
        prompts = [plans[number].prompt for number in numbers]
        predict = self._engine.predicted_prefill_seconds
        # Before the first answer, since each may mend the rate.
        alone = [predict(prompt.num_tokens) for prompt in prompts]
        kept = prefix.num_tokens if prefix else 0
        rest = [predict(prompt.num_tokens, cached_tokens=kept) for prompt in prompts]
        written: list[list[str]] = [[] for _ in numbers]
        for index, step in self._engine.generate_many(
            prompts, max_new_tokens=self._settings.max_new_tokens, stop=stop, prefix=prefix
        ):
            if isinstance(step, TextPiece):
                written[index].append(step.text)
            elif isinstance(step, GenerationDone):
                seconds = rest[index] if step.reused_tokens else alone[index]
                yield numbers[index], "".join(written[index]), step, seconds

    def plan(
        self,
        question: str,
        documents: Sequence[Document],
        *,
        route: Route | None = None,
        mode: AnswerMode | None = None,
        calibrate: bool = False,
    ) -> Plan:
        """Return what would be done with a question; see `Planner.plan`."""
        return self._planner.plan(question, documents, route=route, mode=mode, calibrate=calibrate)

    def longest_context_tokens(self) -> int | None:
        """Return the longest prompt and answer that fit here, in tokens; None without a limit."""
        return self._planner.longest_context_tokens()

    def _write(
        self,
        question: str,
        documents: Sequence[Document],
        plan: Plan,
        stop: Event,
        started: float,
        escalations: Sequence[str] = (),
    ) -> Iterator[AnswerEvent]:
        """Let the model read the prompt and write; where memory runs out, read less."""
        escalations = list(escalations)
        while True:
            read = self._planner.read_extent(plan, documents)
            yield RouteChosen(plan.decision, f"{read.tokens:,} of {read.of_tokens:,} tokens")
            predicted_seconds = self._planner.predicted_seconds(plan.prompt, plan.prefix)
            written: list[str] = []
            done: GenerationDone | None = None
            try:
                for step in self._engine.generate(
                    plan.prompt,
                    max_new_tokens=self._settings.max_new_tokens,
                    stop=stop,
                    prefix=plan.prefix,
                ):
                    if isinstance(step, GenerationDone):
                        done = step
                        continue
                    if isinstance(step, TextPiece):
                        written.append(step.text)
                    yield step
            except OutOfMemoryError as error:
                problem = error.message
            if done is not None:
                break
            # Out here, where the error that held the pass's tensors is gone.
            plan, words = self._planner.smaller(question, documents, plan, problem)
            escalations.append(words)
            logger.warning("%s", words)
        answer = self._finished(
            question,
            documents,
            plan,
            "".join(written),
            done,
            predicted_prefill_seconds=predicted_seconds,
            total_seconds=time.perf_counter() - started,
            escalations=escalations,
        )
        yield AnswerReady(answer)

    def _quote(
        self, question: str, documents: Sequence[Document], plan: Plan, stop: Event
    ) -> Iterator[AnswerEvent]:
        """Quote word for word, where the model is not to be trusted with words of its own."""
        yield RouteChosen(plan.decision, "the sentences found")
        answer = quoted_answer(
            question,
            documents,
            plan.decision,
            store=self._store,
            retriever=self._retriever,
            engine=self._engine,
            settings=self._settings,
            document_tokens=plan.document_tokens,
            stop=stop,
        )
        self._receipts.save(question, answer, [document.id for document in documents])
        yield AnswerReady(answer)

    def _count(
        self,
        question: str,
        documents: Sequence[Document],
        plan: Plan,
        counted: Counted,
        started: float,
    ) -> Iterator[AnswerEvent]:
        """Give the number that the text itself proves; no model reads a token."""
        read = self._planner.read_extent(plan, documents)
        yield RouteChosen(plan.decision, f"{read.tokens:,} of {read.of_tokens:,} tokens")
        answer = answer_by_count(
            counted,
            plan.decision,
            read,
            total_seconds=time.perf_counter() - started,
            model=self._engine.name,
            embedder=self._retriever.embedder_name,
        )
        self._receipts.save(question, answer, [document.id for document in documents])
        yield AnswerReady(answer)

    def _scan(
        self,
        question: str,
        documents: Sequence[Document],
        plan: Plan,
        stop: Event,
        started: float,
    ) -> Iterator[AnswerEvent]:
        """Read everything once, window by window; see `rag.answering.scan`."""
        seconds = predicted_scan_seconds(plan.decision)
        tokens = f"{plan.document_tokens:,} of {plan.document_tokens:,} tokens, in windows"
        yield RouteChosen(
            plan.decision, tokens if seconds is None else f"{tokens}, about {seconds:,.0f} s"
        )
        done: ScanDone | None = None
        try:
            for event in scan(
                question,
                plan.decision.question_class,
                documents,
                store=self._store,
                engine=self._engine,
                stride_tokens=stride_tokens(self._planner.limits()),
                retrieval_tokens=self._settings.retrieval_tokens,
                max_new_tokens=self._settings.max_new_tokens,
                stop=stop,
            ):
                if isinstance(event, ScanDone):
                    done = event
                else:
                    yield event
        except OutOfMemoryError as error:
            problem = error.message
        if done is None:
            smaller, words = self._planner.smaller(question, documents, plan, problem)
            logger.warning("%s", words)
            yield from self._write(question, documents, smaller, stop, started, [words])
            return
        answer = scan_answer(
            done,
            plan.decision,
            scan_extent(done, documents, plan.document_tokens, self._engine.count_tokens),
            engine=self._engine,
            retrieve_seconds=plan.retrieve_seconds,
            total_seconds=time.perf_counter() - started,
            embedder=self._retriever.embedder_name,
        )
        self._receipts.save(question, answer, [document.id for document in documents])
        yield AnswerReady(answer)

    def documents(self, document_ids: Sequence[int] | None = None) -> list[Document]:
        """Return the documents asked about; None means the latest version of all.

        Raises:
            EmptyLibraryError: if there is none.
            DocumentNotFoundError: if one of the ids is unknown.
        """
        if document_ids is None:
            documents = self._store.all()
        else:
            documents = [self._store.find(str(i)) for i in dict.fromkeys(document_ids)]
        if not documents:
            raise EmptyLibraryError(
                "the library holds no document to ask about",
                hint="add one first: fathom ingest PATH, or fathom ingest --sample",
            )
        return documents

    def _finished(
        self,
        question: str,
        documents: Sequence[Document],
        plan: Plan,
        text: str,
        done: GenerationDone,
        *,
        predicted_prefill_seconds: float | None,
        total_seconds: float,
        escalations: Sequence[str],
    ) -> Answer:
        """Return the answer with its citations resolved, once its receipt is stored."""
        # Resolve citations to verbatim spans.
        text = text.strip()
        cited = resolve_citations(text, question, plan.context.passages, self._store)
        abstained = not cited.text or is_refusal(text)
        shown, citations = cited.text, cited.citations
        if abstained or not citations:
            shown, citations = CANNOT_ANSWER if abstained else cited.text, ()
            if nearest := nearest_citation(question, plan.context.passages, self._store):
                shown, citations = f"{shown} {NEAREST} [1]", (nearest,)

        # Store the receipt.
        spec, predicted_bytes = self._engine.spec, None
        if spec is not None and done.kv_tokens is not None:
            predicted_bytes = kv_cache_bytes(spec, done.kv_tokens)
        predicted_seconds = predicted_prefill_seconds
        reason = plan.decision.reason
        if done.is_cut_off:
            reason += f"; the answer was cut off at its limit of {done.new_tokens:,} tokens"
        answer = Answer(
            answer=shown,
            abstained=abstained,
            citations=citations,
            receipt=Receipt(
                id=uuid.uuid4().hex[:12],
                route=plan.decision.route,
                reason=reason,
                question_class=plan.decision.question_class,
                gates=plan.decision.gates,
                read=self._planner.read_extent(plan, documents),
                prompt_tokens=done.prompt_tokens,
                cached_tokens=done.reused_tokens,
                new_tokens=done.new_tokens,
                kv_bytes=KVBytes(predicted=predicted_bytes, actual=done.kv_bytes),
                seconds=Seconds(
                    retrieve=round(plan.retrieve_seconds, 4),
                    prefill=round(done.prefill_seconds, 4),
                    prefill_predicted=(
                        None if predicted_seconds is None else round(predicted_seconds, 4)
                    ),
                    decode=round(done.decode_seconds, 4),
                    total=round(total_seconds, 4),
                ),
                escalations=tuple(escalations),
                model=self._engine.name,
                embedder=self._retriever.embedder_name,
                class_reason=plan.decision.class_reason,
                prompt_sha256=_prompt_sha256(plan.prompt),
            ),
        )
        self._receipts.save(question, answer, [document.id for document in documents])
        logger.info(
            "answered by %s: %d prompt tokens, %d new, %.1f s",
            answer.receipt.route,
            done.prompt_tokens,
            done.new_tokens,
            answer.receipt.seconds.total,
        )
        return answer

    def _answer_alone(
        self, question: str, documents: Sequence[Document], route: Route | None, stop: Event
    ) -> Answer:
        ids = [document.id for document in documents]
        events = self.stream(question, document_ids=ids, route=route, stop=stop)
        return next(event.answer for event in events if isinstance(event, AnswerReady))


def _prompt_sha256(prompt: Prompt) -> str:
    """Return the checksum of the prompt's tokens, or of its messages where a server counts them."""
    content = prompt.ids or [[message.role, message.content] for message in prompt.messages]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
