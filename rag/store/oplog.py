"""The op-log: what a derived index replays to catch up with the store."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection, delete, func, select, update

from rag.store.database import Database, chunk, meta, oplog

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


class OpLog:
    """The log of added and deleted chunks of one library."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def last_seq(self) -> int:
        """Return the position of the newest entry."""
        with self._database.read() as connection:
            return _last_seq(connection)

    def changes_since(self, seq: int, *, limit: int = PAGE) -> Changes | None:
        """Return what the next `limit` entries after `seq` did, as of now.

        Empty changes that end at `seq` mean that there is nothing more. None means that the log
        no longer reaches back that far.
        """
        joined = oplog.outerjoin(chunk, chunk.c.id == oplog.c.chunk_id)
        query = (
            select(oplog.c.seq, oplog.c.op, oplog.c.chunk_id, chunk.c.vector)
            .select_from(joined)
            .where(oplog.c.seq > seq)
            .order_by(oplog.c.seq)
            .limit(limit)
        )
        with self._database.read() as connection:
            if seq < _floor(connection):
                return None
            rows = connection.execute(query).all()
        live = {r.chunk_id: r.vector for r in rows if r.op == "add" and r.vector is not None}
        return Changes(
            seq=rows[-1].seq if rows else seq,
            removed=sorted({row.chunk_id for row in rows}),
            added=list(live),
            vectors=_stack(list(live.values())),
        )

    def num_vectors(self) -> int:
        """Return how many vectors are stored."""
        with self._database.read() as connection:
            return connection.scalar(select(func.count()).select_from(chunk)) or 0

    def vectors(self) -> Iterator[tuple[list[int], FloatArray]]:
        """Yield all stored vectors in pages: chunk ids in order, float32 [len(ids), dim].

        Each page is a transaction of its own, so that a long build holds nothing up. Take
        `last_seq` before, and apply `changes_since` it afterwards.
        """
        last = 0
        while True:
            query = select(chunk.c.id, chunk.c.vector).where(chunk.c.id > last)
            with self._database.read() as connection:
                rows = connection.execute(query.order_by(chunk.c.id).limit(PAGE)).all()
            if not rows:
                return
            yield [row.id for row in rows], _stack([row.vector for row in rows])
            last = rows[-1].id

    def truncate(self, seq: int) -> None:
        """Drop entries up to `seq`; an index that is older must start anew from `vectors`."""
        with self._database.write() as connection:
            floor = max(seq, _floor(connection))
            connection.execute(delete(oplog).where(oplog.c.seq <= seq))
            connection.execute(
                update(meta).where(meta.c.key == "oplog_floor").values(value=str(floor))
            )


def _floor(connection: Connection) -> int:
    return int(connection.scalar(select(meta.c.value).where(meta.c.key == "oplog_floor")) or 0)


def _last_seq(connection: Connection) -> int:
    newest = connection.scalar(select(func.max(oplog.c.seq)))
    return max(newest or 0, _floor(connection))


def _stack(blobs: list[bytes]) -> FloatArray:
    if not blobs:
        return np.empty((0, 0), dtype=np.float32)
    return np.stack([np.frombuffer(blob, dtype=np.float32) for blob in blobs])
