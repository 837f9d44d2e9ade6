"""What one plan came to, and the answer with its receipt: the one place where receipts are made."""

import hashlib
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rag.answering.prompt import CANNOT_ANSWER
from rag.types import (
    Answer,
    Citation,
    Decoding,
    KVBytes,
    ReadExtent,
    Receipt,
    Route,
    RouteDecision,
    ScanTally,
    Seconds,
)

# What stands before the quotation of an answer that has no other.
NEAREST = "The nearest sentence found:"
STOPPED = "Stopped before an answer was found."
_NO_CACHE = KVBytes(0, 0)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one way of answering found, and what it took; the last event of each.

    `is_supported` says that at least one statement stands on verified quotations: one that says it
    or, of a conclusion, which is marked, those that speak of it. Where none does, the citations are
    the sentences nearest to the question. `notes` go into the receipt's
    reason, `escalations` are plans given up on this way.
    """

    text: str
    abstained: bool
    is_supported: bool
    citations: tuple[Citation, ...]
    read: ReadExtent
    prompt_sha256: str
    prompt_tokens: int = 0
    cached_tokens: int | None = 0
    new_tokens: int = 0
    kv_bytes: KVBytes = _NO_CACHE
    retrieve_seconds: float = 0.0
    prefill_seconds: float = 0.0
    prefill_predicted_seconds: float | None = None
    decode_seconds: float = 0.0
    decoding: Decoding | None = None
    scan: ScanTally | None = None
    notes: tuple[str, ...] = ()
    escalations: tuple[str, ...] = ()

    @property
    def is_answer(self) -> bool:
        """Whether it says something that the documents support."""
        return not self.abstained and self.is_supported


def not_found(outcome: Outcome) -> Outcome:
    """Return an outcome that nothing supports as "not found", with what is nearest."""
    if outcome.abstained:
        return outcome
    return replace(
        outcome,
        text=with_nearest(CANNOT_ANSWER, outcome.citations),
        abstained=True,
        notes=(*outcome.notes, "what the model wrote has no support and is not shown"),
    )


def stopped_short(outcome: Outcome) -> Outcome:
    """Return what a stop left without an answer as that: whether there is one is not known."""
    if not outcome.abstained:
        return outcome
    return replace(outcome, text=with_nearest(STOPPED, outcome.citations))


def with_nearest(text: str, nearest: Sequence[Citation]) -> str:
    """Return a text that answers nothing, with the marker of the nearest sentence if there is one.

    Args:
        text: the refusal, or unsupported statements marked as such.
        nearest: from `nearest_citations`.
    """
    return f"{text} {NEAREST} [{nearest[0].marker}]" if nearest else text


def finished_answer(
    outcome: Outcome,
    decision: RouteDecision,
    *,
    escalations: Sequence[str],
    total_seconds: float,
    model: str,
    embedder: str,
    breadth: int,
    kv_dtype: str | None,
    thrift: float,
    asked_for: Route | None,
    standalone_question: str | None,
    named: str = "",
) -> Answer:
    """Return the answer with its receipt.

    Args:
        outcome: of the plan that answered.
        decision: of the same plan.
        escalations: the plans before it, and why each was given up.
        total_seconds: wall-clock time since the question came, the earlier plans included.
        model: what receipts call it.
        embedder: its fingerprint.
        breadth: how many times the retrieval budget was read.
        kv_dtype: the format of the cache where it is not the model's own.
        thrift: what the plan weighed routes with.
        asked_for: the route that the person chose, if he did.
        standalone_question: a follow-up as it was rewritten; None if it was asked as it is.
        named: what the question's naming of a document did to what was asked, in words.
    """
    receipt = Receipt(
        id=uuid.uuid4().hex[:12],
        route=decision.route,
        reason="; ".join((decision.reason, *outcome.notes)),
        question_class=decision.question_class,
        gates=decision.gates,
        read=outcome.read,
        prompt_tokens=outcome.prompt_tokens,
        cached_tokens=outcome.cached_tokens,
        new_tokens=outcome.new_tokens,
        kv_bytes=outcome.kv_bytes,
        seconds=Seconds(
            retrieve=round(outcome.retrieve_seconds, 4),
            prefill=round(outcome.prefill_seconds, 4),
            prefill_predicted=_rounded(outcome.prefill_predicted_seconds),
            decode=round(outcome.decode_seconds, 4),
            total=round(total_seconds, 4),
        ),
        escalations=(*escalations, *outcome.escalations),
        model=model,
        embedder=embedder,
        prompt_sha256=outcome.prompt_sha256,
        class_reason=decision.class_reason,
        mode=decision.mode,
        scan=outcome.scan,
        routes=decision.routes,
        standalone_question=standalone_question,
        named=named,
        asked_for=asked_for,
        breadth=breadth,
        kv_dtype=kv_dtype,
        thrift=thrift,
        decoding=outcome.decoding,
    )
    return Answer(outcome.text, outcome.abstained, outcome.citations, receipt)


def sha256_of(content: Any) -> str:  # noqa: ANN401 - any JSON value
    """Return the checksum of a prompt's tokens, or of its messages where a server counts them."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
