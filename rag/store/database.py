"""The SQL database: its tables, its connections, its schema version."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from sqlalchemy import (
    Boolean,
    Column,
    Connection,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    inspect,
    text,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DatabaseError, OperationalError

from rag.errors import StorageFullError, StoreError

SCHEMA_VERSION = "0001"  # newest file in migrations/versions
BUSY_TIMEOUT_MILLISECONDS = 30_000

metadata = MetaData()

# sqlite_autoincrement wherever an id leaves the database: SQLite re-uses plain rowids, and a
# re-used chunk id would let a stale index point at another document's text.
document = Table(
    "document",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("title", String, nullable=False),
    Column("source", String, nullable=False),
    Column("version", Integer, nullable=False),
    Column("is_latest", Boolean, nullable=False),
    Column("content_sha256", String(64), nullable=False, unique=True),
    Column("media_type", String, nullable=False),
    Column("num_bytes", Integer, nullable=False),
    Column("num_chars", Integer, nullable=False),
    Column("num_pages", Integer, nullable=False),
    Column("num_chunks", Integer, nullable=False),
    Column("warnings", Text, nullable=False),  # JSON list
    Column("created_at", String, nullable=False),  # ISO 8601, UTC
    UniqueConstraint("source", "version"),
    sqlite_autoincrement=True,
)

document_text = Table(
    "document_text",
    metadata,
    Column("document_id", ForeignKey("document.id", ondelete="CASCADE"), primary_key=True),
    Column("text", Text, nullable=False),
)

page = Table(
    "page",
    metadata,
    Column("document_id", ForeignKey("document.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("label", String),
    Column("start", Integer, nullable=False),
    Column("end", Integer, nullable=False),
)

section = Table(
    "section",
    metadata,
    Column("document_id", ForeignKey("document.id", ondelete="CASCADE"), primary_key=True),
    Column("ordinal", Integer, primary_key=True),
    Column("level", Integer, nullable=False),
    Column("title", String, nullable=False),
    Column("start", Integer, nullable=False),
)

chunk = Table(
    "chunk",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("document_id", ForeignKey("document.id", ondelete="CASCADE"), nullable=False),
    Column("ordinal", Integer, nullable=False),
    Column("start", Integer, nullable=False),
    Column("end", Integer, nullable=False),
    Column("page_first", Integer),
    Column("page_last", Integer),
    Column("heading", String, nullable=False),  # path, joined by " > "
    Column("num_tokens", Integer, nullable=False),
    Column("text", Text, nullable=False),
    Column("scope", String, nullable=False),  # "d" and the document's id, searched by FTS5
    Column("vector", LargeBinary, nullable=False),  # float32, unit length
    UniqueConstraint("document_id", "ordinal"),
    sqlite_autoincrement=True,
)

oplog = Table(
    "oplog",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("op", String(3), nullable=False),  # add | del
    Column("chunk_id", Integer, nullable=False),
    sqlite_autoincrement=True,
)

meta = Table(
    "meta",
    metadata,
    Column("key", String, primary_key=True),
    Column("value", String, nullable=False),
)

token_count = Table(
    "token_count",
    metadata,
    Column("document_id", ForeignKey("document.id", ondelete="CASCADE"), primary_key=True),
    Column("tokenizer", String, primary_key=True),
    Column("num_tokens", Integer, nullable=False),
)

answer = Table(
    "answer",
    metadata,
    Column("id", String, primary_key=True),
    Column("created_at", String, nullable=False),
    Column("question", Text, nullable=False),
    Column("body", Text, nullable=False),  # Answer.to_json
)

answer_document = Table(
    "answer_document",
    metadata,
    Column("answer_id", ForeignKey("answer.id", ondelete="CASCADE"), primary_key=True),
    Column("document_id", Integer, primary_key=True),  # outlives the document
    Index("ix_answer_document_document_id", "document_id"),
)

# FTS5 rows and the op-log follow the chunk table inside its own transaction.
SQLITE_DERIVED = (
    """CREATE VIRTUAL TABLE chunk_fts USING fts5(
        text, heading, scope, content='chunk', content_rowid='id', tokenize='porter unicode61')""",
    """CREATE TRIGGER chunk_added AFTER INSERT ON chunk BEGIN
        INSERT INTO chunk_fts(rowid, text, heading, scope)
            VALUES (new.id, new.text, new.heading, new.scope);
        INSERT INTO oplog(op, chunk_id) VALUES ('add', new.id);
    END""",
    """CREATE TRIGGER chunk_deleted AFTER DELETE ON chunk BEGIN
        INSERT INTO chunk_fts(chunk_fts, rowid, text, heading, scope)
            VALUES ('delete', old.id, old.text, old.heading, old.scope);
        INSERT INTO oplog(op, chunk_id) VALUES ('del', old.id);
    END""",
)


class Database:
    """Connections to one database, its schema at SCHEMA_VERSION.

    Usage:
        with database.read() as connection: ...    # a consistent snapshot, never blocks a writer
        with database.write() as connection: ...   # one transaction; leaving it commits durably
    """

    def __init__(self, url: str) -> None:
        """Open the database at a `sqlite:///PATH` URL, creating folder and schema if absent.

        Raises:
            StoreError: if the file cannot be opened, is no database, or has a newer schema.
        """
        self.url = url
        path = Path(make_url(url).database or "")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"cannot create the library's folder {path.parent}: {error.strerror}",
                hint="give a folder you may write to with --home or FATHOM_HOME",
            ) from error
        self.driver = _sqlite_driver()
        self.engine = create_engine(
            url,
            module=self.driver,
            connect_args={"timeout": BUSY_TIMEOUT_MILLISECONDS / 1000, "check_same_thread": False},
        )
        event.listen(self.engine, "connect", _set_up_connection)
        event.listen(self.engine, "begin", _begin)
        try:
            self._migrate()
        except DatabaseError as error:
            raise _translated(error) from error

    @property
    def sqlite_version(self) -> str:
        """The version of the SQLite library in use, e.g. 3.53.4."""
        return str(self.driver.sqlite_version)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Yield a connection in one read transaction."""
        try:
            with self.engine.connect() as connection, connection.begin():
                yield connection
        except DatabaseError as error:
            raise _translated(error) from error

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Yield a connection that holds the write lock; commit on leaving, roll back on an error.

        Raises:
            StorageFullError: if the disk is full; nothing of the transaction was kept.
            StoreError: if another process held the lock for 30 seconds, or the file is damaged.
        """
        try:
            with (
                self.engine.connect().execution_options(fathom_write=True) as connection,
                connection.begin(),
            ):
                yield connection
        except DatabaseError as error:
            raise _translated(error) from error

    def erase_freed_pages(self) -> None:
        """Move the write-ahead log into the database and empty it, so deleted text is gone."""
        with self.engine.connect() as connection:
            raw: Any = connection.connection.dbapi_connection
            raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _migrate(self) -> None:
        with self.engine.connect() as connection, connection.begin():
            version = None
            if inspect(connection).has_table("alembic_version"):
                version = connection.scalar(text("SELECT version_num FROM alembic_version"))
        if version == SCHEMA_VERSION:
            return
        if version is not None and version > SCHEMA_VERSION:
            raise StoreError(
                f"the library has schema {version}; this Fathom knows up to {SCHEMA_VERSION}",
                hint="install the newer Fathom, or give another --home",
            )
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        with self.write() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")


def _sqlite_driver() -> ModuleType:
    """Return pysqlite3 where it has a wheel, else Python's own sqlite3."""
    try:
        import pysqlite3.dbapi2 as driver
    except ImportError:
        import sqlite3 as driver
    module: ModuleType = driver
    return module


def _set_up_connection(raw: Any, _record: object) -> None:  # noqa: ANN401 - a DB-API connection
    raw.isolation_level = None  # transactions are begun by _begin, DDL included
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",  # a commit that returned survives power loss
        "foreign_keys=ON",
        f"busy_timeout={BUSY_TIMEOUT_MILLISECONDS}",
        "secure_delete=ON",
    ):
        raw.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    # A deferred transaction that turns into a writer can fail at once with "locked", whatever
    # the busy timeout: writers therefore take the lock when they begin.
    write = connection.get_execution_options().get("fathom_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _translated(error: DatabaseError) -> StoreError:
    """Return the error that a person can act on."""
    reason = str(error.orig)
    if isinstance(error, OperationalError) and "full" in reason:
        return StorageFullError(
            f"the disk is full: {reason}; the transaction was rolled back, nothing was written",
            hint="free some space or give another --home, then run the same command again",
        )
    if isinstance(error, OperationalError) and "locked" in reason:
        return StoreError(
            f"another process held the library for {BUSY_TIMEOUT_MILLISECONDS // 1000} s: {reason}",
            hint="wait for it to end, then run the same command again",
        )
    return StoreError(
        f"the database answered: {reason}",
        hint="run fathom doctor; if the file is damaged, restore it or give another --home",
    )
