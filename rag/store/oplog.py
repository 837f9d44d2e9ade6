"""The op-log: what a derived index replays to catch up with the store."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection, ScalarSelect, Select, delete, func, insert, select

from rag.errors import EmbedderMismatchError, StoreError
from rag.store.database import ROWS_PER_FETCH, Database, upsert
from rag.store.schema import chunk, chunk_vector, meta, oplog

FloatArray = npt.NDArray[np.float32]
PAGE = 5_000  # entries or vectors in memory at a time


@dataclass(frozen=True, slots=True)
class Changes:
    """The net effect of a stretch of the log: ids to remove, then vectors to add.

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
    """The net effect of the log for a full-text index.

    `changed` are the chunks added or deleted since, in order; `texts(first, last)` reads from the
    store those that exist now with an id from `first` to `last`, in order.
    """

    seq: int
    changed: list[int]
    texts: Callable[[int, int], Iterator[ChunkText]]


class OpLog:
    """The log of added and deleted chunks of one library, with the vectors of one embedder.

    A chunk that has no vector of this embedder yet is absent from `added`; when all have one,
    `DocumentStore.activate_embedder` makes the embedder the library's own.
    """

    def __init__(self, database: Database, embedder: str) -> None:
        self._database = database
        self._embedder = embedder

    def library(self) -> str:
        """Return the name that this database alone has."""
        with self._database.read() as connection:
            return _library(connection)

    def last_seq(self) -> int:
        """Return the position of the newest entry."""
        with self._database.read() as connection:
            return _last_seq(connection)

    def is_current(self, seq: int) -> bool:
        """Say whether nothing happened after entry `seq`, a change of the embedder included.

        One statement, because every question asks it.
        """
        with self._database.read() as connection:
            active, newest, floor = connection.execute(self._state).one()
        return active == self._embedder and seq == max(newest or 0, int(floor or 0))

    @cached_property
    def _state(self) -> Select[Any]:
        def value(key: str) -> ScalarSelect[Any]:
            return select(meta.c.value).where(meta.c.key == key).scalar_subquery()

        newest = select(func.max(oplog.c.seq)).scalar_subquery()
        return select(value("embedder"), newest, value("oplog_floor"))

    def require_active(self) -> None:
        """Raise EmbedderMismatchError if the library is searched with another embedder by now."""
        with self._database.read() as connection:
            active = connection.scalar(select(meta.c.value).where(meta.c.key == "embedder"))
        if active not in (None, self._embedder):
            raise EmbedderMismatchError(
                f"the library is searched with {active} now; this process embeds with"
                f" {self._embedder}",
                hint="set FATHOM_EMBEDDER to it and start again, or run fathom reembed",
            )

    def changes_since(self, seq: int, *, limit: int = PAGE) -> Changes | None:
        """Return what the next `limit` entries after `seq` did, as of now.

        Changes that end at `seq` are empty: there is nothing more. None means that the log no
        longer reaches back that far, or never came as far: the database was put back.
        """
        ours = chunk_vector.c.embedder == self._embedder
        with_vector = oplog.outerjoin(
            chunk_vector, (chunk_vector.c.chunk_id == oplog.c.chunk_id) & ours
        )
        query = (
            select(oplog.c.seq, oplog.c.op, oplog.c.chunk_id, chunk_vector.c.vector)
            .select_from(with_vector)
            .where(oplog.c.seq > seq)
        )
        with self._database.read() as connection:
            last_seq = _last_seq(connection)
            if seq == last_seq:  # as before most questions
                return Changes(seq, [], [], _stack([]))
            if not _floor(connection) <= seq < last_seq:
                return None
            rows = connection.execute(query.order_by(oplog.c.seq).limit(limit)).all()
        live = {r.chunk_id: r.vector for r in rows if r.op == "add" and r.vector is not None}
        return Changes(
            seq=rows[-1].seq if rows else seq,
            removed=sorted({row.chunk_id for row in rows}),
            added=list(live),
            vectors=_stack(list(live.values())),
        )

    def num_vectors(self) -> int:
        """Return how many vectors are stored."""
        query = select(func.count()).select_from(chunk_vector)
        with self._database.read() as connection:
            wanted = query.where(chunk_vector.c.embedder == self._embedder)
            return connection.scalar(wanted) or 0

    def vectors(self) -> Iterator[tuple[list[int], FloatArray]]:
        """Yield all stored vectors in pages: chunk ids in order, float32 [len(ids), dim].

        Each page is a transaction of its own, so that a long build holds nothing up. Take
        `last_seq` before, and apply `changes_since` it afterwards.
        """
        last = 0
        columns = select(chunk_vector.c.chunk_id, chunk_vector.c.vector)
        query = columns.where(chunk_vector.c.embedder == self._embedder)
        while True:
            page = query.where(chunk_vector.c.chunk_id > last)
            with self._database.read() as connection:
                rows = connection.execute(page.order_by(chunk_vector.c.chunk_id).limit(PAGE)).all()
            if not rows:
                return
            yield [row.chunk_id for row in rows], _stack([row.vector for row in rows])
            last = rows[-1].chunk_id

    def announce(self, *, changed: Sequence[int], gone: Sequence[int]) -> None:
        """Write entries for chunks whose vectors were put right, so that every index follows."""
        rows = [{"op": "add", "chunk_id": i} for i in changed]
        rows += [{"op": "del", "chunk_id": i} for i in gone]
        if rows:
            with self._database.write() as connection:
                connection.execute(insert(oplog), rows)

    def truncate(self, seq: int) -> None:
        """Drop entries up to `seq`; an index that is older must start anew from `vectors`."""
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
            return _library(connection)

    def last_seq(self) -> int:
        """Return the position of the newest entry."""
        with self._database.read() as connection:
            return _last_seq(connection)

    @contextmanager
    def changes_since(self, seq: int) -> Iterator[TextChanges | None]:
        """Yield what happened after `seq`, or None if that is not a position of this log any more.

        That is so if the log was cut beyond it, or if the library was restored to an earlier state.
        """
        query = select(oplog.c.chunk_id).where(oplog.c.seq > seq).distinct()
        with self._database.read() as connection:
            if not _floor(connection) <= seq <= _last_seq(connection):
                yield None
                return
            changed = sorted(connection.scalars(query))
            yield TextChanges(_last_seq(connection), changed, partial(_texts, connection))

    @contextmanager
    def everything(self) -> Iterator[TextChanges]:
        """Yield all chunks as one change, from one consistent snapshot."""
        with self._database.read() as connection:
            changed = list(connection.scalars(select(chunk.c.id).order_by(chunk.c.id)))
            yield TextChanges(_last_seq(connection), changed, partial(_texts, connection))

    def chunk_ids(self) -> set[int]:
        """Return the ids of all chunks."""
        with self._database.read() as connection:
            return set(connection.scalars(select(chunk.c.id)))


def _texts(connection: Connection, first: int, last: int) -> Iterator[ChunkText]:
    query = select(chunk.c.id, chunk.c.document_id, chunk.c.heading, chunk.c.text)
    rows = connection.execute(
        query.where(chunk.c.id.between(first, last)).order_by(chunk.c.id),
        execution_options={"yield_per": ROWS_PER_FETCH},
    )
    for row in rows:
        yield ChunkText(row.id, row.document_id, row.heading, row.text)


def _library(connection: Connection) -> str:
    return str(connection.scalar(select(meta.c.value).where(meta.c.key == "library")))


def _floor(connection: Connection) -> int:
    return int(connection.scalar(select(meta.c.value).where(meta.c.key == "oplog_floor")) or 0)


def _last_seq(connection: Connection) -> int:
    newest = connection.scalar(select(func.max(oplog.c.seq)))
    return max(newest or 0, _floor(connection))


def _stack(blobs: list[bytes]) -> FloatArray:
    if not blobs:
        return np.empty((0, 0), dtype=np.float32)
    if len({len(blob) for blob in blobs}) > 1:
        raise StoreError(
            "stored vectors differ in length", hint="fathom doctor --repair embeds them anew"
        )
    return np.stack([np.frombuffer(blob, dtype=np.float32) for blob in blobs])
