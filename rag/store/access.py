"""Whose a document is, and who else may read it. Every query on documents goes through here.

An owner is an account's name, "" where nobody signs in. `EVERY_OWNER` is the whole library, for
what looks after it: doctor, re-embedding, the check that a document is still there.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, exists, select, true

from rag.errors import DocumentNotFoundError, StoreError
from rag.store.database import id_batches, upsert
from rag.store.schema import collection_member, collection_share, document

EVERY_OWNER = None
EVERYONE = "*"  # the reader that stands for all accounts
NAMELESS = "library"  # what the owner "" is called where a shared collection names its owner

CollectionKey = tuple[str, str]  # owner and name


def is_own(owner: str | None) -> ColumnElement[bool]:
    """Return the condition that a document is the owner's."""
    return true() if owner is None else document.c.owner == owner


def is_readable(owner: str | None) -> ColumnElement[bool]:
    """Return the condition that the owner may read a document: his own, or shared with him."""
    if owner is None:
        return true()
    holder = document.alias("holder")
    shared = (
        select(collection_member.c.document_id)
        .join(holder, holder.c.id == collection_member.c.document_id)
        .join(
            collection_share,
            (collection_share.c.owner == holder.c.owner)
            & (collection_share.c.collection == collection_member.c.collection),
        )
        .where(collection_share.c.reader.in_((owner, EVERYONE)))
    )
    return is_own(owner) | document.c.id.in_(shared)


def belongs_to_readable(owner: str | None, document_id: ColumnElement[Any]) -> ColumnElement[bool]:
    """Return the condition that a row belongs to a document that the owner may read."""
    if owner is None:
        return true()
    return exists().where(document.c.id == document_id, is_readable(owner))


def readable_among(
    connection: Connection, owner: str | None, document_ids: Sequence[int]
) -> set[int]:
    """Return those of the documents that exist and that the owner may read."""
    found: set[int] = set()
    for ids in id_batches(document_ids):
        query = select(document.c.id).where(document.c.id.in_(ids), is_readable(owner))
        found.update(connection.scalars(query))
    return found


def own_among(connection: Connection, owner: str | None, document_ids: Sequence[int]) -> list[int]:
    """Return those of the documents that exist, in order; each must be the owner's.

    Raises:
        StoreError: if one is another's, which the owner may only read; of one that he may not even
            read it is not told that it exists.
    """
    readable = readable_among(connection, owner, document_ids)
    own: set[int] = set()
    for ids in id_batches(document_ids):
        query = select(document.c.id).where(document.c.id.in_(ids), is_own(owner))
        own.update(connection.scalars(query))
    if foreign := readable - own:
        raise StoreError(
            f"document {min(foreign)} is shared with you and belongs to somebody else",
            hint="only its owner can change or delete it",
        )
    return [number for number in document_ids if number in own]


# ---- collections ------------------------------------------------------------------------------


def collection_names(names: Iterable[str]) -> set[str]:
    """Return the names without the spaces around them.

    Raises:
        StoreError: if one cannot name a collection.
    """
    cleaned = {name.strip() for name in names}
    for name in cleaned:
        if not name or not name.isprintable():
            raise StoreError(
                f"{name!r} cannot name a collection; expected printable characters",
                hint="give it a name such as contracts or 'Annual reports'",
            )
    return cleaned


def own_collections(connection: Connection, owner: str | None) -> set[CollectionKey]:
    """Return the owner's collections."""
    query = select(document.c.owner, collection_member.c.collection).distinct()
    joined = query.join(document, document.c.id == collection_member.c.document_id)
    return {(row.owner, row.collection) for row in connection.execute(joined.where(is_own(owner)))}


def collections_shared_with(connection: Connection, owner: str | None) -> set[CollectionKey]:
    """Return the collections of others that the owner may read."""
    if owner is None:
        return set()
    query = (
        select(document.c.owner, collection_member.c.collection)
        .distinct()
        .join(document, document.c.id == collection_member.c.document_id)
        .join(
            collection_share,
            (collection_share.c.owner == document.c.owner)
            & (collection_share.c.collection == collection_member.c.collection),
        )
        .where(collection_share.c.reader.in_((owner, EVERYONE)), document.c.owner != owner)
    )
    return {(row.owner, row.collection) for row in connection.execute(query)}


def shown_name(key: CollectionKey, owner: str | None) -> str:
    """Return what the owner calls a collection: its name, with its owner's before it if another."""
    holder, name = key
    return name if owner is None or holder == owner else f"{holder or NAMELESS}/{name}"


def find_collection(connection: Connection, owner: str | None, name: str) -> CollectionKey:
    """Return the collection that the owner calls so.

    Raises:
        DocumentNotFoundError: if there is none that he may read.
    """
    own = own_collections(connection, owner)
    keys = {shown_name(key, owner): key for key in collections_shared_with(connection, owner)}
    keys |= {shown_name(key, owner): key for key in own}
    if name not in keys:
        known = ", ".join(sorted(keys)) or "none"
        raise DocumentNotFoundError(
            f"no collection {name!r}; there are: {known}",
            hint="a collection is made by putting documents into it",
        )
    return keys[name]


def find_own_collection(connection: Connection, owner: str | None, name: str) -> CollectionKey:
    """Return the owner's own collection of this name.

    Raises:
        DocumentNotFoundError: if there is none.
        StoreError: if it is another's.
    """
    key = find_collection(connection, owner, name)
    if owner is not None and key[0] != owner:
        raise StoreError(
            f"the collection {name!r} is shared with you and belongs to {key[0] or 'the library'}",
            hint="only its owner can change it; put documents of yours into one of your own",
        )
    return key


def members(key: CollectionKey) -> ColumnElement[bool]:
    """Return the condition that a document is in a collection."""
    holder, name = key
    inside = select(collection_member.c.document_id).where(collection_member.c.collection == name)
    return (document.c.owner == holder) & document.c.id.in_(inside)


def names_of_members(
    connection: Connection, owner: str | None, document_ids: Sequence[int]
) -> dict[int, list[str]]:
    """Return the collections of each document that the owner knows of, as he calls them."""
    shared = collections_shared_with(connection, owner)
    found: dict[int, list[str]] = {}
    query = select(
        collection_member.c.document_id, collection_member.c.collection, document.c.owner
    ).join(document, document.c.id == collection_member.c.document_id)
    for ids in id_batches(document_ids):
        rows = connection.execute(query.where(collection_member.c.document_id.in_(ids)))
        for row in rows:
            key = (row.owner, row.collection)
            if owner is None or row.owner == owner or key in shared:
                found.setdefault(row.document_id, []).append(shown_name(key, owner))
    return {document_id: sorted(names) for document_id, names in found.items()}


def join_collections(
    connection: Connection, owner: str, names: set[str], document_ids: Sequence[int]
) -> None:
    """Put the owner's documents into collections of his; one that is new is shared with nobody."""
    rows = [{"collection": n, "document_id": d} for n in sorted(names) for d in document_ids]
    if not rows:
        return
    for holder, name in {(owner, name) for name in names} - own_collections(connection, owner):
        unshare(connection, (holder, name))  # what an earlier one of this name has left
    upsert(connection, collection_member, rows)


def dissolve(connection: Connection, key: CollectionKey) -> None:
    """Remove a collection; its documents stay."""
    holder, name = key
    theirs = select(document.c.id).where(document.c.owner == holder)
    connection.execute(
        delete(collection_member).where(
            collection_member.c.collection == name, collection_member.c.document_id.in_(theirs)
        )
    )
    unshare(connection, key)


def unshare(connection: Connection, key: CollectionKey, reader: str | None = None) -> None:
    """Let a reader, or None for all, read a collection no more."""
    holder, name = key
    mine = (collection_share.c.owner == holder) & (collection_share.c.collection == name)
    if reader is not None:
        mine &= collection_share.c.reader == reader
    connection.execute(delete(collection_share).where(mine))
