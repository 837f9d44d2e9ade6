"""What can be wrong inside the store although each table is well formed, and how it is mended."""

from collections.abc import Iterator

import numpy as np
from sqlalchemy import String, cast, delete, func, insert, select, update

from rag.store.database import Database, upsert
from rag.store.schema import (
    answer,
    answer_document,
    chunk,
    chunk_vector,
    collection_member,
    document,
    document_text,
    meta,
    oplog,
    page,
    section,
    source_version,
    token_count,
)

VECTORS_PER_READ = 5_000
UNIT_TOLERANCE = 1e-3

# (table, its column, the table whose id that is)
_PARENTS = (
    (document_text, document_text.c.document_id, document.c.id),
    (page, page.c.document_id, document.c.id),
    (section, section.c.document_id, document.c.id),
    (chunk, chunk.c.document_id, document.c.id),
    (source_version, source_version.c.document_id, document.c.id),
    (collection_member, collection_member.c.document_id, document.c.id),
    (token_count, token_count.c.document_id, document.c.id),
    (chunk_vector, chunk_vector.c.chunk_id, chunk.c.id),
    (answer_document, answer_document.c.answer_id, answer.c.id),
)

_RIGHT_SCOPE = "d" + cast(chunk.c.document_id, String)


class StoreIntegrity:
    """Questions to the store that doctor asks; each has the repair beside it."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def missing_triggers(self) -> list[str]:
        """Return the names of the triggers that keep full-text rows and op-log, and are gone."""
        with self._database.read() as connection:
            return self._database.missing_triggers(connection)

    def restore_triggers(self) -> None:
        """Create the missing triggers again."""
        with self._database.write() as connection:
            self._database.restore_triggers(connection)

    def orphans(self) -> dict[str, int]:
        """Return how many rows of each table belong to a document, chunk or answer that is gone."""
        found: dict[str, int] = {}
        with self._database.read() as connection:
            for table, column, parent in _PARENTS:
                lost = select(func.count()).select_from(table).where(column.not_in(select(parent)))
                found[table.name] = connection.scalar(lost) or 0
        return {name: number for name, number in found.items() if number}

    def delete_orphans(self) -> None:
        """Delete the rows that `orphans` counts."""
        with self._database.write() as connection:
            for table, column, parent in _PARENTS:
                connection.execute(delete(table).where(column.not_in(select(parent))))
            self._database.erase_deleted_words(connection)
        self._database.erase_deleted()

    def nameless(self) -> list[int]:
        """Return the documents that no name stands or stood for: nothing lists or searches them."""
        named = select(source_version.c.document_id)
        query = select(document.c.id).where(document.c.id.not_in(named)).order_by(document.c.id)
        with self._database.read() as connection:
            return list(connection.scalars(query))

    def restore_name(self, document_id: int) -> None:
        """Let a document's own name stand for it again, as its newest version."""
        with self._database.write() as connection:
            row = connection.execute(select(document).where(document.c.id == document_id)).one()
            newest = connection.scalar(
                select(func.max(source_version.c.version)).where(
                    source_version.c.owner == row.owner,
                    source_version.c.source == row.source,
                )
            )
            version = max(row.version, (newest or 0) + 1)
            connection.execute(
                insert(source_version).values(
                    owner=row.owner,
                    source=row.source,
                    version=version,
                    title=row.title,
                    document_id=document_id,
                )
            )

    def log_floor_beyond_end(self) -> tuple[int, int] | None:
        """Return (floor, last number given) if the log's floor lies beyond its end, or None.

        Entries written after that would pass below the floor, and an index would miss them.
        """
        with self._database.read() as connection:
            floor = int(
                connection.scalar(select(meta.c.value).where(meta.c.key == "oplog_floor")) or 0
            )
            last = self._database.last_number(connection, oplog)
        return (floor, last) if floor > last else None

    def lower_log_floor(self) -> None:
        """Set the floor to the last number given: every index starts anew."""
        with self._database.write() as connection:
            last = self._database.last_number(connection, oplog)
            upsert(connection, meta, [{"key": "oplog_floor", "value": str(last)}])

    def wrong_scopes(self) -> list[int]:
        """Return the documents with chunks whose full-text scope names another document."""
        query = select(chunk.c.document_id).where(chunk.c.scope != _RIGHT_SCOPE).distinct()
        with self._database.read() as connection:
            return sorted(connection.scalars(query))

    def restore_scopes(self) -> None:
        """Set every chunk's scope to its document; the full-text rows must be built anew."""
        wrong = chunk.c.scope != _RIGHT_SCOPE
        with self._database.write() as connection:
            connection.execute(update(chunk).where(wrong).values(scope=_RIGHT_SCOPE))

    def bad_vectors(self, embedder: str, dim: int) -> Iterator[tuple[int, str]]:
        """Yield (chunk id, what is wrong) for each vector that is missing or cannot be one."""
        last = 0
        vectors = chunk_vector.c
        joined = chunk.outerjoin(
            chunk_vector, (vectors.chunk_id == chunk.c.id) & (vectors.embedder == embedder)
        )
        query = select(chunk.c.id, vectors.vector).select_from(joined).order_by(chunk.c.id)
        while True:
            with self._database.read() as connection:
                part = query.where(chunk.c.id > last).limit(VECTORS_PER_READ)
                rows = connection.execute(part).all()
            if not rows:
                return
            last = rows[-1].id
            for row in rows:
                wrong = _wrong_with(row.vector, dim)
                if wrong:
                    yield row.id, wrong

    def num_vectors_of_others(self, embedder: str) -> int:
        """Return how many vectors of other embedders lie beside those in use."""
        query = select(func.count()).select_from(chunk_vector)
        with self._database.read() as connection:
            return connection.scalar(query.where(chunk_vector.c.embedder != embedder)) or 0


def _wrong_with(blob: bytes | None, dim: int) -> str | None:
    if blob is None:
        return "has no vector"
    if len(blob) != 4 * dim:
        return f"has a vector of {len(blob)} bytes instead of {4 * dim}"
    length = float(np.linalg.norm(np.frombuffer(blob, dtype=np.float32)))
    if not abs(length - 1.0) < UNIT_TOLERANCE:  # not: nan compares false
        return f"has a vector of length {length:.3g} instead of 1"
    return None
