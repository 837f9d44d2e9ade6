"""Ask a past question again, of the same document versions by the same route, and compare.

Decoding is greedy, so model, documents and prompt being the same, the text is the same. Where it
is not, what differs is named.
"""

from dataclasses import dataclass
from typing import Any

from rag.answering.service import AnsweringService
from rag.errors import ReplayError
from rag.store.receipts import REDACTED, ReceiptStore
from rag.types import Answer


@dataclass(frozen=True, slots=True)
class Replay:
    """A past answer and the one that the same question gets now.

    `differences` names what is not as it was; without any, prompt and text are the same.
    """

    before: Answer
    now: Answer
    differences: tuple[str, ...]

    @property
    def same_text(self) -> bool:
        """Whether the answer reads as it did."""
        return self.before.answer == self.now.answer

    def to_json(self) -> dict[str, Any]:
        """Return the object that `fathom replay --json` prints."""
        return {
            "receipt": self.before.receipt.id,
            "replayed_as": self.now.receipt.id,
            "same_text": self.same_text,
            "same_prompt": self.before.receipt.prompt_sha256 == self.now.receipt.prompt_sha256,
            "differences": list(self.differences),
            "before": self.before.answer,
            "now": self.now.answer,
        }


def replay(receipt_id: str, receipts: ReceiptStore, service: AnsweringService) -> Replay:
    """Answer the question of a receipt again; the new answer gets a receipt of its own.

    Args:
        receipt_id: of the past answer.
        receipts: where it is stored.
        service: answers with the model it has; name the receipt's own to get the same text.

    Raises:
        DocumentNotFoundError: if there is no such receipt, or one of its documents is gone.
        ReplayError: if its words were deleted with a document.
    """
    before = receipts.load(receipt_id)
    question, document_ids = receipts.asked(receipt_id)
    if question == REDACTED:
        raise ReplayError(
            f"the question of receipt {receipt_id} was deleted with a document it read",
            hint="nothing is left to replay; ask anew of the documents that are there",
        )
    now = service.again(question, before.receipt, document_ids)
    pairs = (
        ("model", before.receipt.model, now.receipt.model),
        ("embedder", before.receipt.embedder, now.receipt.embedder),
        ("cache", before.receipt.kv_dtype or "its own", now.receipt.kv_dtype or "its own"),
        ("route", before.receipt.route, now.receipt.route),
        ("prompt", before.receipt.prompt_sha256[:12], now.receipt.prompt_sha256[:12]),
        ("text", before.answer, now.answer),
    )
    return Replay(
        before,
        now,
        tuple(f"{what}: {old!s} then, {new!s} now" for what, old, new in pairs if old != new),
    )
