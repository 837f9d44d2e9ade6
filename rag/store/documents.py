"""Queries on documents, their text, pages, sections and chunks. Rows never leave this file."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import (
    ColumnElement,
    Connection,
    CursorResult,
    Row,
    Select,
    delete,
    exists,
    func,
    insert,
    select,
    true,
    update,
)

from rag.errors import DocumentNotFoundError, EmbedderMismatchError, StoreError
from rag.store import receipts
from rag.store.database import Database, id_batches, upsert
from rag.store.schema import (
    chunk,
    chunk_vector,
    collection_member,
    document,
    document_text,
    meta,
    page,
    section,
    source_version,
    token_count,
)
from rag.types import CanonicalText, Chunk, Collection, Document, Page, Section, storable

FloatArray = npt.NDArray[np.float32]
HEADING_SEPARATOR = " > "
ROWS_PER_INSERT = 1_000


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

    def all(
        self, *, include_superseded: bool = False, collection: str | None = None
    ) -> list[Document]:
        """Return the documents in the order of their ids, latest versions only by default.

        Args:
            include_superseded: those too that no name stands for any more.
            collection: only the members of this collection.

        Raises:
            DocumentNotFoundError: if there is no such collection.
        """
        with self._database.read() as connection:
            if collection is None:
                return _documents(connection, true() if include_superseded else _is_latest())
            _require_collection(connection, collection)
            members = select(collection_member.c.document_id).where(
                collection_member.c.collection == collection
            )
            wanted = document.c.id.in_(members)
            return _documents(connection, wanted if include_superseded else wanted & _is_latest())

    def by_content(self, content_sha256: str) -> Document | None:
        """Return the document whose file has this SHA-256, or None."""
        with self._database.read() as connection:
            found = _documents(connection, document.c.content_sha256 == content_sha256)
        return found[0] if found else None

    def find(self, reference: str) -> Document:
        """Return the document with this id, or the one that a source or title stands for now.

        Raises:
            DocumentNotFoundError: if none or several match.
        """
        with self._database.read() as connection:
            for condition in _meanings(reference):
                matches = _documents(connection, condition)
                if matches:
                    break
            else:
                latest = _documents(connection, _is_latest())
                known = ", ".join(f"{d.id} {d.title!r}" for d in latest[:5]) or "none"
                raise DocumentNotFoundError(
                    f"no document {reference!r}; there are {len(latest)}: {known}",
                    hint="fathom list shows all of them with their numbers",
                )
        if len(matches) == 1:
            return matches[0]
        ids = ", ".join(str(d.id) for d in matches)
        raise DocumentNotFoundError(
            f"{len(matches)} documents are titled {reference!r}: numbers {ids}",
            hint="give the number instead",
        )

    # ---- reading -----------------------------------------------------------------------------

    def text(self, document_id: int, start: int = 0, end: int | None = None) -> str:
        """Return characters `[start, end)` of the canonical text, in code points."""
        column: ColumnElement[str] = document_text.c.text
        if end is not None:
            column = func.substr(column, start + 1, max(0, end - start))
        elif start:
            column = func.substr(column, start + 1)
        query = select(column).where(document_text.c.document_id == document_id)
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
        found: dict[int, StoredChunk] = {}
        with self._database.read() as connection:
            for ids in id_batches(chunk_ids):
                rows = connection.execute(select(chunk).where(chunk.c.id.in_(ids)))
                found.update((row.id, _stored_chunk(row)) for row in rows)
        return found

    def chunks_of(self, document_id: int) -> list[StoredChunk]:
        """Return a document's chunks in order."""
        query = select(chunk).where(chunk.c.document_id == document_id).order_by(chunk.c.ordinal)
        with self._database.read() as connection:
            return [_stored_chunk(row) for row in connection.execute(query)]

    def chunk_ids(self, document_ids: Sequence[int]) -> list[int]:
        """Return the ids of all chunks of the given documents."""
        found: list[int] = []
        with self._database.read() as connection:
            for ids in id_batches(document_ids):
                query = select(chunk.c.id).where(chunk.c.document_id.in_(ids))
                found += connection.scalars(query)
        return found

    def num_chunks(self) -> int:
        """Return how many chunks there are, superseded versions included."""
        with self._database.read() as connection:
            return connection.scalar(select(func.count()).select_from(chunk)) or 0

    # ---- writing -----------------------------------------------------------------------------

    def recall(self, file: SourceFile, *, collections: Sequence[str] = ()) -> Document | None:
        """Return the document with this very content, or None if it is not stored yet.

        The file's name stands for that document from now on, whatever it stood for before, and
        the document joins the collections. So content that a name goes back to, and content that
        another name has left, is searched again.
        """
        names = _collection_names(collections)
        with self._database.write() as connection:
            return _recall(connection, file, names)

    def save(
        self,
        source: SourceFile,
        content: CanonicalText,
        chunks: Sequence[Chunk],
        vectors: FloatArray,
        *,
        embedder: str,
        collections: Sequence[str] = (),
    ) -> Document:
        """Store one document with everything derived from it in one transaction.

        Text, pages, sections, chunks, vectors, lexical rows and op-log stand or fall together;
        when this returns, they are on disk. Saving the same bytes again returns what is stored.
        A new version of a name joins the collections of the version before it.

        Args:
            source: identity, hash and size of the file.
            content: the canonical text with its pages and sections.
            chunks: stretches of that text.
            vectors: float32 [len(chunks), dim], unit length.
            embedder: fingerprint of the embedder; one library has one.
            collections: names of collections that it joins; new names make new collections.

        Raises:
            EmbedderMismatchError: if the library's vectors come from another embedder.
            StorageFullError: if the disk is full; nothing was kept.
        """
        assert len(chunks) == len(vectors)
        names = _collection_names(collections)
        with self._database.write() as connection:
            known = _recall(connection, source, names)  # another process may have been faster
            if known:
                return known
            _claim_embedder(connection, embedder)
            before = _stands_for(connection, source.source)
            version = before.version + 1 if before else 1
            values = {
                "title": storable(source.title),
                "source": _source_key(source.source),
                "version": version,
                "content_sha256": source.content_sha256,
                "media_type": content.media_type,
                "num_bytes": source.num_bytes,
                "num_chars": len(content.text),
                "num_pages": len(content.pages),
                "num_chunks": len(chunks),
                "warnings": json.dumps(content.warnings),
                "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            document_id = _inserted_id(connection.execute(insert(document).values(values)))
            _insert_parts(connection, document_id, content, chunks, vectors, embedder)
            _name(connection, source, document_id)
            if before:
                names = {*names, *_collections_of(connection, before.document_id)}
            _join_collections(connection, names, [document_id])
            return _documents(connection, document.c.id == document_id)[0]

    def replace(
        self,
        document_id: int,
        content: CanonicalText,
        chunks: Sequence[Chunk],
        vectors: FloatArray,
        *,
        embedder: str,
    ) -> None:
        """Put newly read text, chunks and vectors in the place of a document's own.

        Its number, names and version stay. One transaction, as `save`.

        Raises:
            DocumentNotFoundError: if it was deleted meanwhile.
            EmbedderMismatchError: if the library's vectors come from another embedder.
        """
        values = {
            "media_type": content.media_type,
            "num_chars": len(content.text),
            "num_pages": len(content.pages),
            "num_chunks": len(chunks),
            "warnings": json.dumps(content.warnings),
        }
        with self._database.write() as connection:
            if not _existing(connection, [document_id]):
                raise DocumentNotFoundError(
                    f"no document {document_id}", hint="it was deleted meanwhile"
                )
            _claim_embedder(connection, embedder)
            for table in (chunk, document_text, page, section, token_count):
                connection.execute(delete(table).where(table.c.document_id == document_id))
            connection.execute(update(document).where(document.c.id == document_id).values(values))
            _insert_parts(connection, document_id, content, chunks, vectors, embedder)
            self._database.erase_deleted_words(connection)
        self._database.erase_deleted()

    def delete(self, *document_ids: int) -> None:
        """Delete documents, their chunks, vectors, lexical rows, and the answers' quotations.

        All of them or, on an error, none. A name that stood for one stands for the version before
        it, if there is one.
        """
        with self._database.write() as connection:
            for document_id in document_ids:
                _delete(connection, document_id)
            self._database.erase_deleted_words(connection)
        self._database.erase_deleted()

    # ---- collections -------------------------------------------------------------------------

    def collections(self) -> list[Collection]:
        """Return the collections by name, with the number of documents (latest versions)."""
        latest = collection_member.outerjoin(
            document, (document.c.id == collection_member.c.document_id) & _is_latest()
        )
        query = (
            select(collection_member.c.collection, func.count(document.c.id))
            .select_from(latest)
            .group_by(collection_member.c.collection)
        )
        with self._database.read() as connection:
            rows = connection.execute(query).all()
        return sorted((Collection(*row) for row in rows), key=lambda found: found.name)

    def add_to_collection(self, name: str, document_ids: Iterable[int]) -> None:
        """Put documents into a collection, which is made if it is new.

        Raises:
            DocumentNotFoundError: if one of the documents is gone; none was added.
        """
        ids = list(dict.fromkeys(document_ids))
        with self._database.write() as connection:
            missing = set(ids) - _existing(connection, ids)
            if missing:
                raise DocumentNotFoundError(
                    f"no document {min(missing)}", hint="fathom list shows all numbers"
                )
            _join_collections(connection, _collection_names([name]), ids)

    def remove_from_collection(self, name: str, document_ids: Iterable[int]) -> None:
        """Take documents out of a collection; the documents stay. Without members it is gone.

        Raises:
            DocumentNotFoundError: if there is no such collection.
        """
        with self._database.write() as connection:
            _require_collection(connection, name)
            for ids in id_batches(list(document_ids)):
                connection.execute(
                    delete(collection_member).where(
                        collection_member.c.collection == name,
                        collection_member.c.document_id.in_(ids),
                    )
                )

    def dissolve_collection(self, name: str) -> None:
        """Remove a collection; its documents stay.

        Raises:
            DocumentNotFoundError: if there is no such collection.
        """
        with self._database.write() as connection:
            _require_collection(connection, name)
            _dissolve(connection, name)

    def delete_collection(self, name: str) -> list[Document]:
        """Delete a collection with its documents of all versions, and return those deleted.

        A document that another collection holds as well stays.

        Raises:
            DocumentNotFoundError: if there is no such collection.
        """
        members = select(collection_member.c.document_id)
        with self._database.write() as connection:
            _require_collection(connection, name)
            doomed = _documents(
                connection,
                document.c.id.in_(members.where(collection_member.c.collection == name))
                & document.c.id.not_in(members.where(collection_member.c.collection != name)),
            )
            _dissolve(connection, name)
            for each in doomed:
                _delete(connection, each.id)
            self._database.erase_deleted_words(connection)
        self._database.erase_deleted()
        return doomed

    # ---- embedders ---------------------------------------------------------------------------

    def active_embedder(self) -> str | None:
        """Return the fingerprint of the embedder that the library is searched with, if any."""
        with self._database.read() as connection:
            return _active_embedder(connection)

    def chunks_without_vector(
        self, embedder: str, limit: int, *, after_id: int = 0
    ) -> list[StoredChunk]:
        """Return up to `limit` chunks that have no vector of this embedder, by id.

        `after_id` skips the chunks up to it, so that a long run does not look at them again.
        """
        has_vector = exists().where(
            chunk_vector.c.chunk_id == chunk.c.id, chunk_vector.c.embedder == embedder
        )
        query = select(chunk).where(chunk.c.id > after_id, ~has_vector)
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(chunk.c.id).limit(limit))
            return [_stored_chunk(row) for row in rows]

    def add_vectors(self, embedder: str, chunk_ids: Sequence[int], vectors: FloatArray) -> None:
        """Store vectors of another embedder beside those in use: float32 [len(chunk_ids), dim].

        Chunks that were deleted meanwhile are left out. The op-log says nothing of them: an index
        of that embedder begins with `OpLog.vectors` once the embedder is active.
        """
        assert len(chunk_ids) == len(vectors)
        with self._database.write() as connection:
            there: set[int] = set()
            for ids in id_batches(chunk_ids):
                there.update(connection.scalars(select(chunk.c.id).where(chunk.c.id.in_(ids))))
            kept = [row for row, chunk_id in enumerate(chunk_ids) if chunk_id in there]
            _insert_vectors(connection, embedder, [chunk_ids[row] for row in kept], vectors, kept)

    def activate_embedder(self, embedder: str) -> None:
        """Make this the embedder that the library is searched with, and drop all other vectors.

        Raises:
            EmbedderMismatchError: if a chunk has no vector of it yet; nothing was changed.
        """
        total = select(func.count()).select_from(chunk)
        done = (
            select(func.count())
            .select_from(chunk_vector)
            .where(chunk_vector.c.embedder == embedder)
        )
        with self._database.write() as connection:
            num_chunks, num_vectors = connection.scalar(total) or 0, connection.scalar(done) or 0
            if num_vectors != num_chunks:
                raise EmbedderMismatchError(
                    f"{num_chunks - num_vectors:,} of {num_chunks:,} chunks have no vector of"
                    f" {embedder} yet",
                    hint="let the re-embedding finish, then try again",
                )
            upsert(connection, meta, [{"key": "embedder", "value": embedder}])
            connection.execute(delete(chunk_vector).where(chunk_vector.c.embedder != embedder))
        self._database.erase_deleted()

    # ---- token counts ------------------------------------------------------------------------

    def token_counts(self, document_ids: Iterable[int], tokenizer: str) -> dict[int, int]:
        """Return the stored token counts of the given documents under one tokenizer."""
        query = select(token_count.c.document_id, token_count.c.num_tokens).where(
            token_count.c.tokenizer == tokenizer
        )
        counts: dict[int, int] = {}
        with self._database.read() as connection:
            for ids in id_batches(list(document_ids)):
                rows = connection.execute(query.where(token_count.c.document_id.in_(ids)))
                counts.update((row.document_id, row.num_tokens) for row in rows)
        return counts

    def save_token_count(self, document_id: int, tokenizer: str, num_tokens: int) -> None:
        """Remember how many tokens a document has under one tokenizer, if it is still there."""
        row = {"document_id": document_id, "tokenizer": tokenizer, "num_tokens": num_tokens}
        with self._database.write() as connection:
            if _existing(connection, [document_id]):
                upsert(connection, token_count, [row])


# ---- names and versions -----------------------------------------------------------------------


def _recall(connection: Connection, file: SourceFile, collections: set[str]) -> Document | None:
    same_content = document.c.content_sha256 == file.content_sha256
    document_id = connection.scalar(select(document.c.id).where(same_content))
    if document_id is None:
        return None
    before = _stands_for(connection, file.source)
    if before is None or before.document_id != document_id:
        _name(connection, file, document_id)
        if before:
            collections = {*collections, *_collections_of(connection, before.document_id)}
    _join_collections(connection, collections, [document_id])
    return _documents(connection, same_content)[0]


def _name(connection: Connection, file: SourceFile, document_id: int) -> None:
    """Let the file's name stand for this document from now on."""
    before = _stands_for(connection, file.source)
    connection.execute(
        insert(source_version).values(
            source=_source_key(file.source),
            version=before.version + 1 if before else 1,
            title=storable(file.title),
            document_id=document_id,
        )
    )


def _stands_for(connection: Connection, source: str) -> Row[Any] | None:
    query = select(source_version).where(source_version.c.source == _source_key(source))
    return connection.execute(query.order_by(source_version.c.version.desc()).limit(1)).first()


def _source_key(source: str) -> str:
    # a file name need not be UTF-8; its odd bytes stay apart, unlike in `storable`
    return storable(source.encode("utf-8", "backslashreplace").decode())


def _heads() -> Select[Any]:
    """Select the document that each name stands for now."""
    newer = source_version.alias("newer")
    superseded = exists().where(
        newer.c.source == source_version.c.source, newer.c.version > source_version.c.version
    )
    return select(source_version.c.document_id).where(~superseded)


def _is_latest() -> ColumnElement[bool]:
    return document.c.id.in_(_heads())


def _meanings(reference: str) -> Iterator[ColumnElement[bool]]:
    """Yield what a reference may mean, the most exact first."""
    if reference.isascii() and reference.isdigit() and len(reference) < 19:
        yield document.c.id == int(reference)
    yield document.c.id.in_(_heads().where(source_version.c.source == _source_key(reference)))
    yield document.c.id.in_(_heads().where(source_version.c.title == storable(reference)))


def _documents(connection: Connection, condition: ColumnElement[bool]) -> list[Document]:
    """Return the documents that fulfil the condition, by id, with their collections."""
    query = select(document, _is_latest().label("is_latest")).where(condition)
    rows = connection.execute(query.order_by(document.c.id)).all()
    members: dict[int, list[str]] = {}
    for ids in id_batches([row.id for row in rows]):
        found = select(collection_member).where(collection_member.c.document_id.in_(ids))
        for member in connection.execute(found.order_by(collection_member.c.collection)):
            members.setdefault(member.document_id, []).append(member.collection)
    return [_document(row, members.get(row.id, [])) for row in rows]


def _document(row: Row[Any], collections: Sequence[str]) -> Document:
    fields = dict(row._mapping)
    fields["warnings"] = tuple(json.loads(fields["warnings"]))
    fields["is_latest"] = bool(fields["is_latest"])
    return Document(**fields, collections=tuple(collections))


def _existing(connection: Connection, document_ids: Sequence[int]) -> set[int]:
    found: set[int] = set()
    for ids in id_batches(document_ids):
        found.update(connection.scalars(select(document.c.id).where(document.c.id.in_(ids))))
    return found


def _delete(connection: Connection, document_id: int) -> None:
    receipts.redact(connection, document_id)
    # Not left to the cascade: SQLite fires triggers for it only if told to.
    connection.execute(delete(chunk).where(chunk.c.document_id == document_id))
    connection.execute(delete(document).where(document.c.id == document_id))


# ---- collections ------------------------------------------------------------------------------


def _collection_names(names: Iterable[str]) -> set[str]:
    cleaned = {name.strip() for name in names}
    for name in cleaned:
        if not name or not name.isprintable():
            raise StoreError(
                f"{name!r} cannot name a collection; expected printable characters",
                hint="give it a name such as contracts or 'Annual reports'",
            )
    return cleaned


def _collections_of(connection: Connection, document_id: int) -> list[str]:
    query = select(collection_member.c.collection)
    return list(connection.scalars(query.where(collection_member.c.document_id == document_id)))


def _join_collections(connection: Connection, names: set[str], document_ids: Sequence[int]) -> None:
    rows = [{"collection": n, "document_id": d} for n in sorted(names) for d in document_ids]
    if rows:
        upsert(connection, collection_member, rows)


def _require_collection(connection: Connection, name: str) -> None:
    names = set(connection.scalars(select(collection_member.c.collection).distinct()))
    if name not in names:
        known = ", ".join(sorted(names)) or "none"
        raise DocumentNotFoundError(
            f"no collection {name!r}; there are: {known}",
            hint="a collection is made by putting documents into it",
        )


def _dissolve(connection: Connection, name: str) -> None:
    connection.execute(delete(collection_member).where(collection_member.c.collection == name))


# ---- the parts of a document ------------------------------------------------------------------


def _insert_parts(
    connection: Connection,
    document_id: int,
    content: CanonicalText,
    chunks: Sequence[Chunk],
    vectors: FloatArray,
    embedder: str,
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
    if not chunks:
        return
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
            }
            for c in chunks
        ],
    )
    stored = select(chunk.c.ordinal, chunk.c.id).where(chunk.c.document_id == document_id)
    id_of = {row.ordinal: row.id for row in connection.execute(stored)}
    _insert_vectors(
        connection, embedder, [id_of[c.ordinal] for c in chunks], vectors, range(len(chunks))
    )


def _insert_vectors(
    connection: Connection,
    embedder: str,
    chunk_ids: Sequence[int],
    vectors: FloatArray,
    rows: Sequence[int],
) -> None:
    """Insert `vectors[rows]`, a part at a time so that no second copy of all of them exists."""
    for first in range(0, len(rows), ROWS_PER_INSERT):
        part = slice(first, first + ROWS_PER_INSERT)
        upsert(
            connection,
            chunk_vector,
            [
                {
                    "chunk_id": chunk_id,
                    "embedder": embedder,
                    "vector": np.ascontiguousarray(vectors[row], dtype=np.float32).tobytes(),
                }
                for chunk_id, row in zip(chunk_ids[part], rows[part], strict=True)
            ],
        )


def _active_embedder(connection: Connection) -> str | None:
    stored = connection.scalar(select(meta.c.value).where(meta.c.key == "embedder"))
    return None if stored is None else str(stored)


def _claim_embedder(connection: Connection, embedder: str) -> None:
    stored = _active_embedder(connection)
    if stored == embedder:
        return
    has_chunks = connection.execute(select(chunk.c.id).limit(1)).first() is not None
    if stored is not None and has_chunks:
        raise EmbedderMismatchError(
            f"the library's vectors come from {stored}; the embedder in use is {embedder}",
            hint="set FATHOM_EMBEDDER back, or change the library: fathom reembed",
        )
    upsert(connection, meta, [{"key": "embedder", "value": embedder}])


def _inserted_id(result: CursorResult[Any]) -> int:
    key = result.inserted_primary_key
    assert key is not None
    return int(key[0])


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
