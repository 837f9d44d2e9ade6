"""The model reads one prompt and writes; what it wrote is matched with what it read."""

from collections.abc import Iterator
from dataclasses import replace
from threading import Event

from rag.answering.citations import CitedText, nearest_citations, resolve_citations
from rag.answering.outcome import Outcome, sha256_of, with_nearest
from rag.answering.planning import Plan
from rag.answering.prompt import CANNOT_ANSWER, is_refusal
from rag.lm.engine import GenerationDone, PrefillProgress, Prompt, TextPiece
from rag.lm.kv_bytes import kv_cache_bytes
from rag.store.documents import DocumentStore
from rag.types import KVBytes, ReadExtent

CONCLUDED = (
    "what is marked is the model's conclusion: the sentences beside it speak of it, none says it"
)


def write(
    question: str,
    plan: Plan,
    read: ReadExtent,
    *,
    store: DocumentStore,
    predicted_seconds: float | None,
    max_new_tokens: int,
    stop: Event,
) -> Iterator[PrefillProgress | TextPiece | Outcome]:
    """Yield each step of the reply to a plan's prompt; the Outcome is last.

    Args:
        question: in words.
        plan: the prompt, the passages that it shows, and the engine that reads it.
        read: how much of the documents that is.
        store: where quotations are read again.
        predicted_seconds: of the prefill, None if unknown.
        max_new_tokens: the longest reply.
        stop: ends the reply; what was written until then is still cited.

    Raises:
        OutOfMemoryError: if memory runs out.
        ModelServerError: if a server runs the model and gives no answer.
    """
    written: list[str] = []
    for step in plan.engine.generate(
        plan.prompt, max_new_tokens=max_new_tokens, stop=stop, prefix=plan.prefix
    ):
        if isinstance(step, GenerationDone):
            text = "".join(written)
            yield written_outcome(question, plan, read, text, step, predicted_seconds, store=store)
        else:
            if isinstance(step, TextPiece):
                written.append(step.text)
            yield step


def written_outcome(
    question: str,
    plan: Plan,
    read: ReadExtent,
    text: str,
    done: GenerationDone,
    predicted_seconds: float | None,
    *,
    store: DocumentStore,
) -> Outcome:
    """Return what a reply comes to: its citations, or the sentence nearest to the question."""
    text, passages = text.strip(), plan.context.passages
    cited = resolve_citations(text, question, passages, store)
    if done.stopped and not done.new_tokens:  # nothing was read, so no passage speaks for itself
        cited = CitedText("", (), 0)
        not_read = "it was stopped before the model had read to the end"
        read = replace(read, tokens=0, chunks=0, not_read=not_read)
    abstained = not cited.text or is_refusal(text)
    is_supported = bool(cited.citations) and not abstained
    shown, citations = cited.text, cited.citations
    if not is_supported:
        citations = nearest_citations(question, passages, store)
        shown = with_nearest(CANNOT_ANSWER if abstained else cited.text, citations)
    predicted_bytes = None
    if plan.engine.spec is not None and done.kv_tokens is not None:
        predicted_bytes = kv_cache_bytes(plan.engine.spec, done.kv_tokens)
    notes = []
    if done.is_cut_off:
        notes.append(f"the answer was cut off at its limit of {done.new_tokens:,} tokens")
    if is_supported and cited.num_concluded:
        notes.append(CONCLUDED)
    return Outcome(
        text=shown,
        abstained=abstained,
        is_supported=is_supported,
        citations=citations,
        read=read,
        prompt_sha256=prompt_sha256(plan.prompt),
        prompt_tokens=done.prompt_tokens,
        cached_tokens=done.reused_tokens,
        new_tokens=done.new_tokens,
        kv_bytes=KVBytes(predicted_bytes, done.kv_bytes),
        retrieve_seconds=plan.retrieve_seconds,
        prefill_seconds=done.prefill_seconds,
        prefill_predicted_seconds=predicted_seconds,
        decode_seconds=done.decode_seconds,
        decoding=done.decoding,
        notes=tuple(notes),
    )


def prompt_sha256(prompt: Prompt) -> str:
    """Return the checksum of a prompt as the receipt has it."""
    return sha256_of(list(prompt.ids) or [[m.role, m.content] for m in prompt.messages])
