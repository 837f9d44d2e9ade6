"""What a scan needs, in gates, and what scans, counts and lists from the text itself come to."""

from collections.abc import Sequence

from rag.answering.counting import Counted
from rag.answering.extraction import Extracted, extracted_text
from rag.answering.outcome import Outcome, sha256_of
from rag.answering.prompt import CANNOT_ANSWER
from rag.answering.scan import FINDING_TOKENS, LEAST_STRIDE_TOKENS, STRIDE_TOKENS, ScanDone
from rag.lm.engine import Engine
from rag.lm.kv_bytes import kv_cache_bytes
from rag.lm.spec import ModelSpec
from rag.routing.gates import Limits, Need, check_gates
from rag.types import (
    Document,
    Gate,
    KVBytes,
    ReadExtent,
    Route,
    RouteDecision,
    ScanTally,
)


def stride_tokens(limits: Limits, frame_tokens: int) -> int:
    """Return the text that one window of a scan takes: two and the frame fit the context."""
    if limits.context_tokens is None:
        return STRIDE_TOKENS
    room = (limits.context_tokens - frame_tokens - FINDING_TOKENS) // 2
    return min(STRIDE_TOKENS, max(LEAST_STRIDE_TOKENS, room))


def scan_gates(
    engine: Engine,
    limits: Limits,
    document_tokens: int,
    frame_tokens: int,
    *,
    calibrate: bool,
) -> tuple[Gate, ...]:
    """Return the gates of a scan: those of one window, and the seconds of all, without a limit.

    A scan has no deadline: it is taken where nothing else can answer, shows how far it is, and may
    be stopped. Writing the findings comes on top of the seconds.

    Args:
        engine: the language model.
        limits: what this machine has now.
        document_tokens: length of the documents.
        frame_tokens: what stands around the text of a window; see `rag.answering.scan`.
        calibrate: measure the prefill rate, which loads the weights, to tell the seconds, too.
    """
    stride = stride_tokens(limits, frame_tokens)
    need = Need(Route.SCAN, 2 * stride + frame_tokens, FINDING_TOKENS)
    gates = check_gates(need, engine.spec, limits, predicted_prefill_seconds=None)
    window_seconds = engine.predicted_prefill_seconds(stride + frame_tokens) if calibrate else None
    if window_seconds is None:
        return gates
    seconds = round(window_seconds * -(-document_tokens // stride), 2)
    return (*gates, Gate("prefill_seconds", seconds, None, "seconds", True, Route.SCAN))


def predicted_scan_seconds(decision: RouteDecision) -> float | None:
    """Return the seconds that reading in windows was predicted to take, None if it was not."""
    for gate in decision.gates:
        if gate.route == Route.SCAN and gate.gate == "prefill_seconds":
            return gate.value
    return None


def scan_extent(done: ScanDone, documents: Sequence[Document], document_tokens: int) -> ReadExtent:
    """Return how much was read: everything, unless the scan was stopped."""
    of_chunks = sum(document.num_chunks for document in documents)
    if not done.unread:
        return ReadExtent(document_tokens, document_tokens, of_chunks, of_chunks, "")
    # By the share of the text: to count its tokens again takes seconds where it is long.
    chars = sum(window.end - window.start for window in done.unread)
    unread = document_tokens * chars // sum(document.num_chars for document in documents)
    read = document_tokens - unread
    how_far = "before the first window"
    if done.tally.windows:
        how_far = f"after {done.tally.windows:,} of {done.num_windows:,} windows"
    return ReadExtent(
        tokens=read,
        of_tokens=document_tokens,
        chunks=of_chunks * read // max(1, document_tokens),
        of_chunks=of_chunks,
        not_read=f"it was stopped {how_far}; about {unread:,} tokens were not read",
    )


def scan_outcome(
    done: ScanDone,
    read: ReadExtent,
    decision: RouteDecision,
    spec: ModelSpec | None,
    *,
    retrieve_seconds: float,
) -> Outcome:
    """Return what a scan comes to; its findings are verified, or there are none."""
    return Outcome(
        text=done.text,
        abstained=done.abstained,
        is_supported=bool(done.citations),
        citations=done.citations,
        read=read,
        prompt_sha256=done.prompt_sha256,
        prompt_tokens=done.prompt_tokens,
        cached_tokens=done.cached_tokens,
        new_tokens=done.new_tokens,
        kv_bytes=KVBytes(
            predicted=kv_cache_bytes(spec, done.kv_tokens) if spec else None,
            actual=done.kv_bytes if spec else None,
        ),
        retrieve_seconds=retrieve_seconds,
        prefill_seconds=done.prefill_seconds,
        prefill_predicted_seconds=predicted_scan_seconds(decision),
        decode_seconds=done.decode_seconds,
        scan=done.tally,
        notes=done.notes,
    )


def count_outcome(counted: Counted, read: ReadExtent) -> Outcome:
    """Return what a count comes to, of which no model read a token."""
    return Outcome(
        text=counted.answer,
        abstained=False,
        is_supported=True,
        citations=counted.citations,
        read=read,
        prompt_sha256=sha256_of([]),
        scan=ScanTally(windows=1, items=counted.num_items, dropped_unverified=0, dropped_repeats=0),
    )


def extracted_outcome(
    found: Extracted, documents: Sequence[Document], document_tokens: int, *, seconds: float
) -> Outcome:
    """Return what a comparison of every sentence comes to, of which no model read a token.

    Args:
        found: the sentences.
        documents: those asked about.
        document_tokens: their length.
        seconds: that it took.
    """
    of_chunks = sum(document.num_chunks for document in documents)
    chars = sum(document.num_chars for document in found.unread)
    unread = document_tokens * chars // max(1, sum(document.num_chars for document in documents))
    not_read = f"it was stopped; about {unread:,} tokens were not read" if found.unread else ""
    return Outcome(
        text=extracted_text(found) if found.citations else CANNOT_ANSWER,
        abstained=not found.citations,
        is_supported=bool(found.citations),
        citations=found.citations,
        read=ReadExtent(
            tokens=document_tokens - unread,
            of_tokens=document_tokens,
            chunks=of_chunks - sum(document.num_chunks for document in found.unread),
            of_chunks=of_chunks,
            not_read=not_read,
        ),
        prompt_sha256=sha256_of([]),
        retrieve_seconds=seconds,
        scan=ScanTally(windows=1, items=found.num_found, dropped_unverified=0, dropped_repeats=0),
        notes=(f"{found.num_compared:,} sentences were compared with it",),
    )
