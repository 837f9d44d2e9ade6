"""What only a server can do to us: refuse, crash, restart, run full, be of the wrong kind."""

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psycopg
import pytest

from conftest import HashEmbedder, make_tiny_engine
from postgres_server import PASSWORD, PostgresServer, find_binaries, running_server
from rag.errors import StorageFullError, StoreError
from rag.settings import Settings, load_settings
from rag.store.database import WRITER_LOCK, Database
from rag.store.documents import DocumentStore, SourceFile
from rag.store.oplog import OpLog
from rag.types import CanonicalText, Chunk, Document, Route
from ui.assembly import Fathom
from ui.doctor import examine

EMBEDDER = "test-embedder"
CHECKS = ("database", "texts", "original files", "lexical index", "vector index")
OpenDatabase = Callable[[str], Database]


def _save(store: DocumentStore, name: str, text: str) -> Document:
    return store.save(
        SourceFile(name, name, f"{name:0>64}", len(text)),
        CanonicalText(text, "text/plain"),
        [Chunk(0, 0, len(text), text, 1)],
        np.ones((1, 4), dtype=np.float32),
        embedder=EMBEDDER,
    )


@pytest.fixture
def url(postgres: PostgresServer) -> str:
    return postgres.url(postgres.create_database())


@pytest.fixture
def open_database() -> Iterator[OpenDatabase]:
    """Return Database, whose connections are closed when the test ends."""
    opened: list[Database] = []

    def open_one(url: str) -> Database:
        opened.append(Database(url))
        return opened[-1]

    yield open_one
    for database in opened:
        database.close()


@pytest.fixture
def own_server() -> Iterator[PostgresServer]:
    """Return a server that a test may crash."""
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL server is installed (Debian: apt-get install postgresql)")
    with running_server(binaries, durable=True) as server:
        yield server


def test_settings_take_the_url(
    url: str, monkeypatch: pytest.MonkeyPatch, open_database: OpenDatabase
) -> None:
    monkeypatch.setenv("FATHOM_DATABASE_URL", url)
    assert load_settings().resolved_database_url == url
    assert open_database(url).kind == "postgresql"


def test_a_refused_login_names_the_cause_but_never_the_password(
    postgres: PostgresServer, open_database: OpenDatabase
) -> None:
    database = postgres.create_database()
    good = postgres.tcp_url(database, PASSWORD.replace(" ", "%20"))
    assert DocumentStore(open_database(good)).all() == []
    for url, found in (
        (postgres.tcp_url(database, "swordfish"), "refused the user or the password"),
        (postgres.tcp_url("nowhere", PASSWORD.replace(" ", "%20")), "there is no database"),
    ):
        with pytest.raises(StoreError, match=found) as caught:
            open_database(url)
        shown = caught.value.message + caught.value.hint
        assert "swordfish" not in shown
        assert PASSWORD not in shown


def test_a_database_of_another_encoding_is_refused(
    postgres: PostgresServer, open_database: OpenDatabase
) -> None:
    latin = postgres.create_database("--encoding=LATIN1", "--locale=C", "--template=template0")
    with pytest.raises(StoreError, match="encoding LATIN1; expected UTF8"):
        open_database(postgres.url(latin))


def test_a_newer_schema_is_left_alone(url: str, open_database: OpenDatabase) -> None:
    with open_database(url).write() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StoreError, match="schema 9999"):
        open_database(url)


def test_a_reader_never_blocks_and_sees_one_moment(url: str, open_database: OpenDatabase) -> None:
    database = open_database(url)
    store = DocumentStore(database)
    _save(store, "a", "one")
    with database.read() as connection:
        count = "SELECT count(*) FROM document"
        assert connection.exec_driver_sql(count).scalar() == 1
        _save(store, "b", "two")
        assert connection.exec_driver_sql(count).scalar() == 1
    assert len(store.all()) == 2


def test_without_the_lock_a_reader_would_miss_an_entry_for_ever(
    url: str, open_database: OpenDatabase
) -> None:
    """Why writers queue: numbers are drawn before the commit, so 2 can be seen before 1."""
    open_database(url)
    plain = url.replace("+psycopg", "")
    insert = "INSERT INTO oplog(op, chunk_id) VALUES ('add', 1)"
    seqs = "SELECT seq FROM oplog ORDER BY seq"
    with psycopg.connect(plain) as first, psycopg.connect(plain) as second:
        first.execute(insert)
        second.execute(insert)
        second.commit()
        with psycopg.connect(plain) as reader:
            assert reader.execute(seqs).fetchall() == [(2,)]
        first.commit()
        # with the lock that Database.write takes, the second one has to wait
        first.execute(f"SELECT pg_advisory_xact_lock({WRITER_LOCK})")
        first.execute(insert)
        second.execute("SET LOCAL lock_timeout = '200ms'")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            second.execute(f"SELECT pg_advisory_xact_lock({WRITER_LOCK})")


def test_a_writer_that_waits_too_long_is_told(
    url: str, monkeypatch: pytest.MonkeyPatch, open_database: OpenDatabase
) -> None:
    monkeypatch.setattr("rag.store.database.WAIT_SECONDS", 1)
    database = open_database(url)
    with (
        database.write(),
        pytest.raises(StoreError, match="another process held the library for 1 s"),
    ):
        _save(DocumentStore(database), "a", "one")
    _save(DocumentStore(database), "a", "one")


def test_a_lost_connection_leaves_nothing_half_written(
    url: str, open_database: OpenDatabase
) -> None:
    database = open_database(url)
    store = DocumentStore(database)

    def write_and_lose_the_connection() -> None:
        with database.write() as connection:
            connection.exec_driver_sql("INSERT INTO oplog(op, chunk_id) VALUES ('add', 1)")
            pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
            with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as other:
                other.execute("SELECT pg_terminate_backend(%s)", (pid,))
            connection.exec_driver_sql("INSERT INTO oplog(op, chunk_id) VALUES ('add', 2)")

    with pytest.raises(StoreError, match="cannot be reached"):
        write_and_lose_the_connection()
    assert OpLog(database, EMBEDDER).last_seq() == 0
    assert _save(store, "a", "one").id == 1, "the next call has a new connection and the lock"


def test_what_was_acknowledged_survives_a_crash_of_the_server(
    own_server: PostgresServer, open_database: OpenDatabase
) -> None:
    database = open_database(own_server.url(own_server.create_database()))
    store = DocumentStore(database)
    acknowledged: list[int] = []
    failures: list[StoreError] = []

    def write() -> None:
        try:
            for number in range(10_000):
                acknowledged.append(_save(store, f"{number}", f"text {number}").id)
        except StoreError as error:
            failures.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    while len(acknowledged) < 20:
        time.sleep(0.01)
    own_server.stop("immediate")
    thread.join(30)
    assert "cannot be reached" in failures[0].message
    with pytest.raises(StoreError, match="cannot be reached"):
        store.all()
    own_server.start()
    documents = store.all()
    assert {d.id for d in documents} >= set(acknowledged)
    assert len(documents) <= len(acknowledged) + 1
    assert all(len(store.chunks_of(d.id)) == 1 for d in documents)
    changes = OpLog(database, EMBEDDER).changes_since(0)
    assert changes is not None
    assert len(changes.added) == len(documents)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_told_and_nothing_is_half_written(
    own_server: PostgresServer, tmp_path: Path, open_database: OpenDatabase
) -> None:
    disk = own_server.folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size=24m,mode=0700,uid={_uid(own_server)}"]
    if subprocess.run([*mount, "tmpfs", str(disk)], capture_output=True, check=False).returncode:
        pytest.skip("this system does not let root mount a tmpfs")
    try:
        admin = own_server.url("postgres").replace("+psycopg", "")
        with psycopg.connect(admin, autocommit=True) as connection:
            connection.execute(f"CREATE TABLESPACE small LOCATION '{disk}'")
        database = open_database(own_server.url(own_server.create_database("--tablespace=small")))
        store = DocumentStore(database)
        _save(store, "a", "one")
        noise = np.random.default_rng(0).integers(0x4E00, 0x9FFF, 8_000_000)
        big = "".join(map(chr, noise.tolist()))
        with pytest.raises(StorageFullError, match="nothing was written"):
            _save(store, "b", big)
        assert [d.title for d in store.all()] == ["a"]
        assert store.num_chunks() == 1
        assert _save(store, "c", "three").title == "c"
        database.close()
    finally:
        own_server.stop("immediate")
        subprocess.run(["umount", str(disk)], check=True)


def _uid(server: PostgresServer) -> int:
    return server.data.stat().st_uid


def test_a_deletion_vacuums_and_a_rewrite_leaves_no_word_in_the_table_files(
    postgres: PostgresServer, url: str, open_database: OpenDatabase
) -> None:
    """VACUUM makes dead rows unreadable; their bytes stay until overwritten: see 0009."""
    database = open_database(url)
    store = DocumentStore(database)
    for number in range(30):
        _save(store, f"keep {number}", f"something else {number} " * 50)
    document = _save(store, "a", "zanzibarquay " + "x" * 500)
    assert _table_files_with(postgres, database, b"zanzibarquay"), "else this could not fail"
    store.delete(document.id)
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        vacuumed = "SELECT vacuum_count FROM pg_stat_user_tables WHERE relname = 'chunk'"
        assert connection.execute(vacuumed).fetchall() == [(1,)]
        connection.execute("VACUUM FULL document_text, chunk")
    assert _table_files_with(postgres, database, b"zanzibarquay") == []


def _table_files_with(server: PostgresServer, database: Database, word: bytes) -> list[str]:
    with database.read() as connection:
        oid = connection.exec_driver_sql(
            "SELECT oid FROM pg_database WHERE datname = current_database()"
        ).scalar_one()
    with psycopg.connect(database.url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("CHECKPOINT")
    files = (server.data / "base" / str(oid)).iterdir()
    return [path.name for path in files if word in path.read_bytes()]


def test_a_whole_library_lives_on_a_server(
    settings: Settings, url: str, handbook: Path, tmp_path: Path
) -> None:
    """Ingest, search both ways, ask, delete: as on SQLite, with tantivy in the place of FTS5."""
    remote = settings.model_copy(update={"database_url": url})
    library = Fathom(remote, embedder=HashEmbedder(), engine=make_tiny_engine())
    document = library.ingest(handbook).document
    assert library.ingest(handbook).outcome == "known"
    other = tmp_path / "nul.txt"
    other.write_text("The pier is long.\0 It has a crane. " * 3)
    library.ingest(other)
    assert library.lexical.search("pilot boat", top_k=5)
    answer = library.service().answer("What is the harbour fee?", route=Route.RETRIEVAL)
    assert answer.receipt.read.chunks > 0
    second = Fathom(remote, embedder=HashEmbedder())
    assert second.lexical.search("pilot boat", top_k=5)
    library.delete(document.id)
    assert second.lexical.search("pilot boat", top_k=5) == []
    assert library.lexical.check() is None
    assert [c for c in examine(library) if c.name in CHECKS and not c.passed] == []
    for path in remote.home.rglob("*"):
        assert not path.is_file() or b"pilot boat" not in path.read_bytes(), path
    library.database.close()
    second.database.close()
