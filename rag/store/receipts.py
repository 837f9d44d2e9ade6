"""Questions, answers and their receipts."""

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from sqlalchemy import ColumnElement, Connection, delete, insert, select, true, update

from rag.errors import DocumentNotFoundError
from rag.store.database import ROWS_PER_FETCH, Database, id_batches
from rag.store.schema import (
    answer,
    answer_document,
    conversation,
    conversation_answer,
    document,
)
from rag.types import Answer, AnswerMode, Receipt, Route, answer_from_json, storable

REDACTED = "[deleted with its document]"


class ReceiptStore:
    """The answers given to one owner; `access.EVERY_OWNER` reads all."""

    def __init__(self, database: Database, owner: str | None = "") -> None:
        self._database = database
        self._owner = owner

    def save(self, question: str, given: Answer, document_ids: Sequence[int]) -> None:
        """Store one answer with the documents that were asked about.

        Of those that were deleted while the answer was written, no word is kept.
        """
        with self._database.write() as connection:
            connection.execute(
                insert(answer).values(
                    id=given.receipt.id,
                    owner=self._owner or "",
                    created_at=datetime.now(UTC).isoformat(timespec="seconds"),
                    question=storable(question),
                    body=json.dumps(given.to_json()),
                )
            )
            rows = [{"answer_id": given.receipt.id, "document_id": d} for d in document_ids]
            if rows:
                connection.execute(insert(answer_document), rows)
            existing: set[int] = set()
            for ids in id_batches(document_ids):
                query = select(document.c.id).where(document.c.id.in_(ids))
                existing.update(connection.scalars(query))
            for document_id in set(document_ids) - existing:
                redact(connection, document_id)

    def load(self, receipt_id: str) -> Answer:
        """Return a past answer.

        Raises:
            DocumentNotFoundError: if there is no such receipt.
        """
        query = select(answer.c.body).where(answer.c.id == receipt_id, self._is_own())
        with self._database.read() as connection:
            body = connection.scalar(query)
        if body is None:
            raise _no_receipt(receipt_id)
        return answer_from_json(json.loads(body))

    def asked(self, receipt_id: str) -> tuple[str, list[int]]:
        """Return the question of a past answer, and the documents it was asked of.

        Raises:
            DocumentNotFoundError: if there is no such receipt.
        """
        documents = select(answer_document.c.document_id).where(
            answer_document.c.answer_id == receipt_id
        )
        with self._database.read() as connection:
            asked = select(answer.c.question).where(answer.c.id == receipt_id, self._is_own())
            question = connection.scalar(asked)
            document_ids = list(connection.scalars(documents.order_by("document_id")))
        if question is None:
            raise _no_receipt(receipt_id)
        return question, document_ids

    def newest(self, most: int) -> list[Receipt]:
        """Return the receipts of the last questions, the newest first.

        A question asked again of the same documents counts once, as it was last answered.
        """
        about = select(answer_document).join(answer, answer.c.id == answer_document.c.answer_id)
        rows = select(answer).where(self._is_own()).order_by(answer.c.created_at.desc()).limit(most)
        found: dict[tuple[str, tuple[int, ...]], Receipt] = {}
        with self._database.read() as connection:
            documents: dict[str, list[int]] = {}
            within = about.where(self._is_own()).order_by(answer_document.c.document_id)
            for row in connection.execute(within):
                documents.setdefault(row.answer_id, []).append(row.document_id)
            for row in connection.execute(rows):
                asked = row.question, tuple(documents.get(row.id, ()))
                if asked not in found:
                    found[asked] = answer_from_json(json.loads(row.body)).receipt
        return list(found.values())

    def overruled(self) -> list[tuple[str, list[int], Answer, Answer]]:
        """Return (question, document ids, first, last) where a person overruled the router.

        `first` was written by the route that the router chose, full or retrieval, `last` after it
        by the other one, which was asked for. Routes asked for side by side overrule nothing.
        Questions of documents that are gone are left out.
        """
        asked: dict[tuple[str, tuple[int, ...]], dict[Route, Answer]] = {}
        with self._database.read() as connection:
            documents: dict[str, list[int]] = {}
            for row in connection.execute(select(answer_document).order_by("document_id")):
                documents.setdefault(row.answer_id, []).append(row.document_id)
            there = set(connection.scalars(select(document.c.id)))
            rows = connection.execute(
                select(answer).where(self._is_own()).order_by(answer.c.created_at),
                execution_options={"yield_per": ROWS_PER_FETCH},
            )
            for row in rows:
                ids = tuple(documents.get(row.id, ()))
                given = answer_from_json(json.loads(row.body))
                receipt = given.receipt
                by_prompt = receipt.route in (Route.FULL, Route.RETRIEVAL)
                if by_prompt and receipt.mode is AnswerMode.WRITTEN and there.issuperset(ids):
                    question = receipt.standalone_question or row.question
                    routes = asked.setdefault((question, ids), {})
                    routes.pop(receipt.route, None)  # the newest last
                    routes[receipt.route] = given
        return [
            (question, list(ids), *routes.values())  # type: ignore[misc]
            for (question, ids), routes in asked.items()
            if len(routes) == 2
            and ids
            and [given.receipt.asked_for is None for given in routes.values()] == [True, False]
        ]

    def since(
        self, moment: str, *, before: str | None = None
    ) -> list[tuple[str, str, tuple[int, ...]]]:
        """Return (receipt id, question, document ids in order) of the answers given since then.

        Args:
            moment: ISO 8601, UTC, in seconds; what was given in it counts.
            before: the same, None until now; what was given in it does not count.
        """
        within = self._is_own() & (answer.c.created_at >= moment)
        if before is not None:
            within &= answer.c.created_at < before
        rows = select(answer.c.id, answer.c.question).where(within).order_by("created_at")
        about = (
            select(answer_document)
            .join(answer, answer.c.id == answer_document.c.answer_id)
            .where(within)
            .order_by(answer_document.c.document_id)
        )
        with self._database.read() as connection:
            asked: dict[str, list[int]] = {}
            for row in connection.execute(about):
                asked.setdefault(row.answer_id, []).append(row.document_id)
            return [
                (row.id, row.question, tuple(asked.get(row.id, ())))
                for row in connection.execute(rows)
            ]

    def delete(self, receipt_ids: Iterable[str]) -> None:
        """Delete answers of the owner; those that are none of his stay."""
        with self._database.write() as connection:
            for receipt_id in receipt_ids:
                connection.execute(delete(answer).where(answer.c.id == receipt_id, self._is_own()))
        self._database.erase_deleted()

    def delete_all(self) -> None:
        """Delete every answer of the owner."""
        with self._database.write() as connection:
            connection.execute(delete(answer).where(self._is_own()))
        self._database.erase_deleted()

    def quoting_the_deleted(self) -> list[tuple[str, int]]:
        """Return (receipt id, document id) where an answer still has words of a deleted one."""
        found: list[tuple[str, int]] = []
        with self._database.read() as connection:
            there = set(connection.scalars(select(document.c.id)))
            asked: dict[str, set[int]] = {}
            for row in connection.execute(select(answer_document)):
                asked.setdefault(row.answer_id, set()).add(row.document_id)
            rows = connection.execute(
                select(answer.c.id, answer.c.body), execution_options={"yield_per": ROWS_PER_FETCH}
            )
            for row in rows:
                body = json.loads(row.body)
                if body["answer"] != REDACTED:
                    found += [(row.id, d) for d in sorted(asked.get(row.id, set()) - there)]
                    continue
                quoted = {c["document"] for c in body["citations"] if c["quote"] != REDACTED}
                found += [(row.id, d) for d in sorted(quoted - there)]
        return found

    def redact_deleted(self, document_id: int) -> None:
        """Take the words of a document that is gone out of the answers."""
        with self._database.write() as connection:
            redact(connection, document_id)
        self._database.erase_deleted()

    def _is_own(self) -> ColumnElement[bool]:
        return true() if self._owner is None else answer.c.owner == self._owner


def _no_receipt(receipt_id: str) -> DocumentNotFoundError:
    return DocumentNotFoundError(
        f"no receipt {receipt_id!r}", hint="the id stands in every answer's receipt"
    )


def redact(connection: Connection, document_id: int) -> None:
    """Take a deleted document's words out of every answer that read it; the numbers stay.

    Titles that a person gave to conversations about it go, too: they may quote it.
    """
    about = (
        select(conversation_answer.c.conversation_id)
        .join(answer_document, answer_document.c.answer_id == conversation_answer.c.answer_id)
        .where(answer_document.c.document_id == document_id)
    )
    connection.execute(update(conversation).where(conversation.c.id.in_(about)).values(title=None))
    query = (
        select(answer.c.id, answer.c.body)
        .join(answer_document, answer_document.c.answer_id == answer.c.id)
        .where(answer_document.c.document_id == document_id)
    )
    for row in connection.execute(query).all():
        body = json.loads(row.body)
        body["answer"] = REDACTED
        if body["receipt"].get("standalone_question"):
            body["receipt"]["standalone_question"] = REDACTED
        for citation in body["citations"]:
            if citation["document"] == document_id:
                citation.update(quote=REDACTED, title=REDACTED, section=None, verified=False)
        connection.execute(
            update(answer)
            .where(answer.c.id == row.id)
            .values(body=json.dumps(body), question=REDACTED)
        )
