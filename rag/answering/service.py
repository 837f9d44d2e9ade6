"""AnsweringService: the one door from a question to a cited answer with its receipt."""

import hashlib
import json
import logging
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Event

from rag.answering.citations import nearest_citation, resolve_citations
from rag.answering.context import Context, full_context, retrieved_context
from rag.answering.prompt import CANNOT_ANSWER, build_messages, is_refusal
from rag.errors import EmptyLibraryError
from rag.lm.engine import DocumentPrefix, Engine, GenerationDone, PrefillProgress, TextPiece
from rag.lm.kv_bytes import kv_cache_bytes, longest_within
from rag.lm.positions import position_limit
from rag.retrieval.retriever import Retriever
from rag.routing.gates import Limits, Need, check_gates
from rag.routing.question_class import classify_question
from rag.routing.router import decide_route
from rag.settings import Settings
from rag.store.documents import DocumentStore
from rag.store.receipts import ReceiptStore
from rag.types import (
    Answer,
    Document,
    Gate,
    KVBytes,
    ReadExtent,
    Receipt,
    Route,
    RouteDecision,
    Seconds,
)

logger = logging.getLogger(__name__)

# A document this many times longer than the model's context is not tokenised with the template
# around it to be told that it does not fit; its own exact count is enough.
FAR_TOO_LONG = 2

# Two questions that begin differently: what their prompts share depends on the documents alone.
_PROBES = ("A", "1")

# What stands before the quotation of an answer that has no other.
NEAREST = "The nearest sentence found:"


@dataclass(frozen=True, slots=True)
class RouteChosen:
    """The first event: the decision, and what will be read, in words."""

    decision: RouteDecision
    read: str


@dataclass(frozen=True, slots=True)
class AnswerReady:
    """The last event: the finished answer; its receipt is stored."""

    answer: Answer


AnswerEvent = RouteChosen | PrefillProgress | TextPiece | AnswerReady


@dataclass(frozen=True, slots=True)
class Plan:
    """What would be done with a question, before the model reads a token.

    `prefix` is the part of the prompt that another question would share, None if it is not kept.
    """

    decision: RouteDecision
    context: Context
    prompt_ids: tuple[int, ...]
    prefix: DocumentPrefix | None
    document_tokens: int
    retrieve_seconds: float


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

    def answer(
        self,
        question: str,
        *,
        document_ids: Sequence[int] | None = None,
        route: Route | None = None,
    ) -> Answer:
        """Return the finished answer; see `stream`."""
        events = self.stream(question, document_ids=document_ids, route=route)
        return next(event.answer for event in events if isinstance(event, AnswerReady))

    def stream(
        self,
        question: str,
        *,
        document_ids: Sequence[int] | None = None,
        route: Route | None = None,
        stop: Event | None = None,
    ) -> Iterator[AnswerEvent]:
        """Answer a question, yielding each event as it happens; AnswerReady is last.

        Args:
            question: in words.
            document_ids: the documents asked about; None asks all latest versions.
            route: the route to take if it is possible; None lets the router choose.
            stop: set it to end the generation; what was written until then is still cited.

        Raises:
            EmptyLibraryError: if there is no document, or no question.
            DocumentNotFoundError: if a document is gone.
            ModelError: if the model cannot read even the retrieved passages.
        """
        started = time.perf_counter()
        documents = self.documents(document_ids)

        # 1-5. count, classify, retrieve, decide, build the prompt
        plan = self.plan(question, documents, route=route, calibrate=True)
        read = self._read_extent(plan, documents)
        yield RouteChosen(plan.decision, f"{read.tokens:,} of {read.of_tokens:,} tokens")

        # 6. generate
        written: list[str] = []
        done: GenerationDone | None = None
        predicted_seconds = self._predicted_seconds(list(plan.prompt_ids), plan.prefix)
        steps = self._engine.generate(
            list(plan.prompt_ids),
            max_new_tokens=self._settings.max_new_tokens,
            stop=stop or Event(),
            prefix=plan.prefix,
        )
        for step in steps:
            if isinstance(step, GenerationDone):
                done = step
                continue
            if isinstance(step, TextPiece):
                written.append(step.text)
            yield step
        assert done is not None  # the engine's contract

        # 7. resolve citations to verbatim spans
        text = "".join(written).strip()
        cited = resolve_citations(text, question, plan.context.passages, self._store)
        abstained = not cited.text or is_refusal(text)
        shown, citations = cited.text, cited.citations
        if abstained or not citations:
            shown, citations = CANNOT_ANSWER if abstained else cited.text, ()
            if nearest := nearest_citation(question, plan.context.passages, self._store):
                shown, citations = f"{shown} {NEAREST} [1]", (nearest,)

        # 8. store the receipt
        answer = Answer(
            answer=shown,
            abstained=abstained,
            citations=citations,
            receipt=Receipt(
                id=uuid.uuid4().hex[:12],
                route=plan.decision.route,
                reason=plan.decision.reason,
                question_class=plan.decision.question_class,
                gates=plan.decision.gates,
                read=read,
                prompt_tokens=done.prompt_tokens,
                cached_tokens=done.reused_tokens,
                new_tokens=done.new_tokens,
                kv_bytes=KVBytes(
                    predicted=kv_cache_bytes(self._engine.spec, done.kv_tokens),
                    actual=done.kv_bytes,
                ),
                seconds=Seconds(
                    retrieve=round(plan.retrieve_seconds, 4),
                    prefill=round(done.prefill_seconds, 4),
                    prefill_predicted=round(predicted_seconds, 4),
                    decode=round(done.decode_seconds, 4),
                    total=round(time.perf_counter() - started, 4),
                ),
                escalations=(),
                model=self._engine.name,
                embedder=self._retriever.embedder_name,
                prompt_sha256=hashlib.sha256(json.dumps(plan.prompt_ids).encode()).hexdigest(),
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
        yield AnswerReady(answer)

    def plan(
        self,
        question: str,
        documents: Sequence[Document],
        *,
        route: Route | None = None,
        calibrate: bool = False,
    ) -> Plan:
        """Return what would be done with a question; the model reads nothing.

        Args:
            question: in words; an empty one plans for the documents alone.
            documents: those asked about.
            route: a route asked for.
            calibrate: measure the prefill rate, which loads the weights, to have that gate too.
        """
        settings, engine = self._settings, self._engine
        document_tokens = self._document_tokens(documents)

        retrieve_started = time.perf_counter()
        hits = self._retriever.retrieve(question, documents, num_candidates=settings.num_candidates)
        passages = retrieved_context(
            hits,
            documents,
            store=self._store,
            count_tokens=engine.count_tokens,
            token_budget=settings.retrieval_tokens,
        )
        retrieve_seconds = time.perf_counter() - retrieve_started
        retrieval_ids = engine.encode_chat(build_messages(question, passages.passages))

        limits = self._limits()
        context_tokens = limits.context_tokens or document_tokens
        everything: Context | None = None
        full_ids: list[int] = []
        prefix: DocumentPrefix | None = None
        full_tokens = document_tokens + engine.count_tokens(question)
        if document_tokens <= FAR_TOO_LONG * context_tokens:
            everything = full_context(
                documents, store=self._store, count_tokens=engine.count_tokens
            )
            full_ids = engine.encode_chat(build_messages(question, everything.passages))
            full_tokens = len(full_ids)
            prefix = self._document_prefix(everything, full_ids, documents)

        gates: list[Gate] = []
        for kind, num_tokens in ((Route.FULL, full_tokens), (Route.RETRIEVAL, len(retrieval_ids))):
            needs_time = calibrate and kind is Route.FULL
            gates += check_gates(
                Need(kind, num_tokens, settings.max_new_tokens),
                engine.spec,
                limits,
                predicted_prefill_seconds=(
                    self._predicted_seconds(full_ids, prefix, num_tokens=num_tokens)
                    if needs_time
                    else None
                ),
            )
        decision = decide_route(
            tuple(gates),
            classify_question(question),
            document_tokens=document_tokens,
            retrieval_tokens=settings.retrieval_tokens,
            asked_for=route,
        )
        if decision.route is Route.FULL:
            assert everything is not None  # only what was counted exactly can pass the gates
            ids, context = full_ids, everything
        else:
            ids, context, prefix = retrieval_ids, passages, None
        return Plan(decision, context, tuple(ids), prefix, document_tokens, retrieve_seconds)

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

    def longest_context_tokens(self) -> int:
        """Return the longest prompt and answer together that pass the exact gates here, in tokens.

        Prefill time is not among them: see `plan`.
        """
        limits = self._limits()
        by_memory = longest_within(self._engine.spec, limits.kv_bytes)
        return min(by_memory, limits.context_tokens or by_memory)

    def _document_prefix(
        self, everything: Context, prompt_ids: list[int], documents: Sequence[Document]
    ) -> DocumentPrefix:
        """Return the tokens that this prompt shares with those of two other questions."""
        prompts = [prompt_ids] + [
            self._engine.encode_chat(build_messages(probe, everything.passages))
            for probe in _PROBES
        ]
        shared = 0
        for ids in zip(*prompts, strict=False):
            if len(set(ids)) > 1:
                break
            shared += 1
        return DocumentPrefix(shared, tuple(document.version_key for document in documents))

    def _predicted_seconds(
        self, prompt_ids: list[int], prefix: DocumentPrefix | None, *, num_tokens: int | None = None
    ) -> float:
        """Return the predicted seconds until a prompt is in the cache, loading what is kept too.

        `num_tokens` is its length where it was not written out, being far too long.
        """
        return self._engine.load_seconds(
            prompt_ids, prefix
        ) + self._engine.predicted_prefill_seconds(
            num_tokens or len(prompt_ids),
            cached_tokens=self._engine.cached_tokens(prompt_ids, prefix),
        )

    def _document_tokens(self, documents: Sequence[Document]) -> int:
        """Return the documents' length in the model's tokens, counted once and remembered."""
        tokenizer = self._engine.tokenizer_id
        counts = self._store.token_counts([d.id for d in documents], tokenizer)
        for document in documents:
            if document.id not in counts:
                counts[document.id] = self._engine.count_tokens(self._store.text(document.id))
                self._store.save_token_count(document.id, tokenizer, counts[document.id])
        return sum(counts.values())

    def _limits(self) -> Limits:
        caps = [self._settings.max_context_tokens, position_limit(self._engine.spec)]
        return Limits(
            context_tokens=min((cap for cap in caps if cap is not None), default=None),
            kv_bytes=max(0, self._engine.free_bytes() - self._settings.kv_reserve_bytes),
            prefill_seconds=self._settings.prefill_deadline_seconds,
        )

    def _read_extent(self, plan: Plan, documents: Sequence[Document]) -> ReadExtent:
        of_chunks = sum(document.num_chunks for document in documents)
        num_tokens = min(plan.context.num_tokens, plan.document_tokens)
        if plan.decision.route is Route.FULL:
            return ReadExtent(plan.document_tokens, plan.document_tokens, of_chunks, of_chunks, "")
        left_out = of_chunks - plan.context.num_chunks
        return ReadExtent(
            tokens=num_tokens,
            of_tokens=plan.document_tokens,
            chunks=plan.context.num_chunks,
            of_chunks=of_chunks,
            not_read=f"{left_out:,} of {of_chunks:,} chunks, about"
            f" {plan.document_tokens - num_tokens:,} tokens, were not shown to the model"
            if left_out
            else "",
        )
