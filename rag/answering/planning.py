"""From a question to a plan: count, classify, retrieve, check the gates, choose, build the prompt.

The model reads nothing here.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from rag.answering.context import Context, full_context
from rag.answering.counting import Counted, count_from_text
from rag.answering.fitting import fitting_passages
from rag.answering.prompt import build_messages
from rag.answering.quoting import decide_quotation
from rag.answering.scan import frame_tokens
from rag.answering.scan_receipt import scan_gates
from rag.lm.catalog import load_catalog
from rag.lm.engine import DocumentPrefix, Engine, Prompt, model_named
from rag.retrieval.retriever import Hit, Retriever
from rag.routing.gates import Limits, Need, check_gates, failed, hard
from rag.routing.model_plan import longest_context
from rag.routing.question_class import NEEDS_EVERYTHING, classify_question
from rag.routing.router import counted_decision, decide_route
from rag.routing.utility import (
    NUM_HITS,
    RouteFeatures,
    RouterWeights,
    estimate_routes,
    load_weights,
    places_of,
)
from rag.settings import Settings
from rag.store.calibrations import CalibrationStore
from rag.store.documents import DocumentStore
from rag.types import (
    AnswerMode,
    Document,
    Gate,
    ReadExtent,
    Route,
    RouteDecision,
    RouteEstimate,
)

# A document this many times longer than the model's context is not tokenised with the template
# around it to be told that it does not fit; its own exact count is enough.
FAR_TOO_LONG = 2

# Two questions that begin differently: what their prompts share depends on the documents alone.
_PROBES = ("A", "1")


@dataclass(frozen=True, slots=True)
class Plan:
    """What would be done with a question, before the model reads a token.

    `prefix` is the part of the prompt that another question would share, None if it is not kept.
    `engine` reads the prompt: the one of the settings, or the same with a quantised cache.
    `thrift` is what the routes were weighed with, `breadth` how many times the retrieval budget may
    be read. `counted` is the answer where the text itself proves a count; the model then has
    nothing to do.
    """

    decision: RouteDecision
    context: Context
    prompt: Prompt
    prefix: DocumentPrefix | None
    document_tokens: int
    retrieve_seconds: float
    engine: Engine
    thrift: float
    breadth: int = 1
    counted: Counted | None = None

    @property
    def is_written(self) -> bool:
        """Whether the model reads one prompt and writes the answer."""
        return self.decision.mode is AnswerMode.WRITTEN and self.decision.route is not Route.SCAN

    @property
    def is_extracted(self) -> bool:
        """Whether every sentence is compared with the question, and no model reads."""
        return self.decision.mode is AnswerMode.QUOTED and self.decision.route is Route.SCAN

    @property
    def kv_dtype(self) -> str | None:
        """The format of the cache that the prompt is read into, None if it is the model's own."""
        spec = self.engine.spec
        return str(spec.kv_dtype) if spec and spec.kv_dtype else None


class Planner:
    """Plans questions about the documents of one library with one model."""

    def __init__(
        self,
        store: DocumentStore,
        retriever: Retriever,
        engine: Engine,
        settings: Settings,
        calibrations: CalibrationStore | None = None,
    ) -> None:
        self._store = store
        self._retriever = retriever
        self._engine = engine
        self._settings = settings
        self._calibrations = calibrations

    def plan(
        self,
        question: str,
        documents: Sequence[Document],
        *,
        route: Route | None = None,
        mode: AnswerMode | None = None,
        calibrate: bool = False,
        retrieval_tokens: int | None = None,
        breadth: int = 1,
        kv_dtype: str | None = None,
        thrift: float | None = None,
    ) -> Plan:
        """Return what would be done with a question; the model reads nothing.

        Args:
            question: in words; an empty one plans for the documents alone.
            documents: those asked about.
            route: a route asked for.
            mode: a mode asked for.
            calibrate: measure the prefill rate, which loads the weights, to have that gate too.
            retrieval_tokens: the budget of retrieved text; by default that of the settings.
            breadth: how many times that budget.
            kv_dtype: the quantised format in which everything was read and is to be read again.
            thrift: the probability of being right that 1,000 prompt tokens are worth, 0 to 1; by
                default that of the settings.
        """
        settings, engine = self._settings, self._engine
        thrift = settings.thrift if thrift is None else thrift
        retrieval_tokens = (retrieval_tokens or settings.retrieval_tokens) * breadth
        document_tokens = self._document_tokens(documents)
        nothing = Context((), 0, 0), Prompt((), 0), None, document_tokens, 0.0, engine, thrift
        if route in (None, Route.SCAN) and mode is not AnswerMode.QUOTED:
            counted = count_from_text(question, documents, self._store)
            if counted:
                return Plan(counted_decision(counted.reason), *nothing, counted=counted)
        quoting = decide_quotation(
            question,
            route,
            mode,
            gates=lambda: self._quotation_gates(question, document_tokens, retrieval_tokens),
            engine=engine,
            settings=settings,
        )
        if quoting:
            return Plan(quoting, *nothing, breadth=breadth)

        retrieve_started = time.perf_counter()
        hits = self._retriever.retrieve(question, documents, num_candidates=settings.num_candidates)
        limits = self.limits()
        passages, retrieval_prompt, lowered = fitting_passages(
            question,
            hits,
            documents,
            limits,
            store=self._store,
            engine=engine,
            token_budget=retrieval_tokens,
            max_new_tokens=settings.max_new_tokens,
        )
        retrieve_seconds = time.perf_counter() - retrieve_started

        context_tokens = limits.context_tokens or document_tokens
        everything: Context | None = None
        full_prompt = retrieval_prompt
        prefix: DocumentPrefix | None = None
        full_tokens = document_tokens + engine.count_tokens(question)
        if document_tokens <= FAR_TOO_LONG * context_tokens:
            everything = full_context(
                documents, store=self._store, count_tokens=engine.count_tokens
            )
            full_prompt = engine.encode_chat(build_messages(question, everything.passages))
            full_tokens = full_prompt.num_tokens
            prefix = self._document_prefix(everything, full_prompt, documents)

        reader, gates_of_full = self._reader(
            full_prompt, prefix, full_tokens, calibrate=calibrate, kv_dtype=kv_dtype
        )
        gates = [*gates_of_full]
        gates += check_gates(
            Need(Route.RETRIEVAL, retrieval_prompt.num_tokens, settings.max_new_tokens),
            engine.spec,
            limits,
            predicted_prefill_seconds=None,
        )
        classified = classify_question(question)
        if route is Route.SCAN or classified.question_class in NEEDS_EVERYTHING:
            frame = frame_tokens(engine, question, classified.question_class)
            gates += scan_gates(engine, limits, document_tokens, frame, calibrate=calibrate)
        kept_tokens = reader.cached_tokens(full_prompt, prefix) if everything else 0
        routes: tuple[RouteEstimate, ...] = ()
        if question.strip():
            routes = estimate_routes(
                self.features(question, documents, hits),
                self._weights,
                {
                    Route.FULL: full_tokens - kept_tokens,
                    Route.RETRIEVAL: retrieval_prompt.num_tokens,
                },
                thrift=thrift,
            )
        decision = decide_route(
            tuple(gates),
            classified,
            document_tokens=document_tokens,
            retrieval_tokens=retrieval_tokens,
            routes=routes,
            asked_for=route,
        )
        if decision.route is Route.FULL:
            assert everything is not None  # only what was counted exactly can pass the gates
            prompt, context = full_prompt, everything
            decision = replace(decision, reason=decision.reason + self.cache_words(reader))
        elif decision.route is Route.SCAN:
            prompt, context, prefix, reader = Prompt((), 0), Context((), 0, 0), None, engine
        else:
            prompt, context, prefix, reader = retrieval_prompt, passages, None, engine
            decision = replace(decision, reason=decision.reason + lowered)
        return Plan(
            decision,
            context,
            prompt,
            prefix,
            document_tokens,
            retrieve_seconds,
            reader,
            thrift,
            breadth,
        )

    def _reader(
        self,
        prompt: Prompt,
        prefix: DocumentPrefix | None,
        num_tokens: int,
        *,
        calibrate: bool,
        kv_dtype: str | None,
    ) -> tuple[Engine, tuple[Gate, ...]]:
        """Return which engine would read everything, and the gates of each that was tried.

        Where memory alone keeps the model's own cache from it, a quantised one is tried; but only
        if it was calibrated, and for no longer a prompt than it was measured to use well: nothing
        else is known of what it does to answers. Source: docs/decisions/0033.
        """

        def gates_of(engine: Engine) -> tuple[Gate, ...]:
            seconds = None
            if calibrate:
                seconds = self.predicted_seconds(
                    prompt, prefix, num_tokens=num_tokens, engine=engine
                )
            return check_gates(
                Need(Route.FULL, num_tokens, self._settings.max_new_tokens),
                engine.spec,
                self.limits(engine),
                predicted_prefill_seconds=seconds,
            )

        quantised = self._engine.quantised
        if quantised and quantised.spec and quantised.spec.kv_dtype == kv_dtype:
            return quantised, gates_of(quantised)
        gates = gates_of(self._engine)
        kept_from_it = [gate.gate for gate in hard(failed(gates, Route.FULL))]
        if quantised is None or kept_from_it != ["kv_bytes"]:
            return self._engine, gates
        if num_tokens > (self.limits(quantised).effective_tokens or 0):
            return self._engine, gates
        return quantised, (*gates, *gates_of(quantised))

    def cache_words(self, engine: Engine) -> str:
        """Return in what cache an engine reads, in words; nothing if it is the model's own."""
        if engine is self._engine or engine.spec is None:
            return ""
        calibrated = self.limits(engine).effective_tokens
        words = f", in an 8-bit cache ({engine.spec.kv_dtype})"
        return f"{words}, calibrated to {calibrated:,} tokens" if calibrated else words

    def predicted_seconds(
        self,
        prompt: Prompt,
        prefix: DocumentPrefix | None,
        *,
        num_tokens: int | None = None,
        engine: Engine | None = None,
    ) -> float | None:
        """Return the predicted seconds until a prompt is in the cache, loading what is kept too.

        `num_tokens` is its length where it was not written out, being far too long; `engine` reads
        it, by default that of the settings. None where a server reads it.
        """
        engine = engine or self._engine
        seconds = engine.predicted_prefill_seconds(
            num_tokens or prompt.num_tokens, cached_tokens=engine.cached_tokens(prompt, prefix)
        )
        return None if seconds is None else seconds + engine.load_seconds(prompt, prefix)

    def read_extent(self, plan: Plan, documents: Sequence[Document]) -> ReadExtent:
        """Return how much of the documents a plan reads, and what it leaves out, in words."""
        of_chunks = sum(document.num_chunks for document in documents)
        num_tokens = min(plan.context.num_tokens, plan.document_tokens)
        if plan.decision.route is not Route.RETRIEVAL:
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

    def longest_context_tokens(self) -> int | None:
        """Return the longest prompt and answer together that pass the exact gates here, in tokens.

        Prefill time is not among them: see `plan`. None if there is no limit.
        """
        limits = self.limits()
        by_memory = None
        if self._engine.spec is not None and limits.memory_bytes is not None:
            by_memory = longest_context(self._engine.spec, limits.memory_bytes)
        known = [n for n in (by_memory, limits.context_tokens) if n is not None]
        return min(known, default=None)

    def limits(self, engine: Engine | None = None) -> Limits:
        """Return what there is now: context, effective length, free memory, the deadline.

        They are those of the engine of the settings, unless another is given.
        """
        engine = engine or self._engine
        caps = [self._settings.max_context_tokens, engine.context_tokens]
        free_bytes = engine.free_bytes()
        calibrated = self._calibrations and self._calibrations.effective_length(engine.model_id)
        return Limits(
            context_tokens=min((cap for cap in caps if cap is not None), default=None),
            memory_bytes=(
                None if free_bytes is None else max(0, free_bytes - self._settings.kv_reserve_bytes)
            ),
            prefill_seconds=self._settings.prefill_deadline_seconds,
            effective_tokens=calibrated.tokens if calibrated else None,
        )

    def features(
        self, question: str, documents: Sequence[Document], hits: Sequence[Hit] | None = None
    ) -> RouteFeatures:
        """Return what the router weighs: see `rag.routing.utility`.

        Args:
            question: in words.
            documents: those asked about.
            hits: what was found for it, if it was looked for already.
        """
        if hits is None:
            hits = self._retriever.retrieve(
                question, documents, num_candidates=self._settings.num_candidates
            )
        before: dict[int, int] = {}
        num_chunks = 0
        for document in documents:
            before[document.id] = num_chunks
            num_chunks += document.num_chunks
        nearest = hits[:NUM_HITS]
        document_tokens, limits = self._document_tokens(documents), self.limits()
        listed = load_catalog().get(model_named(self._engine.name))
        effective_tokens = limits.effective_tokens or (listed and listed.effective_tokens)
        return RouteFeatures(
            question=question,
            document_tokens=document_tokens,
            effective_tokens=effective_tokens or limits.context_tokens or document_tokens,
            shares=tuple(sorted((hit.lexical for hit in nearest), reverse=True)),
            places=places_of(
                [before[h.chunk.document_id] + h.chunk.chunk.ordinal for h in nearest], num_chunks
            ),
            question_class=classify_question(question).question_class,
        )

    @cached_property
    def _weights(self) -> RouterWeights:
        return load_weights(self._settings.router_weights)

    def _document_prefix(
        self, everything: Context, prompt: Prompt, documents: Sequence[Document]
    ) -> DocumentPrefix | None:
        """Return the tokens that this prompt shares with those of two other questions."""
        if not prompt.ids:
            return None  # a server reads the prompt, and sees to such things itself
        prompts = [prompt.ids] + [
            self._engine.encode_chat(build_messages(probe, everything.passages)).ids
            for probe in _PROBES
        ]
        shared = 0
        for ids in zip(*prompts, strict=False):
            if len(set(ids)) > 1:
                break
            shared += 1
        return DocumentPrefix(shared, tuple(document.version_key for document in documents))

    def _document_tokens(self, documents: Sequence[Document]) -> int:
        """Return the documents' length in the model's tokens, counted once and remembered."""
        tokenizer = self._engine.tokenizer_id
        counts = self._store.token_counts([d.id for d in documents], tokenizer)
        for document in documents:
            if document.id not in counts:
                counts[document.id] = self._engine.count_tokens(self._store.text(document.id))
                self._store.save_token_count(document.id, tokenizer, counts[document.id])
        return sum(counts.values())

    def _quotation_gates(
        self, question: str, document_tokens: int, retrieval_tokens: int
    ) -> tuple[Gate, ...]:
        """Return the gates of a quotation: what reading all would need, and its longest prompt.

        The first leaves out the template: it only tells what was not done.
        """
        whole = document_tokens + self._engine.count_tokens(question)
        caps = (retrieval_tokens, self.limits().context_tokens)
        retrieval_tokens = min(cap for cap in caps if cap is not None)
        needs = (
            Need(Route.FULL, whole, self._settings.max_new_tokens),
            Need(Route.RETRIEVAL, retrieval_tokens, 0),
        )
        return tuple(
            gate
            for need in needs
            for gate in check_gates(
                need, self._engine.spec, self.limits(), predicted_prefill_seconds=None
            )
        )
