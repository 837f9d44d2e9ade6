"""What names stand for, and have stood for: queries on `source_version`."""

from collections.abc import Iterator
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, exists, insert, select

from rag.store.schema import document, source_version
from rag.types import storable


def stands_for(connection: Connection, owner: str, source: str) -> Row[Any] | None:
    """Return the newest row of the owner's name, None if he has no such name."""
    query = select(source_version).where(
        source_version.c.owner == owner, source_version.c.source == source_key(source)
    )
    return connection.execute(query.order_by(source_version.c.version.desc()).limit(1)).first()


def give_name(
    connection: Connection, owner: str, source: str, title: str, document_id: int
) -> None:
    """Let the owner's name stand for this document from now on."""
    before = stands_for(connection, owner, source)
    connection.execute(
        insert(source_version).values(
            owner=owner,
            source=source_key(source),
            version=before.version + 1 if before else 1,
            title=storable(title),
            document_id=document_id,
        )
    )


def source_key(source: str) -> str:
    """Return a name as it is stored."""
    # a file name need not be UTF-8; its odd bytes stay apart, unlike in `storable`
    return storable(source.encode("utf-8", "backslashreplace").decode())


def is_latest() -> ColumnElement[bool]:
    """Return the condition that some name of its owner stands for a document now."""
    return document.c.id.in_(_heads())


def meanings(reference: str) -> Iterator[ColumnElement[bool]]:
    """Yield what a reference may mean, the most exact first."""
    if reference.isascii() and reference.isdigit() and len(reference) < 19:
        yield document.c.id == int(reference)
    yield document.c.id.in_(_heads().where(source_version.c.source == source_key(reference)))
    yield document.c.id.in_(_heads().where(source_version.c.title == storable(reference)))


def _heads() -> Select[Any]:
    """Select the document that each name stands for now."""
    newer = source_version.alias("newer")
    superseded = exists().where(
        newer.c.owner == source_version.c.owner,
        newer.c.source == source_version.c.source,
        newer.c.version > source_version.c.version,
    )
    return select(source_version.c.document_id).where(~superseded)
