"""The op-log: what a derived index replays to catch up with the store."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sqlalchemy import ColumnElement, Connection, delete, func, select, true

from rag.store.database import ROWS_PER_FETCH, Database, upsert
from rag.store.schema import chunk, chunk_vector, meta, oplog

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Changes:
    """The net effect of the log after a position: ids to remove, then vectors to add.

    `vectors` is float32 [len(added), dim]. Both steps may be applied twice without harm.
    """

    seq: int
    removed: list[int]
    added: list[int]
    vectors: FloatArray


@dataclass(frozen=True, slots=True)
class ChunkText:
    """What a full-text index takes of a chunk."""

    chunk_id: int
    document_id: int
    heading: str
    text: str


@dataclass(frozen=True, slots=True)
class TextChanges:
    """The net effect of the log for a full-text index; `added` is read from the store as it goes.

    As with `Changes`, both steps may be applied twice without harm.
    """

    seq: int
    removed: list[int]
    added: Iterator[ChunkText]


class OpLog:
    """The log of added and deleted chunks of one library, with the vectors of one embedder.

    A chunk that has no vector of this embedder yet is absent from `added`; when all have one,
    `DocumentStore.activate_embedder` makes the embedder the library's own.
    """

    def __init__(self, database: Database, embedder: str) -> None:
        self._database = database
        self._embedder = embedder

    def last_seq(self) -> int:
        """Return the position of the newest entry."""
        with self._database.read() as connection:
            return _last_seq(connection)

    def changes_since(self, seq: int) -> Changes | None:
        """Return what happened after `seq`, or None if the log no longer reaches back that far."""
        later = select(oplog.c.seq, oplog.c.chunk_id).where(oplog.c.seq > seq)
        added_later = select(oplog.c.chunk_id).where(oplog.c.seq > seq, oplog.c.op == "add")
        with self._database.read() as connection:
            if seq < _floor(connection):
                return None
            entries = connection.execute(later.order_by(oplog.c.seq)).all()
            # a number is never given twice: a chunk that was added and is there was not deleted
            added, vectors = self._vectors(connection, chunk_vector.c.chunk_id.in_(added_later))
        removed = sorted({entry.chunk_id for entry in entries})
        return Changes(entries[-1].seq if entries else seq, removed, added, vectors)

    def everything(self) -> Changes:
        """Return all chunks as one change, from one consistent snapshot."""
        with self._database.read() as connection:
            seq = _last_seq(connection)
            added, vectors = self._vectors(connection, true())
        return Changes(seq, [], added, vectors)

    def _vectors(
        self, connection: Connection, which: ColumnElement[bool]
    ) -> tuple[list[int], FloatArray]:
        """Return chunk ids and float32 [len(ids), dim]; rows are streamed into the one matrix."""
        wanted = (chunk_vector.c.embedder == self._embedder, which)
        count = select(func.count()).select_from(chunk_vector).where(*wanted)
        query = select(chunk_vector.c.chunk_id, chunk_vector.c.vector).where(*wanted)
        num_vectors = connection.scalar(count) or 0
        ids: list[int] = []
        vectors = np.empty((num_vectors, 0), dtype=np.float32)
        rows = connection.execute(
            query.order_by(chunk_vector.c.chunk_id),
            execution_options={"yield_per": ROWS_PER_FETCH},
        )
        for row in rows:
            vector = np.frombuffer(row.vector, dtype=np.float32)
            if not ids:
                vectors = np.empty((num_vectors, len(vector)), dtype=np.float32)
            vectors[len(ids)] = vector
            ids.append(row.chunk_id)
        return ids, vectors

    def truncate(self, seq: int) -> None:
        """Drop entries up to `seq`; an index that is older must start anew from everything()."""
        with self._database.write() as connection:
            floor = max(seq, _floor(connection))
            connection.execute(delete(oplog).where(oplog.c.seq <= seq))
            upsert(connection, meta, [{"key": "oplog_floor", "value": str(floor)}])


class TextLog:
    """The log of added and deleted chunks of one library, with their texts."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def library(self) -> str:
        """Return the name that this database alone has."""
        with self._database.read() as connection:
            return str(connection.scalar(select(meta.c.value).where(meta.c.key == "library")))

    def last_seq(self) -> int:
        """Return the position of the newest entry."""
        with self._database.read() as connection:
            return _last_seq(connection)

    @contextmanager
    def changes_since(self, seq: int) -> Iterator[TextChanges | None]:
        """Yield what happened after `seq`, or None if that is not a position of this log any more.

        That is so if the log was cut beyond it, or if the library was restored to an earlier state.
        """
        added_later = select(oplog.c.chunk_id).where(oplog.c.seq > seq, oplog.c.op == "add")
        with self._database.read() as connection:
            if not _floor(connection) <= seq <= _last_seq(connection):
                yield None
                return
            query = select(oplog.c.chunk_id).where(oplog.c.seq > seq).distinct()
            removed = sorted(connection.scalars(query))
            added = _texts(connection, chunk.c.id.in_(added_later))
            yield TextChanges(_last_seq(connection), removed, added)

    @contextmanager
    def everything(self) -> Iterator[TextChanges]:
        """Yield all chunks as one change, from one consistent snapshot."""
        with self._database.read() as connection:
            yield TextChanges(_last_seq(connection), [], _texts(connection, true()))

    def chunk_ids(self) -> set[int]:
        """Return the ids of all chunks."""
        with self._database.read() as connection:
            return set(connection.scalars(select(chunk.c.id)))


def _texts(connection: Connection, which: ColumnElement[bool]) -> Iterator[ChunkText]:
    query = select(chunk.c.id, chunk.c.document_id, chunk.c.heading, chunk.c.text).where(which)
    rows = connection.execute(
        query.order_by(chunk.c.id), execution_options={"yield_per": ROWS_PER_FETCH}
    )
    for row in rows:
        yield ChunkText(row.id, row.document_id, row.heading, row.text)


def _floor(connection: Connection) -> int:
    return int(connection.scalar(select(meta.c.value).where(meta.c.key == "oplog_floor")) or 0)


def _last_seq(connection: Connection) -> int:
    newest = connection.scalar(select(func.max(oplog.c.seq)))
    return max(newest or 0, _floor(connection))
