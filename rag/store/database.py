"""Connections to the SQL database, SQLite or PostgreSQL, and its schema version.

Everything that differs between the two is in this file, in `_SQLite` and `_PostgreSQL`.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from sqlalchemy import URL, Connection, Engine, Table, create_engine, event, inspect, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from rag.errors import StorageFullError, StoreError
from rag.store.schema import SCHEMA_VERSION, metadata

logger = logging.getLogger(__name__)
WAIT_SECONDS = 30  # for another process that writes
CONNECT_SECONDS = 10
IDS_PER_STATEMENT = 10_000  # SQLite binds 32,766 values at most, PostgreSQL 65,535
ROWS_PER_FETCH = 1_000
WRITER_LOCK = 0x66617468  # "fath"; one number in the whole PostgreSQL database
OLDEST_POSTGRESQL = 15
GIVE_A_URL = "give sqlite:///PATH or postgresql+psycopg://USER:PASSWORD@HOST/DATABASE"


class Database:
    """Connections to one database, its schema at SCHEMA_VERSION.

    Writers come one after the other on both kinds of database, so that the op-log's order is the
    order of the commits: a reader that has seen entry 11 has seen entry 10.

    Usage:
        with database.read() as connection: ...    # a consistent snapshot, never blocks a writer
        with database.write() as connection: ...   # one transaction; leaving it commits durably
    """

    def __init__(self, url: str) -> None:
        """Open the database at a URL, creating folder and schema if absent.

        Args:
            url: `sqlite:///PATH` or `postgresql+psycopg://USER:PASSWORD@HOST:PORT/DATABASE`.

        Raises:
            StoreError: if it cannot be reached or opened, is no database, or has a newer schema.
        """
        self.url = url
        self._kind = _kind_of(url)
        self.engine = self._kind.create_engine()
        event.listen(self.engine, "begin", self._kind.begin)
        try:
            with self.engine.connect() as connection:
                self._kind.check_server(connection)
            self._migrate()
        except DBAPIError as error:
            self.close()
            raise self._kind.explain(error) from error
        except StoreError:
            self.close()
            raise

    def close(self) -> None:
        """Close the pooled connections; the next use opens new ones."""
        self.engine.dispose()

    @property
    def kind(self) -> str:
        """Which database this is: sqlite or postgresql."""
        return self.engine.dialect.name

    @property
    def server_version(self) -> tuple[int, ...]:
        """The version of the SQLite library or the PostgreSQL server, e.g. (3, 53, 4)."""
        with self.engine.connect() as connection:
            version = connection.dialect.server_version_info or ()
        return tuple(int(part) for part in version)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Yield a connection in one read transaction."""
        with self._explained(), self.engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Yield a connection that holds the write lock; commit on leaving, roll back on an error.

        Raises:
            StorageFullError: if the disk is full; nothing of the transaction was kept.
            StoreError: if another process held the lock for 30 seconds, or the database is damaged
                or out of reach.
        """
        with (
            self._explained(),
            self.engine.connect().execution_options(fathom_write=True) as connection,
            connection.begin(),
        ):
            yield connection

    def erase_deleted_words(self, connection: Connection) -> None:
        """Within a write transaction that deleted chunks: drop their words from the FTS5 rows."""
        self._kind.erase_deleted_words(connection)

    def keeps_words(self, connection: Connection) -> bool:
        """Say whether the triggers keep full-text rows of the chunks."""
        return self._kind.keeps_words(connection)

    def erase_deleted(self) -> None:
        """Remove from the database's files what deleted rows have left in them, where it can be."""
        with (
            self._explained(),
            self.engine.connect().execution_options(fathom_outside=True) as connection,
        ):
            self._kind.erase_deleted(connection)

    def integrity_problem(self) -> str | None:
        """Return what is wrong with the database's own structures, or None."""
        with self.read() as connection:
            return self._kind.integrity_problem(connection)

    def last_number(self, connection: Connection, table: Table) -> int:
        """Return the newest number that the table has ever given to a row, 0 if none."""
        return self._kind.last_number(connection, table.name)

    def missing_triggers(self, connection: Connection) -> list[str]:
        """Return those of the triggers on the chunks that are not there."""
        there = set(connection.exec_driver_sql(self._kind.TRIGGERS).scalars())
        return [name for name in ("chunk_added", "chunk_deleted") if name not in there]

    def restore_triggers(self, connection: Connection) -> None:
        """Create the missing triggers on the chunks again, as the migrations make them."""
        from rag.store.migrations.versions.m0001_first_schema import POSTGRESQL_DERIVED
        from rag.store.migrations.versions.m0003_full_text_on_demand import SQLITE_TRIGGERS

        statements = SQLITE_TRIGGERS if self.kind == "sqlite" else POSTGRESQL_DERIVED
        for name in self.missing_triggers(connection):
            (create,) = [s for s in statements if s.startswith(f"CREATE TRIGGER {name} ")]
            connection.exec_driver_sql(create)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what the driver and the pool raise into our own errors."""
        try:
            yield
        except DBAPIError as error:
            raise self._kind.explain(error) from error
        except PoolTimeoutError as error:
            raise StoreError(
                f"all connections to the library were in use for {WAIT_SECONDS} s",
                hint="wait for the questions that are running, then try again",
            ) from error

    def _migrate(self) -> None:
        with self.read() as connection:
            if _schema_version(connection) == SCHEMA_VERSION:
                return
        # Under the write lock: of two processes that open a new library, one makes the schema.
        options = {"fathom_write": True, "fathom_migration": True}
        with (
            self._explained(),
            self.engine.connect().execution_options(**options) as connection,
            connection.begin(),
        ):
            version = _schema_version(connection)
            if version is not None and version > SCHEMA_VERSION:
                raise StoreError(
                    f"the library has schema {version}; this Fathom knows up to {SCHEMA_VERSION}",
                    hint="install the newer Fathom, or give another --home or FATHOM_DATABASE_URL",
                )
            if version != SCHEMA_VERSION:
                _upgrade(connection)
        self.engine.dispose()  # of the connection without foreign keys


def upsert(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows, each in place of the one with its primary key."""
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    statement = dialect.insert(table)
    key = [column.name for column in table.primary_key]
    others = {name: statement.excluded[name] for name in rows[0] if name not in key}
    statement = (
        statement.on_conflict_do_update(index_elements=key, set_=others)
        if others
        else statement.on_conflict_do_nothing(index_elements=key)
    )
    connection.execute(statement, list(rows))


def id_batches(ids: Sequence[int]) -> Iterator[list[int]]:
    """Yield the ids in parts that one statement can bind."""
    rest = iter(ids)
    while batch := list(islice(rest, IDS_PER_STATEMENT)):
        yield batch


# ---- the two kinds ----------------------------------------------------------------------------


def _kind_of(url: str) -> "_SQLite | _PostgreSQL":
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise StoreError(f"the database URL cannot be read: {error}", hint=GIVE_A_URL) from error
    kinds: dict[str, type[_SQLite] | type[_PostgreSQL]] = {
        "sqlite": _SQLite,
        "postgresql+psycopg": _PostgreSQL,
    }
    if parsed.drivername not in kinds:
        raise StoreError(f"no database of kind {parsed.drivername!r} is supported", hint=GIVE_A_URL)
    if not parsed.database:
        raise StoreError(f"the database URL {parsed} names no database", hint=GIVE_A_URL)
    return kinds[parsed.drivername](parsed)


class _SQLite:
    """One file: write-ahead log, every commit synced, freed bytes overwritten."""

    TRIGGERS = "SELECT name FROM sqlite_master WHERE type = 'trigger'"

    def __init__(self, url: URL) -> None:
        self._url = url

    def create_engine(self) -> Engine:
        folder = Path(self._url.database or "").parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"cannot create the library's folder {folder}: {error.strerror}",
                hint="give a folder you may write to with --home or FATHOM_HOME",
            ) from error
        engine = create_engine(
            self._url,
            pool_timeout=WAIT_SECONDS,
            module=_sqlite_driver(),
            connect_args={"timeout": WAIT_SECONDS, "check_same_thread": False},
        )
        event.listen(engine, "connect", self._set_up)
        return engine

    def begin(self, connection: Connection) -> None:
        # A deferred transaction that turns into a writer can fail at once with "locked", whatever
        # the busy timeout: writers therefore take the lock when they begin.
        options = connection.get_execution_options()
        if options.get("fathom_migration"):  # a table can only be made anew without them
            connection.exec_driver_sql("PRAGMA foreign_keys=OFF")
        if not options.get("fathom_outside"):
            write = options.get("fathom_write")
            connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    def check_server(self, connection: Connection) -> None:
        pass  # any SQLite that Python 3.11 comes with will do; doctor names the bugs of old ones

    def erase_deleted_words(self, connection: Connection) -> None:
        # FTS5 only marks words as deleted, and its own secure-delete took 17 s for 10,000 of
        # 80,000 chunks; merging all into one segment leaves no mark and took 0.4 s. It grows with
        # the library, which is why a large one has no FTS5 rows: see lexical_index.py
        if self.keeps_words(connection):
            connection.exec_driver_sql("INSERT INTO chunk_fts(chunk_fts) VALUES ('optimize')")

    def keeps_words(self, connection: Connection) -> bool:
        query = "SELECT count(*) FROM meta WHERE key = 'without_fts5'"
        return connection.exec_driver_sql(query).scalar() == 0

    def erase_deleted(self, connection: Connection) -> None:
        """Empty the write-ahead log; secure_delete has overwritten the pages themselves."""
        busy, _, _ = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()
        if busy:
            logger.warning(
                "deleted text is still in the write-ahead log: another process has been reading"
                " for %d s; the next deletion or fathom doctor --repair empties it",
                WAIT_SECONDS,
            )

    def last_number(self, connection: Connection, table: str) -> int:
        query = "SELECT seq FROM sqlite_sequence WHERE name = ?"
        return int(connection.exec_driver_sql(query, (table,)).scalar() or 0)

    def integrity_problem(self, connection: Connection) -> str | None:
        result = str(connection.exec_driver_sql("PRAGMA integrity_check").scalar())
        return None if result == "ok" else result

    def explain(self, error: DBAPIError) -> StoreError:
        reason = str(error.orig)
        if "full" in reason:
            return _disk_full(reason)
        if "locked" in reason:
            return _held_too_long(reason)
        return StoreError(
            f"the database {self._url.database} answered: {reason}",
            hint="run fathom doctor; if the file is damaged, restore it or give another --home",
        )

    @staticmethod
    def _set_up(raw: Any, _record: object) -> None:  # noqa: ANN401 - a DB-API connection
        raw.isolation_level = None  # transactions are begun by begin(), DDL included
        for pragma in (
            f"busy_timeout={WAIT_SECONDS * 1000}",
            "journal_mode=WAL",
            "synchronous=FULL",  # a commit that returned survives power loss
            "foreign_keys=ON",
            "secure_delete=ON",
        ):
            raw.execute(f"PRAGMA {pragma}")


class _PostgreSQL:
    """A server. Durable by its own defaults (fsync and synchronous_commit are on)."""

    TRIGGERS = "SELECT tgname FROM pg_trigger WHERE tgrelid = 'chunk'::regclass"

    def __init__(self, url: URL) -> None:
        self._url = url

    def create_engine(self) -> Engine:
        try:
            return create_engine(
                self._url,
                pool_timeout=WAIT_SECONDS,
                pool_pre_ping=True,  # a connection that a restarted server has dropped is replaced
                connect_args={"connect_timeout": CONNECT_SECONDS, "client_encoding": "utf8"},
            )
        except ModuleNotFoundError as error:
            raise StoreError(
                "the driver of PostgreSQL, psycopg, is not installed",
                hint='pip install "psycopg[binary]", or unset FATHOM_DATABASE_URL',
            ) from error

    def begin(self, connection: Connection) -> None:
        options = connection.get_execution_options()
        if options.get("fathom_outside"):
            return
        if not options.get("fathom_write"):
            connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            return
        # Numbers are drawn from a sequence before the commit: without this lock a reader could see
        # entry 11 while 10 is not committed yet, and miss 10 for ever. READ COMMITTED, so that
        # what follows sees all that the writers before have done.
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{WAIT_SECONDS}s'")
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITER_LOCK})")

    def check_server(self, connection: Connection) -> None:
        major = int((connection.dialect.server_version_info or (0,))[0])
        encoding = connection.exec_driver_sql("SHOW server_encoding").scalar_one()
        if major < OLDEST_POSTGRESQL:
            raise StoreError(
                f"the server is PostgreSQL {major}; expected {OLDEST_POSTGRESQL} or newer",
                hint="upgrade the server, or unset FATHOM_DATABASE_URL",
            )
        if encoding != "UTF8":
            raise StoreError(
                f"the database {self._url.database} has the encoding {encoding}; expected UTF8",
                hint="create one with: createdb --encoding=UTF8 --template=template0 NAME",
            )

    def erase_deleted_words(self, connection: Connection) -> None:
        pass

    def keeps_words(self, connection: Connection) -> bool:
        return False  # there are no full-text rows: tantivy has the words

    def erase_deleted(self, connection: Connection) -> None:
        """Vacuum the tables: pages lose their dead rows, free pages at the end are cut off.

        The server's write-ahead log keeps the old pages until it recycles them: see
        docs/decisions/0009.
        """
        names = ", ".join(table.name for table in metadata.sorted_tables)
        driver: Any = connection.connection.dbapi_connection
        driver.autocommit = True  # VACUUM cannot run in a transaction
        try:
            connection.exec_driver_sql(f"VACUUM {names}")
        finally:
            driver.autocommit = False

    def last_number(self, connection: Connection, table: str) -> int:
        (column,) = (c.name for c in metadata.tables[table].primary_key)
        query = "SELECT pg_sequence_last_value(pg_get_serial_sequence(%(t)s, %(c)s)::regclass)"
        return int(connection.exec_driver_sql(query, {"t": table, "c": column}).scalar() or 0)

    def integrity_problem(self, connection: Connection) -> str | None:
        invalid = connection.exec_driver_sql(
            "SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid"
            " AND indrelid::regclass::text = ANY(%(tables)s)",
            {"tables": [table.name for table in metadata.sorted_tables]},
        ).scalars()
        names = ", ".join(invalid)
        return f"invalid indexes: {names}" if names else None

    def explain(self, error: DBAPIError) -> StoreError:
        reason = str(error.orig).strip()
        state = getattr(error.orig, "sqlstate", None)
        where = self._url.render_as_string(hide_password=True)
        if state == "53100":
            return _disk_full(reason)
        if state == "55P03":
            return _held_too_long(reason)
        if "password authentication failed" in reason or state in ("28P01", "28000"):
            return StoreError(
                f"the server refused the user or the password of {where}: {reason}",
                hint="correct FATHOM_DATABASE_URL; special characters in it are percent-encoded",
            )
        if state == "3D000" or ("database" in reason and "does not exist" in reason):
            return StoreError(
                f"there is no database as in {where}: {reason}",
                hint=f"create it: createdb --encoding=UTF8 --template=template0"
                f" {self._url.database}",
            )
        if error.connection_invalidated or state is None or state[:2] in ("08", "57"):
            return StoreError(
                f"the database server at {where} cannot be reached: {reason}",
                hint="start it, or correct FATHOM_DATABASE_URL; a transaction that was open has"
                " left nothing behind",
            )
        return StoreError(
            f"the database {where} answered: {reason}",
            hint="run fathom doctor, and look into the server's log",
        )


def _sqlite_driver() -> ModuleType:
    """Return pysqlite3 where it has a wheel, else Python's own sqlite3."""
    try:
        import pysqlite3.dbapi2 as driver
    except ImportError:
        import sqlite3 as driver
    module: ModuleType = driver
    return module


def _disk_full(reason: str) -> StorageFullError:
    return StorageFullError(
        f"the disk is full: {reason}; the transaction was rolled back, nothing was written",
        hint="free some space or give another --home, then run the same command again",
    )


def _held_too_long(reason: str) -> StoreError:
    return StoreError(
        f"another process held the library for {WAIT_SECONDS} s: {reason}",
        hint="wait for it to end, then run the same command again",
    )


# ---- migrations -------------------------------------------------------------------------------


def _schema_version(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    version = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return None if version is None else str(version)


def _upgrade(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    command.upgrade(config, SCHEMA_VERSION)
