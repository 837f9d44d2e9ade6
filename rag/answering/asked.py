"""One question on its way to an answer."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rag.answering.naming import Named
from rag.errors import QuestionError
from rag.types import Document, Route, storable

# Of one question: some ten pages. What is longer is a document.
MAX_QUESTION_CHARS = 20_000


def askable(question: str) -> str:
    """Return a question as it is kept.

    Raises:
        QuestionError: if it has no word, or more than MAX_QUESTION_CHARS characters.
    """
    if len(question) > MAX_QUESTION_CHARS:
        raise QuestionError(
            f"the question has {len(question):,} characters; at most {MAX_QUESTION_CHARS:,} are"
            " read",
            hint="ingest the long part as a document, and ask about it",
        )
    if not re.search(r"\w", question):
        raise QuestionError("the question has no word", hint="say in words what is to be found")
    return storable(question)


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
