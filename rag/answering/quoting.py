"""From a question to an answer that is quoted word for word, with its receipt.

Nothing is written by the model, so nothing has to be believed: see rag/answering/quotation.py.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Event

from rag.answering.answerable import ANSWERABLE, answer_probability, likeliest_sentences
from rag.answering.citations import verified_citation, without_markers
from rag.answering.extraction import can_extract
from rag.answering.outcome import Outcome, sha256_of
from rag.answering.prompt import CANNOT_ANSWER
from rag.answering.quotation import (
    Quotation,
    quote,
    unread_quotation,
)
from rag.answering.sentence_choice import NUM_CHUNKS, Sentence
from rag.errors import OutOfMemoryError
from rag.lm.catalog import load_catalog
from rag.lm.engine import Engine, model_named
from rag.retrieval.retriever import Retriever
from rag.routing.question_class import classify_question, offers_options
from rag.settings import Settings
from rag.store.documents import DocumentStore
from rag.types import (
    AnswerMode,
    Citation,
    Document,
    Gate,
    KVBytes,
    QuestionClass,
    ReadExtent,
    Route,
    RouteDecision,
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

    A lookup is quoted from what retrieval finds, a count or a list from all of the documents.

    Args:
        question: in words.
        route: the route asked for, None if none was.
        mode: the mode asked for, None if none was.
        gates: returns those of the receipt.
        engine: the language model; the catalog says whether it is to be trusted with words.
        settings: `answer_mode`.
    """
    classified = classify_question(question)
    is_lookup = classified.question_class is QuestionClass.LOOKUP
    is_list = classified.question_class is QuestionClass.AGGREGATE and can_extract(question)
    route_taken = Route.SCAN if is_list else Route.RETRIEVAL
    if mode is AnswerMode.QUOTED:
        reason = "a quotation was asked for"
    elif route or mode or not question.strip() or settings.answer_mode == "free":
        return None
    elif settings.answer_mode == "quotation":
        reason = "FATHOM_ANSWER_MODE asks for quotations"
    else:
        if not engine.can_score or not quotes_only(engine):
            return None
        if offers_options(question) or not (is_lookup or is_list):
            return None  # of a chain no sentence is the answer, and no quotation names an option
        reason = f"a lookup, and {engine.name} is small: the answer is quoted, not written"
        if is_list:
            reason = f"{engine.name} is small, so it counts and lists nothing"
    if is_list:
        reason += ": every sentence is compared with the words of the question"
    return RouteDecision(
        route_taken,
        reason,
        classified.question_class,
        gates(),
        classified.reason,
        AnswerMode.QUOTED,
    )


def quotes_only(engine: Engine) -> bool:
    """Say whether the catalog trusts a model with no words of its own."""
    entry = load_catalog().get(model_named(engine.name))
    return entry is not None and entry.answers == "quotation"


def quote_answer(
    question: str,
    documents: Sequence[Document],
    *,
    store: DocumentStore,
    retriever: Retriever,
    engine: Engine,
    settings: Settings,
    document_tokens: int,
    breadth: int,
    stop: Event,
) -> Outcome:
    """Return the answer, the sentence it stands in and, where that is not sure, another.

    Whether the documents hold an answer is judged first; where they seem not to, or after `stop`,
    the nearest sentences are shown as what they are.

    Args:
        question: in words.
        documents: those asked about.
        store: their text.
        retriever: finds the chunks and compares sentences with the question.
        engine: the language model.
        settings: number of candidates, and the longest prompt.
        document_tokens: length of the documents in the model's tokens.
        breadth: how many times NUM_CHUNKS chunks are compared.
        stop: set it to do without the model from there on.
    """
    # 1. find the chunks, rank their sentences
    started = time.perf_counter()
    hits = retriever.retrieve(question, documents, num_candidates=settings.num_candidates)
    compared = hits[: breadth * NUM_CHUNKS]
    ranked = likeliest_sentences(
        question,
        compared,
        documents,
        store=store,
        similarities=retriever.similarities,
        num_chunks=len(compared),
    )
    retrieve_seconds = time.perf_counter() - started
    engine.predicted_prefill_seconds(1)  # a rate that is still to be measured is no reading
    found = time.perf_counter()

    # 2. let the model choose the span
    quotation: Quotation | None = None
    escalations: tuple[str, ...] = ()
    caps = (settings.retrieval_tokens, settings.max_context_tokens, engine.context_tokens)
    if ranked and answer_probability(question, ranked) >= ANSWERABLE:
        try:
            quotation = quote(
                question,
                ranked,
                engine,
                max_prompt_tokens=min(cap for cap in caps if cap is not None),
                stop=stop,
            )
        except OutOfMemoryError as error:
            quotation = unread_quotation(question, ranked)
            escalations = (
                f"{error.message}; so the likeliest sentence is quoted whole, unread by the model",
            )
    chosen = time.perf_counter()

    # 3. cut what is shown from the stored text
    citations = _citations(quotation, ranked, store)
    read_tokens = sum(engine.count_tokens(hit.chunk.chunk.text) for hit in compared)
    of_chunks = sum(document.num_chunks for document in documents)
    prompt_ids = quotation.prompt_ids if quotation else ()
    return Outcome(
        text=_words(quotation, citations),
        abstained=quotation is None,
        is_supported=quotation is not None,
        citations=citations,
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
        prompt_sha256=sha256_of(prompt_ids),
        prompt_tokens=len(prompt_ids),
        kv_bytes=quotation.kv_bytes if quotation else KVBytes(0, 0),
        retrieve_seconds=retrieve_seconds,
        prefill_seconds=chosen - found,
        prefill_predicted_seconds=quotation.predicted_seconds if quotation else None,
        escalations=escalations,
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
    return without_markers(" ".join(text.split()))
