"""From a question to an answer that is quoted word for word, with its receipt.

Nothing is written by the model, so nothing has to be believed: see rag/answering/quotation.py.
"""

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Event

from rag.answering.citations import verified_citation
from rag.answering.prompt import CANNOT_ANSWER
from rag.answering.quotation import (
    ANSWERABLE,
    Quotation,
    answer_probability,
    quote,
    unread_quotation,
)
from rag.answering.sentence_choice import NUM_CHUNKS, Sentence, rank_sentences
from rag.errors import OutOfMemoryError
from rag.lm.catalog import load_catalog
from rag.lm.engine import Engine
from rag.retrieval.retriever import Retriever
from rag.routing.question_class import classify_question
from rag.settings import Settings
from rag.store.documents import DocumentStore
from rag.types import (
    Answer,
    AnswerMode,
    Citation,
    Document,
    Gate,
    KVBytes,
    QuestionClass,
    ReadExtent,
    Receipt,
    Route,
    RouteDecision,
    Seconds,
)

# What stands before the sentences shown to a person whose question was not answered.
NEAREST = "The nearest sentences found:"


def decide_quotation(
    question: str,
    route: Route | None,
    mode: AnswerMode | None,
    *,
    gates: Callable[[], tuple[Gate, ...]],
    engine: Engine,
    settings: Settings,
) -> RouteDecision | None:
    """Return the decision to quote, None where the answer is to be written.

    Args:
        question: in words.
        route: the route asked for, None if none was.
        mode: the mode asked for, None if none was.
        gates: returns those of the receipt.
        engine: the language model; the catalog says whether it is to be trusted with words.
        settings: `answer_mode`.
    """
    classified = classify_question(question)
    if mode is AnswerMode.QUOTED:
        reason = "a quotation was asked for"
    elif route or mode or not question.strip() or settings.answer_mode == "free":
        return None
    elif settings.answer_mode == "quotation":
        reason = "FATHOM_ANSWER_MODE asks for quotations"
    else:
        entry = load_catalog().get(engine.name)
        if not engine.can_score:
            return None
        if (
            not entry
            or entry.answers != "quotation"
            or classified.question_class is not QuestionClass.LOOKUP
        ):
            return None
        reason = f"a lookup, and {engine.name} is small: the answer is quoted, not written"
    return RouteDecision(
        Route.RETRIEVAL,
        reason,
        classified.question_class,
        gates(),
        classified.reason,
        AnswerMode.QUOTED,
    )


def quoted_answer(
    question: str,
    documents: Sequence[Document],
    decision: RouteDecision,
    *,
    store: DocumentStore,
    retriever: Retriever,
    engine: Engine,
    settings: Settings,
    document_tokens: int,
    stop: Event,
) -> Answer:
    """Return the answer, the sentence it stands in and, where that is not sure, another.

    Whether the documents hold an answer is judged first; where they seem not to, or after `stop`,
    the nearest sentences are shown as what they are.

    Args:
        question: in words.
        documents: those asked about.
        decision: from `decide_quotation`.
        store: their text.
        retriever: finds the chunks and compares sentences with the question.
        engine: the language model.
        settings: number of candidates, and the longest prompt.
        document_tokens: length of the documents in the model's tokens.
        stop: set it to do without the model from there on.
    """
    # 1. find the chunks, rank their sentences
    started = time.perf_counter()
    hits = retriever.retrieve(question, documents, num_candidates=settings.num_candidates)
    ranked = rank_sentences(
        question, hits, documents, store=store, similarities=retriever.similarities
    )
    found = time.perf_counter()

    # 2. let the model choose the span
    quotation: Quotation | None = None
    escalations: tuple[str, ...] = ()
    if ranked and answer_probability(ranked) >= ANSWERABLE:
        try:
            quotation = quote(
                question, ranked, engine, max_prompt_tokens=settings.retrieval_tokens, stop=stop
            )
        except OutOfMemoryError as error:
            quotation = unread_quotation(ranked)
            escalations = (
                f"{error.message}; so the likeliest sentence is quoted whole, unread by the model",
            )
    chosen = time.perf_counter()

    # 3. cut what is shown from the stored text
    citations = _citations(quotation, ranked, store)
    compared = hits[:NUM_CHUNKS]
    read_tokens = sum(engine.count_tokens(hit.chunk.chunk.text) for hit in compared)
    of_chunks = sum(document.num_chunks for document in documents)
    prompt_ids = quotation.prompt_ids if quotation else ()
    receipt = Receipt(
        id=uuid.uuid4().hex[:12],
        route=decision.route,
        reason=decision.reason,
        question_class=decision.question_class,
        gates=decision.gates,
        read=ReadExtent(
            tokens=min(read_tokens, document_tokens),
            of_tokens=document_tokens,
            chunks=len(compared),
            of_chunks=of_chunks,
            not_read=f"the sentences of {of_chunks - len(compared):,} of {of_chunks:,} chunks were"
            " not compared with the question"
            if of_chunks > len(compared)
            else "",
        ),
        prompt_tokens=len(prompt_ids),
        cached_tokens=0,
        new_tokens=0,
        kv_bytes=quotation.kv_bytes if quotation else KVBytes(0, 0),
        seconds=Seconds(
            retrieve=round(found - started, 4),
            prefill=round(chosen - found, 4),
            prefill_predicted=None,
            decode=0.0,
            total=round(time.perf_counter() - started, 4),
        ),
        escalations=escalations,
        model=engine.name,
        embedder=retriever.embedder_name,
        prompt_sha256=hashlib.sha256(json.dumps(prompt_ids).encode()).hexdigest(),
        class_reason=decision.class_reason,
        mode=decision.mode,
    )
    return Answer(
        answer=_words(quotation, citations),
        abstained=quotation is None,
        citations=citations,
        receipt=receipt,
    )


def _citations(
    quotation: Quotation | None, ranked: Sequence[Sentence], store: DocumentStore
) -> tuple[Citation, ...]:
    """Return the quoted sentence, with the span in it, and the one beside it; or the nearest."""
    shown: list[Sentence | None] = [*ranked[:2]]
    if quotation:
        shown = [quotation.sentence, quotation.beside]
    citations = [
        verified_citation(number, s.document, s.start, s.end, s.text, store)
        for number, s in enumerate((s for s in shown if s), start=1)
    ]
    if quotation:
        citations[0] = replace(citations[0], answer_start=quotation.start, answer_end=quotation.end)
    return tuple(citations)


def _words(quotation: Quotation | None, citations: Sequence[Citation]) -> str:
    """Return the answer in one line: the span, and in quotation marks what it is quoted from."""
    quotes = " ".join(
        f"\N{LEFT DOUBLE QUOTATION MARK}{_one_line(citation.quote)}"
        f"\N{RIGHT DOUBLE QUOTATION MARK} [{citation.marker}]"
        for citation in citations
    )
    if quotation:
        return f"{_one_line(quotation.text)}: {quotes}"
    return f"{CANNOT_ANSWER} {NEAREST} {quotes}" if quotes else CANNOT_ANSWER


def _one_line(text: str) -> str:
    return " ".join(text.split())
