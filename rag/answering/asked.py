"""One question on its way to an answer."""

from collections.abc import Sequence
from dataclasses import dataclass

from rag.answering.naming import Named
from rag.types import Document, Route


@dataclass(frozen=True, slots=True)
class Asked:
    """One question on its way: as it was typed, as it stands alone, and when it came.

    `about` are all documents that it was asked about, `named` those that it names, if it does.
    `keeps_half` says whether an answer that a stop cuts short is one.
    """

    typed: str
    question: str
    about: Sequence[Document]
    named: Named
    started: float
    asked_for: Route | None
    may_read_more: bool
    keeps_half: bool = True

    @property
    def documents(self) -> Sequence[Document]:
        """The documents that are asked."""
        return self.named.documents
