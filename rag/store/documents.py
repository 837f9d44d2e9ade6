"""Queries on documents, their text, pages, sections and chunks. Rows never leave this file."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection, Row, delete, func, insert, select, update

from rag.errors import DocumentNotFoundError, EmbedderMismatchError
from rag.store import receipts
from rag.store.database import (
    Database,
    chunk,
    document,
    document_text,
    meta,
    page,
    section,
    token_count,
)
from rag.types import CanonicalText, Chunk, Document, Page, Section

FloatArray = npt.NDArray[np.float32]
HEADING_SEPARATOR = " > "


@dataclass(frozen=True, slots=True)
class SourceFile:
    """What is known of a file before it is read: identity, display title, hash and size."""

    source: str
    title: str
    content_sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A chunk as it lies in the store."""

    id: int
    document_id: int
    chunk: Chunk


class DocumentStore:
    """The documents of one library."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # ---- finding -----------------------------------------------------------------------------

    def all(self, *, include_superseded: bool = False) -> list[Document]:
        """Return the documents in the order of their ids, latest versions only by default."""
        query = select(document).order_by(document.c.id)
        if not include_superseded:
            query = query.where(document.c.is_latest)
        with self._database.read() as connection:
            return [_document(row) for row in connection.execute(query)]

    def by_content(self, content_sha256: str) -> Document | None:
        """Return the document whose file has this SHA-256, or None."""
        query = select(document).where(document.c.content_sha256 == content_sha256)
        with self._database.read() as connection:
            row = connection.execute(query).first()
        return _document(row) if row else None

    def find(self, reference: str) -> Document:
        """Return the document with this id, source or title (its latest version).

        Raises:
            DocumentNotFoundError: if none or several match.
        """
        every = self.all(include_superseded=True)
        matches = [d for d in every if str(d.id) == reference]
        latest = [d for d in every if d.is_latest]
        matches = matches or [d for d in latest if d.source == reference]
        matches = matches or [d for d in latest if d.title == reference]
        if len(matches) == 1:
            return matches[0]
        if matches:
            ids = ", ".join(str(d.id) for d in matches)
            raise DocumentNotFoundError(
                f"{len(matches)} documents are titled {reference!r}: numbers {ids}",
                hint="give the number instead",
            )
        known = ", ".join(f"{d.id} {d.title!r}" for d in latest[:5]) or "none"
        raise DocumentNotFoundError(
            f"no document {reference!r}; there are {len(latest)}: {known}",
            hint="fathom list shows all of them with their numbers",
        )

    # ---- reading -----------------------------------------------------------------------------

    def text(self, document_id: int, start: int = 0, end: int | None = None) -> str:
        """Return characters `[start, end)` of the canonical text, in code points."""
        length = 2**53 if end is None else max(0, end - start)
        query = select(func.substr(document_text.c.text, start + 1, length)).where(
            document_text.c.document_id == document_id
        )
        with self._database.read() as connection:
            return str(connection.scalar(query) or "")

    def pages(self, document_id: int) -> list[Page]:
        """Return the pages in order; empty where the format has none."""
        query = select(page).where(page.c.document_id == document_id).order_by(page.c.number)
        with self._database.read() as connection:
            return [Page(r.number, r.label, r.start, r.end) for r in connection.execute(query)]

    def sections(self, document_id: int) -> list[Section]:
        """Return the headings in the order of the text."""
        query = select(section).where(section.c.document_id == document_id)
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(section.c.ordinal))
            return [Section(r.level, r.title, r.start) for r in rows]

    def chunks(self, chunk_ids: Sequence[int]) -> dict[int, StoredChunk]:
        """Return those of the given chunks that still exist, keyed by id."""
        query = select(chunk).where(chunk.c.id.in_(chunk_ids))
        with self._database.read() as connection:
            return {row.id: _stored_chunk(row) for row in connection.execute(query)}

    def chunks_of(self, document_id: int) -> list[StoredChunk]:
        """Return a document's chunks in order."""
        query = select(chunk).where(chunk.c.document_id == document_id).order_by(chunk.c.ordinal)
        with self._database.read() as connection:
            return [_stored_chunk(row) for row in connection.execute(query)]

    def chunk_ids(self, document_ids: Sequence[int]) -> list[int]:
        """Return the ids of all chunks of the given documents."""
        query = select(chunk.c.id).where(chunk.c.document_id.in_(document_ids))
        with self._database.read() as connection:
            return list(connection.scalars(query))

    def num_chunks(self) -> int:
        """Return how many chunks there are, superseded versions included."""
        with self._database.read() as connection:
            return connection.scalar(select(func.count()).select_from(chunk)) or 0

    # ---- writing -----------------------------------------------------------------------------

    def save(
        self,
        source: SourceFile,
        content: CanonicalText,
        chunks: Sequence[Chunk],
        vectors: FloatArray,
        *,
        embedder: str,
    ) -> Document:
        """Store one document with everything derived from it in one transaction.

        Text, pages, sections, chunks, vectors, lexical rows and op-log stand or fall together;
        when this returns, they are on disk. Saving the same bytes again returns what is stored.

        Args:
            source: identity, hash and size of the file.
            content: the canonical text with its pages and sections.
            chunks: stretches of that text.
            vectors: float32 [len(chunks), dim], unit length.
            embedder: fingerprint of the embedder; one library has one.

        Raises:
            EmbedderMismatchError: if the library's vectors come from another embedder.
            StorageFullError: if the disk is full; nothing was kept.
        """
        assert len(chunks) == len(vectors)
        with self._database.write() as connection:
            known = connection.execute(
                select(document).where(document.c.content_sha256 == source.content_sha256)
            ).first()
            if known:
                return _document(known)
            _claim_embedder(connection, embedder)
            latest = connection.scalar(
                select(func.max(document.c.version)).where(document.c.source == source.source)
            )
            connection.execute(
                update(document).where(document.c.source == source.source).values(is_latest=False)
            )
            values = {
                "title": source.title,
                "source": source.source,
                "version": (latest or 0) + 1,
                "is_latest": True,
                "content_sha256": source.content_sha256,
                "media_type": content.media_type,
                "num_bytes": source.num_bytes,
                "num_chars": len(content.text),
                "num_pages": len(content.pages),
                "num_chunks": len(chunks),
                "warnings": json.dumps(content.warnings),
                "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            document_id = connection.execute(insert(document).values(values)).lastrowid
            _insert_parts(connection, document_id, content, chunks, vectors)
            row = connection.execute(select(document).where(document.c.id == document_id)).one()
            return _document(row)

    def delete(self, document_id: int) -> None:
        """Delete one document, its chunks, vectors, lexical rows, and the answers' quotations.

        If it was the latest version of its source, the version before it becomes the latest.
        """
        with self._database.write() as connection:
            row = connection.execute(select(document).where(document.c.id == document_id)).first()
            if row is None:
                return
            receipts.redact(connection, document_id)
            # Not left to the cascade: SQLite fires triggers for it only if told to.
            connection.execute(delete(chunk).where(chunk.c.document_id == document_id))
            connection.execute(delete(document).where(document.c.id == document_id))
            newest = connection.scalar(
                select(func.max(document.c.version)).where(document.c.source == row.source)
            )
            connection.execute(
                update(document)
                .where(document.c.source == row.source, document.c.version == newest)
                .values(is_latest=True)
            )
        self._database.erase_freed_pages()

    # ---- token counts ------------------------------------------------------------------------

    def token_counts(self, document_ids: Iterable[int], tokenizer: str) -> dict[int, int]:
        """Return the stored token counts of the given documents under one tokenizer."""
        query = select(token_count.c.document_id, token_count.c.num_tokens).where(
            token_count.c.tokenizer == tokenizer, token_count.c.document_id.in_(list(document_ids))
        )
        with self._database.read() as connection:
            return {row.document_id: row.num_tokens for row in connection.execute(query)}

    def save_token_count(self, document_id: int, tokenizer: str, num_tokens: int) -> None:
        """Remember how many tokens a document has under one tokenizer."""
        with self._database.write() as connection:
            connection.execute(
                insert(token_count)
                .prefix_with("OR REPLACE")
                .values(document_id=document_id, tokenizer=tokenizer, num_tokens=num_tokens)
            )


def _insert_parts(
    connection: Connection,
    document_id: int,
    content: CanonicalText,
    chunks: Sequence[Chunk],
    vectors: FloatArray,
) -> None:
    connection.execute(insert(document_text).values(document_id=document_id, text=content.text))
    if content.pages:
        connection.execute(
            insert(page),
            [
                {
                    "document_id": document_id,
                    "number": p.number,
                    "label": p.label,
                    "start": p.start,
                    "end": p.end,
                }
                for p in content.pages
            ],
        )
    if content.sections:
        connection.execute(
            insert(section),
            [
                {
                    "document_id": document_id,
                    "ordinal": ordinal,
                    "level": s.level,
                    "title": s.title,
                    "start": s.start,
                }
                for ordinal, s in enumerate(content.sections)
            ],
        )
    connection.execute(
        insert(chunk),
        [
            {
                "document_id": document_id,
                "ordinal": c.ordinal,
                "start": c.start,
                "end": c.end,
                "page_first": c.page_first,
                "page_last": c.page_last,
                "heading": HEADING_SEPARATOR.join(c.heading_path),
                "num_tokens": c.num_tokens,
                "text": c.text,
                "scope": f"d{document_id}",
                "vector": np.ascontiguousarray(vector, dtype=np.float32).tobytes(),
            }
            for c, vector in zip(chunks, vectors, strict=True)
        ],
    )


def _claim_embedder(connection: Connection, embedder: str) -> None:
    stored = connection.scalar(select(meta.c.value).where(meta.c.key == "embedder"))
    has_chunks = connection.execute(select(chunk.c.id).limit(1)).first() is not None
    if stored == embedder:
        return
    if stored is not None and has_chunks:
        raise EmbedderMismatchError(
            f"the library's vectors come from {stored}; the embedder in use is {embedder}",
            hint="set FATHOM_EMBEDDER back, or ingest into a new --home",
        )
    connection.execute(
        insert(meta).prefix_with("OR REPLACE").values(key="embedder", value=embedder)
    )


def _document(row: Row[Any]) -> Document:
    fields = dict(row._mapping)
    fields["warnings"] = tuple(json.loads(fields["warnings"]))
    return Document(**fields)


def _stored_chunk(row: Row[Any]) -> StoredChunk:
    return StoredChunk(
        id=row.id,
        document_id=row.document_id,
        chunk=Chunk(
            ordinal=row.ordinal,
            start=row.start,
            end=row.end,
            text=row.text,
            num_tokens=row.num_tokens,
            page_first=row.page_first,
            page_last=row.page_last,
            heading_path=tuple(row.heading.split(HEADING_SEPARATOR)) if row.heading else (),
        ),
    )
