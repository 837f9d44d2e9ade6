"""What the server counts, in Prometheus' text format: no question, no name, no document."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from rag.types import Answer

if TYPE_CHECKING:
    from ui.assembly import Fathom

disable_created_metrics()  # type: ignore[no-untyped-call] # when each count began is of no use to anybody
_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """The counts of this process since it began."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        self._answers = Counter(
            "fathom_answers", "Answers given, by route.", ["route", "mode"], registry=registry
        )
        self._abstained = Counter(
            "fathom_answers_abstained", "Answers that say: not found.", registry=registry
        )
        self._errors = Counter(
            "fathom_errors",
            "Questions that ended in an error, by its kind.",
            ["kind"],
            registry=registry,
        )
        self._tokens = Counter(
            "fathom_tokens",
            "Tokens of prompts, of them cached, and new.",
            ["kind"],
            registry=registry,
        )
        self._seconds = Histogram(
            "fathom_seconds",
            "Seconds of an answer, by step.",
            ["step"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._kv_bytes = Gauge(
            "fathom_last_kv_bytes", "KV-cache bytes of the newest answer.", registry=registry
        )
        self._document_kv_bytes = Gauge(
            "fathom_document_kv_bytes", "Bytes of documents' caches in memory.", registry=registry
        )
        self._waiting = Gauge(
            "fathom_questions_waiting", "Questions that wait for the model.", registry=registry
        )
        self._running = Gauge(
            "fathom_questions_running", "Questions that have the model.", registry=registry
        )
        self._refused = Counter(
            "fathom_refused", "Requests refused, by reason.", ["reason"], registry=registry
        )

    def count(self, answer: Answer) -> None:
        """Count a finished answer."""
        receipt = answer.receipt
        self._answers.labels(receipt.route, receipt.mode).inc()
        if answer.abstained:
            self._abstained.inc()
        self._tokens.labels("prompt").inc(receipt.prompt_tokens)
        self._tokens.labels("cached").inc(receipt.cached_tokens or 0)
        self._tokens.labels("new").inc(receipt.new_tokens)
        for step in ("retrieve", "prefill", "decode", "total"):
            self._seconds.labels(step).observe(getattr(receipt.seconds, step))
        if receipt.kv_bytes.actual is not None:
            self._kv_bytes.set(receipt.kv_bytes.actual)

    def count_error(self, error: BaseException) -> None:
        """Count a question that got no answer."""
        self._errors.labels(type(error).__name__).inc()

    def count_refusal(self, reason: str) -> None:
        """Count a request that was refused: sign-in, rate, quota, origin."""
        self._refused.labels(reason).inc()

    def text(self, fathom: Fathom) -> bytes:
        """Return all counts as they are now."""
        self._waiting.set(fathom.queue.num_waiting)
        self._running.set(int(fathom.queue.is_running))
        self._document_kv_bytes.set(fathom.document_kv.memory_used_bytes)
        return generate_latest(self._registry)
