"""Conversations: questions and answers in the order they were given, by owner."""

import json
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime

from sqlalchemy import Connection, delete, exists, func, insert, select, update

from rag.errors import DocumentNotFoundError
from rag.store.database import ROWS_PER_FETCH, Database
from rag.store.schema import answer, conversation, conversation_answer
from rag.types import Conversation, Exchange, answer_from_json, storable


class ConversationStore:
    """The conversations of one owner. What another owns is not there for this one.

    Only the order is kept here. Questions and answers are those of the receipts, so what a deleted
    document said is taken out of them by `receipts.redact`.
    """

    def __init__(self, database: Database, owner: str = "") -> None:
        self._database = database
        self._owner = owner

    def all(self, search: str = "") -> list[Conversation]:
        """Return the conversations, the latest first.

        Args:
            search: only those whose title, questions or answers hold this, case apart.
        """
        with self._database.read() as connection:
            found = list(self._conversations(connection))
            if wanted := search.strip().casefold():
                said = self._ids_saying(connection, wanted)
                found = [c for c in found if c.id in said or wanted in c.title.casefold()]
        return found

    def exchanges(self, conversation_id: str) -> list[Exchange]:
        """Return the questions with their answers, in order.

        Raises:
            DocumentNotFoundError: if there is no such conversation.
        """
        query = (
            select(conversation_answer.c.exchange, answer.c.question, answer.c.body)
            .join(answer, answer.c.id == conversation_answer.c.answer_id)
            .where(conversation_answer.c.conversation_id == conversation_id)
            .order_by(conversation_answer.c.ordinal)
        )
        with self._database.read() as connection:
            self._require(connection, conversation_id)
            rows = connection.execute(query).all()
        found: dict[int, Exchange] = {}
        for row in rows:
            before = found.get(row.exchange)
            given = answer_from_json(json.loads(row.body))
            found[row.exchange] = (
                Exchange(before.question, (*before.answers, given))
                if before
                else Exchange(row.question, (given,))
            )
        return [found[number] for number in sorted(found)]

    def add(
        self, receipt_id: str, conversation_id: str | None = None, *, again: str | None = None
    ) -> str:
        """Put a stored answer at the end of a conversation; return the conversation's id.

        Args:
            receipt_id: of the answer.
            conversation_id: None begins a new one.
            again: the receipt of an answer to the same question, beside which this one belongs.

        Raises:
            DocumentNotFoundError: if there is no such conversation.
        """
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        mine = conversation_answer.c.conversation_id
        with self._database.write() as connection:
            if conversation_id is None:
                conversation_id = uuid.uuid4().hex
                row = {"id": conversation_id, "owner": self._owner}
                connection.execute(
                    insert(conversation).values(row | {"created_at": now, "updated_at": now})
                )
            self._require(connection, conversation_id)
            last = connection.execute(
                select(
                    func.max(conversation_answer.c.ordinal).label("ordinal"),
                    func.max(conversation_answer.c.exchange).label("exchange"),
                ).where(mine == conversation_id)
            ).one()
            beside = connection.scalar(
                select(conversation_answer.c.exchange).where(
                    mine == conversation_id, conversation_answer.c.answer_id == again
                )
            )
            connection.execute(
                insert(conversation_answer).values(
                    conversation_id=conversation_id,
                    ordinal=0 if last.ordinal is None else last.ordinal + 1,
                    exchange=_next(last.exchange) if beside is None else beside,
                    answer_id=receipt_id,
                )
            )
            self._change(connection, conversation_id, updated_at=now)
        return conversation_id

    def rename(self, conversation_id: str, title: str) -> None:
        """Give a conversation a title of the person's own; an empty one takes it away.

        Raises:
            DocumentNotFoundError: if there is no such conversation.
        """
        with self._database.write() as connection:
            self._require(connection, conversation_id)
            self._change(connection, conversation_id, title=storable(title.strip()) or None)

    def delete(self, conversation_id: str) -> None:
        """Delete a conversation with its questions, answers and receipts.

        Raises:
            DocumentNotFoundError: if there is no such conversation.
        """
        mine = conversation_answer.c.conversation_id == conversation_id
        with self._database.write() as connection:
            self._require(connection, conversation_id)
            doomed = list(connection.scalars(select(conversation_answer.c.answer_id).where(mine)))
            connection.execute(delete(conversation_answer).where(mine))
            connection.execute(delete(conversation).where(conversation.c.id == conversation_id))
            for receipt_id in doomed:
                connection.execute(delete(answer).where(answer.c.id == receipt_id))
        self._database.erase_deleted()

    def _conversations(self, connection: Connection) -> Iterator[Conversation]:
        of = conversation_answer.c.conversation_id
        first = (
            select(answer.c.question)
            .join(conversation_answer, conversation_answer.c.answer_id == answer.c.id)
            .where(of == conversation.c.id)
            .order_by(conversation_answer.c.ordinal)
            .limit(1)
            .scalar_subquery()
        )
        num_questions = (
            select(func.count(conversation_answer.c.exchange.distinct()))
            .where(of == conversation.c.id)
            .scalar_subquery()
        )
        query = (
            select(conversation, first.label("first"), num_questions.label("num_questions"))
            .where(conversation.c.owner == self._owner)
            .order_by(conversation.c.updated_at.desc(), conversation.c.id)
        )
        for row in connection.execute(query):
            title = row.title or row.first or "without a question"
            yield Conversation(row.id, title, row.created_at, row.updated_at, row.num_questions)

    def _ids_saying(self, connection: Connection, wanted: str) -> set[str]:
        """Return the ids of conversations in which a question or an answer holds these words.

        Every answer is looked at: neither database knows the case of all letters in JSON.
        """
        query = (
            select(conversation_answer.c.conversation_id, answer.c.question, answer.c.body)
            .join(answer, answer.c.id == conversation_answer.c.answer_id)
            .join(conversation, conversation.c.id == conversation_answer.c.conversation_id)
            .where(conversation.c.owner == self._owner)
        )
        found: set[str] = set()
        for row in connection.execute(query, execution_options={"yield_per": ROWS_PER_FETCH}):
            if row.conversation_id in found:
                continue
            words = (row.question, json.loads(row.body)["answer"])
            if any(wanted in text.casefold() for text in words):
                found.add(row.conversation_id)
        return found

    def _require(self, connection: Connection, conversation_id: str) -> None:
        there = exists().where(
            conversation.c.id == conversation_id, conversation.c.owner == self._owner
        )
        if not connection.scalar(select(there)):
            raise DocumentNotFoundError(
                "this conversation is no longer there",
                hint="it was deleted in another window; begin a new one",
            )

    def _change(self, connection: Connection, conversation_id: str, **values: str | None) -> None:
        connection.execute(
            update(conversation).where(conversation.c.id == conversation_id).values(values)
        )


def _next(exchange: int | None) -> int:
    return 0 if exchange is None else exchange + 1
