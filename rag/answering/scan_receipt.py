"""What a scan needs, in gates, and the receipts of scans and of counts from the text itself."""

import hashlib
import uuid
from collections.abc import Callable, Sequence

from rag.answering.counting import Counted
from rag.answering.scan import FINDING_TOKENS, FRAME_TOKENS, STRIDE_TOKENS, ScanDone
from rag.lm.engine import Engine
from rag.lm.kv_bytes import kv_cache_bytes
from rag.routing.gates import Limits, Need, check_gates
from rag.types import (
    Answer,
    Document,
    Gate,
    KVBytes,
    ReadExtent,
    Receipt,
    Route,
    RouteDecision,
    ScanTally,
    Seconds,
)

# A count has no prompt.
_NO_PROMPT_SHA256 = hashlib.sha256(b"[]").hexdigest()


def stride_tokens(limits: Limits) -> int:
    """Return the text that one window of a scan takes: two and the frame fit the context."""
    if limits.context_tokens is None:
        return STRIDE_TOKENS
    room = (limits.context_tokens - FRAME_TOKENS - FINDING_TOKENS) // 2
    return min(STRIDE_TOKENS, max(1, room))


def scan_gates(
    engine: Engine, limits: Limits, document_tokens: int, *, calibrate: bool
) -> tuple[Gate, ...]:
    """Return the gates of a scan: those of one window, and the seconds of all, without a limit.

    A scan has no deadline: it is taken where nothing else can answer, shows how far it is, and may
    be stopped. Writing the findings comes on top of the seconds.

    Args:
        engine: the language model.
        limits: what this machine has now.
        document_tokens: length of the documents.
        calibrate: measure the prefill rate, which loads the weights, to tell the seconds, too.
    """
    stride = stride_tokens(limits)
    need = Need(Route.SCAN, 2 * stride + FRAME_TOKENS, FINDING_TOKENS)
    gates = check_gates(need, engine.spec, limits, predicted_prefill_seconds=None)
    window_seconds = engine.predicted_prefill_seconds(stride + FRAME_TOKENS) if calibrate else None
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


def scan_extent(
    done: ScanDone,
    documents: Sequence[Document],
    document_tokens: int,
    count_tokens: Callable[[str], int],
) -> ReadExtent:
    """Return how much was read: everything, unless the scan was stopped."""
    of_chunks = sum(document.num_chunks for document in documents)
    if not done.unread:
        return ReadExtent(document_tokens, document_tokens, of_chunks, of_chunks, "")
    unread = sum(count_tokens(window.text) for window in done.unread)
    read = max(0, document_tokens - unread)
    return ReadExtent(
        tokens=read,
        of_tokens=document_tokens,
        chunks=of_chunks * read // max(1, document_tokens),
        of_chunks=of_chunks,
        not_read=f"it was stopped after {done.tally.windows:,} of {done.num_windows:,} windows;"
        f" about {unread:,} tokens were not read",
    )


def scan_answer(
    done: ScanDone,
    decision: RouteDecision,
    read: ReadExtent,
    *,
    engine: Engine,
    retrieve_seconds: float,
    total_seconds: float,
    embedder: str,
) -> Answer:
    """Return the finished answer of a scan with its receipt."""
    spec = engine.spec
    receipt = Receipt(
        id=uuid.uuid4().hex[:12],
        route=decision.route,
        reason=decision.reason,
        question_class=decision.question_class,
        gates=decision.gates,
        read=read,
        prompt_tokens=done.prompt_tokens,
        cached_tokens=done.cached_tokens,
        new_tokens=done.new_tokens,
        kv_bytes=KVBytes(
            predicted=kv_cache_bytes(spec, done.kv_tokens) if spec else None,
            actual=done.kv_bytes if spec else None,
        ),
        seconds=Seconds(
            retrieve=round(retrieve_seconds, 4),
            prefill=round(done.prefill_seconds, 4),
            prefill_predicted=predicted_scan_seconds(decision),
            decode=round(done.decode_seconds, 4),
            total=round(total_seconds, 4),
        ),
        escalations=(),
        model=engine.name,
        embedder=embedder,
        prompt_sha256=done.prompt_sha256,
        class_reason=decision.class_reason,
        scan=done.tally,
    )
    return Answer(done.text, done.abstained, done.citations, receipt)


def answer_by_count(
    counted: Counted,
    decision: RouteDecision,
    read: ReadExtent,
    *,
    total_seconds: float,
    model: str,
    embedder: str,
) -> Answer:
    """Return the finished answer of a count, whose receipt says that no model read a token."""
    receipt = Receipt(
        id=uuid.uuid4().hex[:12],
        route=decision.route,
        reason=decision.reason,
        question_class=decision.question_class,
        gates=decision.gates,
        read=read,
        prompt_tokens=0,
        cached_tokens=0,
        new_tokens=0,
        kv_bytes=KVBytes(predicted=0, actual=0),
        seconds=Seconds(0.0, 0.0, 0.0, 0.0, total=round(total_seconds, 4)),
        escalations=(),
        model=model,
        embedder=embedder,
        prompt_sha256=_NO_PROMPT_SHA256,
        class_reason=decision.class_reason,
        mode=decision.mode,
        scan=ScanTally(windows=1, items=counted.num_items, dropped_unverified=0, dropped_repeats=0),
    )
    return Answer(counted.answer, abstained=False, citations=counted.citations, receipt=receipt)
