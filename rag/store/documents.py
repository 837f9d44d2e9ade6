"""Queries on documents, their text, pages, sections and chunks. Rows never leave this file."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    CursorResult,
    Row,
    Select,
    bindparam,
    delete,
    exists,
    func,
    insert,
    select,
    true,
    update,
)

from rag.errors import DocumentNotFoundError, EmbedderMismatchError
from rag.store import access, receipts
from rag.store.database import Database, id_batches, upsert
from rag.store.names import give_name, is_latest, meanings, source_key, stands_for
from rag.store.parts import HEADING_SEPARATOR as HEADING_SEPARATOR
from rag.store.parts import FloatArray, insert_parts, insert_vectors
from rag.store.schema import (
    chunk,
    chunk_vector,
    collection_member,
    collection_share,
    document,
    document_text,
    meta,
    page,
    section,
    token_count,
)
from rag.types import CanonicalText, Chunk, Collection, Document, Page, Section, storable


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
    """The documents of one owner in a library, and those that others share with him.

    He reads both and changes only his own. `access.EVERY_OWNER` reads and changes all.
    """

    def __init__(self, database: Database, owner: str | None = "") -> None:
        self._database = database
        self._owner = owner

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
            versions = true() if include_superseded else is_latest()
            if collection is None:
                return self._documents(connection, versions)
            key = access.find_collection(connection, self._owner, collection)
            return self._documents(connection, access.members(key) & versions)

    def if_unheld(self, content_sha256: str, remove: Callable[[], object]) -> None:
        """Call `remove` if no document of any owner has this content; none is saved meanwhile."""
        query = select(document.c.id).where(document.c.content_sha256 == content_sha256)
        with self._database.write() as connection:
            if connection.execute(query.limit(1)).first() is None:
                remove()

    def usage(self) -> tuple[int, int]:
        """Return how many documents the owner has, all versions, and their bytes."""
        query = select(func.count(), func.coalesce(func.sum(document.c.num_bytes), 0))
        with self._database.read() as connection:
            row = connection.execute(query.where(access.is_own(self._owner))).one()
        return int(row[0]), int(row[1])

    def find(self, reference: str) -> Document:
        """Return the document with this id, or the one that a source or title stands for now.

        Raises:
            DocumentNotFoundError: if none or several match.
        """
        with self._database.read() as connection:
            for condition in meanings(reference):
                matches = self._documents(connection, condition)
                if matches:
                    break
            else:
                raise self._unknown(connection, reference)
        if len(matches) == 1:
            return matches[0]
        ids = ", ".join(str(d.id) for d in matches)
        raise DocumentNotFoundError(
            f"{len(matches)} documents are titled {reference!r}: numbers {ids}",
            hint="give the number instead",
        )

    def with_ids(self, document_ids: Sequence[int]) -> list[Document]:
        """Return the documents with these ids, each once, in this order.

        Raises:
            DocumentNotFoundError: if there is none with one of them.
        """
        wanted = list(dict.fromkeys(document_ids))
        found: dict[int, Document] = {}
        with self._database.read() as connection:
            for ids in id_batches([i for i in wanted if i.bit_length() < 64]):
                of_these = self._documents(connection, document.c.id.in_(ids))
                found.update((d.id, d) for d in of_these)
            if len(found) < len(wanted):
                missing = next(i for i in wanted if i not in found)
                raise self._unknown(connection, str(missing))
        return [found[i] for i in wanted]

    # ---- reading -----------------------------------------------------------------------------

    def text(self, document_id: int, start: int = 0, end: int | None = None) -> str:
        """Return characters `[start, end)` of the canonical text, in code points."""
        column: ColumnElement[str] = document_text.c.text
        if end is not None:
            column = func.substr(column, start + 1, max(0, end - start))
        elif start:
            column = func.substr(column, start + 1)
        query = select(column).where(
            document_text.c.document_id == document_id, self._reads(document_text.c.document_id)
        )
        with self._database.read() as connection:
            return str(connection.scalar(query) or "")

    def pages(self, document_id: int) -> list[Page]:
        """Return the pages in order; empty where the format has none."""
        query = select(page).where(
            page.c.document_id == document_id, self._reads(page.c.document_id)
        )
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(page.c.number))
            return [Page(r.number, r.label, r.start, r.end) for r in rows]

    def sections(self, document_id: int) -> list[Section]:
        """Return the headings in the order of the text."""
        query = select(section).where(
            section.c.document_id == document_id, self._reads(section.c.document_id)
        )
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(section.c.ordinal))
            return [Section(r.level, r.title, r.start) for r in rows]

    def chunks(self, chunk_ids: Sequence[int]) -> dict[int, StoredChunk]:
        """Return those of the given chunks that still exist, keyed by id."""
        found: dict[int, StoredChunk] = {}
        with self._database.read() as connection:
            for ids in id_batches(chunk_ids):
                for row in connection.execute(self._chunks_with_ids, {"ids": ids}):
                    stored = _stored_chunk(row)
                    found[stored.id] = stored
        return found

    @cached_property
    def _chunks_with_ids(self) -> Select[Any]:
        # every question needs it, and to build it took longer than to run it
        wanted = chunk.c.id.in_(bindparam("ids", expanding=True))
        return select(chunk).where(wanted, self._reads(chunk.c.document_id))

    def chunks_of(self, document_id: int) -> list[StoredChunk]:
        """Return a document's chunks in order."""
        query = select(chunk).where(
            chunk.c.document_id == document_id, self._reads(chunk.c.document_id)
        )
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(chunk.c.ordinal))
            return [_stored_chunk(row) for row in rows]

    def chunk_ids(self, document_ids: Sequence[int]) -> list[int]:
        """Return the ids of all chunks of the given documents."""
        found: list[int] = []
        with self._database.read() as connection:
            readable = access.readable_among(connection, self._owner, document_ids)
            for ids in id_batches([number for number in document_ids if number in readable]):
                query = select(chunk.c.id).where(chunk.c.document_id.in_(ids))
                found += connection.scalars(query)
        return found

    def num_chunks(self) -> int:
        """Return how many chunks the whole library has, superseded versions included."""
        with self._database.read() as connection:
            return connection.scalar(select(func.count()).select_from(chunk)) or 0

    # ---- writing -----------------------------------------------------------------------------

    def recall(self, file: SourceFile, *, collections: Sequence[str] = ()) -> Document | None:
        """Return the owner's document with this very content, or None if he has none yet.

        The file's name stands for that document from now on, whatever it stood for before, and
        the document joins the collections. So content that a name goes back to, and content that
        another name has left, is searched again.
        """
        names = access.collection_names(collections)
        with self._database.write() as connection:
            return self._recall(connection, file, names)

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
        names, owner = access.collection_names(collections), self._writer
        with self._database.write() as connection:
            known = self._recall(connection, source, names)  # another process may have been faster
            if known:
                return known
            _claim_embedder(connection, embedder)
            before = stands_for(connection, owner, source.source)
            version = before.version + 1 if before else 1
            values = {
                "owner": owner,
                "title": storable(source.title),
                "source": source_key(source.source),
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
            insert_parts(connection, document_id, content, chunks, vectors, embedder)
            give_name(connection, owner, source.source, source.title, document_id)
            if before:
                names |= self._collections_of(connection, before.document_id)
            access.join_collections(connection, owner, names, [document_id])
            return self._documents(connection, document.c.id == document_id)[0]

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
            if not access.own_among(connection, self._owner, [document_id]):
                raise DocumentNotFoundError(
                    f"no document {document_id}", hint="it was deleted meanwhile"
                )
            _claim_embedder(connection, embedder)
            for table in (chunk, document_text, page, section, token_count):
                connection.execute(delete(table).where(table.c.document_id == document_id))
            connection.execute(update(document).where(document.c.id == document_id).values(values))
            insert_parts(connection, document_id, content, chunks, vectors, embedder)
            self._database.erase_deleted_words(connection)
        self._database.erase_deleted()

    def delete(self, *document_ids: int) -> None:
        """Delete documents, their chunks, vectors, lexical rows, and the answers' quotations.

        All of them or, on an error, none. A name that stood for one stands for the version before
        it, if there is one. Those that are gone already are passed over.

        Raises:
            StoreError: if one is another's; none was deleted.
        """
        with self._database.write() as connection:
            for document_id in access.own_among(connection, self._owner, document_ids):
                _delete(connection, document_id)
            self._database.erase_deleted_words(connection)
        self._database.erase_deleted()

    # ---- collections -------------------------------------------------------------------------

    def collections(self) -> list[Collection]:
        """Return the collections by name, with the number of documents (latest versions).

        One that another shares has its owner before its name: `anna/contracts`.
        """
        with self._database.read() as connection:
            keys = access.own_collections(connection, self._owner)
            keys |= access.collections_shared_with(connection, self._owner)
            latest = select(func.count(document.c.id)).where(is_latest())
            found = [
                Collection(
                    access.shown_name(key, self._owner),
                    connection.scalar(latest.where(access.members(key))) or 0,
                )
                for key in keys
            ]
        return sorted(found, key=lambda collection: collection.name)

    def add_to_collection(self, name: str, document_ids: Iterable[int]) -> None:
        """Put documents into a collection, which is made if it is new.

        Raises:
            DocumentNotFoundError: if one of the documents is gone; none was added.
            StoreError: if one of them is another's.
        """
        ids = list(dict.fromkeys(document_ids))
        with self._database.write() as connection:
            missing = set(ids) - set(access.own_among(connection, self._owner, ids))
            if missing:
                raise DocumentNotFoundError(
                    f"no document {min(missing)}", hint="fathom list shows all numbers"
                )
            names = access.collection_names([name])
            access.join_collections(connection, self._writer, names, ids)

    def remove_from_collection(self, name: str, document_ids: Iterable[int]) -> None:
        """Take documents out of a collection; the documents stay. Without members it is gone.

        Raises:
            DocumentNotFoundError: if there is no such collection.
            StoreError: if it is another's.
        """
        with self._database.write() as connection:
            _, own_name = access.find_own_collection(connection, self._owner, name)
            own = access.own_among(connection, self._owner, list(document_ids))
            for ids in id_batches(own):
                connection.execute(
                    delete(collection_member).where(
                        collection_member.c.collection == own_name,
                        collection_member.c.document_id.in_(ids),
                    )
                )

    def dissolve_collection(self, name: str) -> None:
        """Remove a collection; its documents stay.

        Raises:
            DocumentNotFoundError: if there is no such collection.
            StoreError: if it is another's.
        """
        with self._database.write() as connection:
            key = access.find_own_collection(connection, self._owner, name)
            access.dissolve(connection, key)

    def delete_collection(self, name: str) -> list[Document]:
        """Delete a collection with its documents of all versions, and return those deleted.

        A document that another collection holds as well stays.

        Raises:
            DocumentNotFoundError: if there is no such collection.
            StoreError: if it is another's.
        """
        with self._database.write() as connection:
            key = access.find_own_collection(connection, self._owner, name)
            others = select(collection_member.c.document_id).where(
                collection_member.c.collection != key[1]
            )
            doomed = self._documents(connection, access.members(key) & document.c.id.not_in(others))
            access.dissolve(connection, key)
            for each in doomed:
                _delete(connection, each.id)
            self._database.erase_deleted_words(connection)
        self._database.erase_deleted()
        return doomed

    def share_collection(self, name: str, reader: str) -> None:
        """Let an account, or `access.EVERYONE`, read the collection's documents.

        Raises:
            DocumentNotFoundError: if there is no such collection.
            StoreError: if it is another's.
        """
        with self._database.write() as connection:
            holder, own_name = access.find_own_collection(connection, self._owner, name)
            row = {"owner": holder, "collection": own_name, "reader": reader}
            upsert(connection, collection_share, [row])

    def unshare_collection(self, name: str, reader: str | None = None) -> None:
        """Let a reader, or None for all, read it no more; answers given before stay theirs.

        Raises:
            DocumentNotFoundError: if there is no such collection.
            StoreError: if it is another's.
        """
        with self._database.write() as connection:
            key = access.find_own_collection(connection, self._owner, name)
            access.unshare(connection, key, reader)

    def readers(self) -> dict[str, list[str]]:
        """Return who may read each of the owner's collections that is shared."""
        query = select(collection_share).where(collection_share.c.owner == self._writer)
        found: dict[str, list[str]] = {}
        with self._database.read() as connection:
            own = {name for _, name in access.own_collections(connection, self._writer)}
            for row in connection.execute(query.order_by("collection", "reader")):
                if row.collection in own:
                    found.setdefault(row.collection, []).append(row.reader)
        return found

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
            insert_vectors(connection, embedder, [chunk_ids[row] for row in kept], vectors, kept)

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
            readable = access.readable_among(connection, self._owner, list(document_ids))
            for ids in id_batches(sorted(readable)):
                rows = connection.execute(query.where(token_count.c.document_id.in_(ids)))
                counts.update((row.document_id, row.num_tokens) for row in rows)
        return counts

    def save_token_count(self, document_id: int, tokenizer: str, num_tokens: int) -> None:
        """Remember how many tokens a document has under one tokenizer, if it is still there."""
        row = {"document_id": document_id, "tokenizer": tokenizer, "num_tokens": num_tokens}
        with self._database.write() as connection:
            if access.readable_among(connection, self._owner, [document_id]):
                upsert(connection, token_count, [row])

    # ---- what the owner may see ----------------------------------------------------------------

    @property
    def _writer(self) -> str:
        """Whose a new document is; the whole library has none of its own but that of ""."""
        return self._owner or ""

    def _reads(self, document_id: ColumnElement[int]) -> ColumnElement[bool]:
        return access.belongs_to_readable(self._owner, document_id)

    def _documents(self, connection: Connection, condition: ColumnElement[bool]) -> list[Document]:
        """Return the documents that fulfil the condition and may be read, by id."""
        query = select(document, is_latest().label("is_latest"))
        query = query.where(condition, access.is_readable(self._owner))
        rows = connection.execute(query.order_by(document.c.id)).all()
        ids = [row.id for row in rows]
        names = access.names_of_members(connection, self._owner, ids)
        return [_document(row, names.get(row.id, [])) for row in rows]

    def _unknown(self, connection: Connection, reference: str) -> DocumentNotFoundError:
        latest = self._documents(connection, is_latest())
        known = ", ".join(f"{d.id} {d.title!r}" for d in latest[:5]) or "none"
        return DocumentNotFoundError(
            f"no document {reference!r}; there are {len(latest)}: {known}",
            hint="fathom list shows all of them with their numbers",
        )

    def _recall(
        self, connection: Connection, file: SourceFile, collections: set[str]
    ) -> Document | None:
        owner = self._writer
        same = (document.c.content_sha256 == file.content_sha256) & (document.c.owner == owner)
        document_id = connection.scalar(select(document.c.id).where(same))
        if document_id is None:
            return None
        before = stands_for(connection, owner, file.source)
        if before is None or before.document_id != document_id:
            give_name(connection, owner, file.source, file.title, document_id)
            if before:
                collections = collections | self._collections_of(connection, before.document_id)
        access.join_collections(connection, owner, collections, [document_id])
        return self._documents(connection, same)[0]

    def _collections_of(self, connection: Connection, document_id: int) -> set[str]:
        query = select(collection_member.c.collection)
        members = query.where(collection_member.c.document_id == document_id)
        return set(connection.scalars(members))


# ---- rows to records and back -------------------------------------------------------------------


def _document(row: Row[Any], collections: Sequence[str]) -> Document:
    fields = dict(row._mapping)
    fields["warnings"] = tuple(json.loads(fields["warnings"]))
    fields["is_latest"] = bool(fields["is_latest"])
    return Document(**fields, collections=tuple(collections))


def _delete(connection: Connection, document_id: int) -> None:
    receipts.redact(connection, document_id)
    # Not left to the cascade: SQLite fires triggers for it only if told to.
    connection.execute(delete(chunk).where(chunk.c.document_id == document_id))
    connection.execute(delete(document).where(document.c.id == document_id))


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
    """Return a row of `select(chunk)` as a record; by place, since questions need hundreds."""
    values: tuple[Any, ...] = tuple(row)
    chunk_id, document_id, ordinal, start, end, first, last, heading, num_tokens, text, _ = values
    path = tuple(heading.split(HEADING_SEPARATOR)) if heading else ()
    return StoredChunk(
        id=chunk_id,
        document_id=document_id,
        chunk=Chunk(ordinal, start, end, text, num_tokens, first, last, path),
    )
