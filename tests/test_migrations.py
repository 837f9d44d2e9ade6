"""A library made by an older Fathom opens, with everything in it."""

import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from rag.errors import StoreError
from rag.retrieval.lexical_index import Fts5Index
from rag.store.database import Database
from rag.store.documents import DocumentStore, SourceFile
from rag.store.oplog import OpLog
from rag.store.schema import SCHEMA_VERSION, metadata
from rag.types import CanonicalText


def _make_0001(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a library of schema 0001: two versions of one file, and a deleted one."""
    with monkeypatch.context() as patch:
        patch.setattr("rag.store.database.SCHEMA_VERSION", "0001")
        database = Database(f"sqlite:///{path}")
    with database.write() as connection:
        run = connection.exec_driver_sql
        run("INSERT INTO meta VALUES ('embedder', 'old-embedder')")
        for number, source, version in ((1, "/a.txt", 1), (2, "/a.txt", 2), (3, "/b.txt", 1)):
            run(
                "INSERT INTO document"
                " VALUES (?, 'title', ?, ?, ?, ?, 'text/plain', 9, 9, 0, 2, '[]', 't')",
                (number, source, version, number > 1, f"{number:064}"),
            )
            run("INSERT INTO document_text VALUES (?, ?)", (number, f"harbour {number}"))
            for ordinal in (0, 1):
                vector = np.full(4, number + ordinal, dtype=np.float32).tobytes()
                run(
                    "INSERT INTO chunk(document_id, ordinal, start, end, heading, num_tokens, text,"
                    " scope, vector) VALUES (?, ?, 0, 9, 'Fees', 2, ?, ?, ?)",
                    (number, ordinal, f"harbour {number}", f"d{number}", vector),
                )
        run("DELETE FROM chunk WHERE document_id = 3")
        run("DELETE FROM document WHERE id = 3")
    database.engine.dispose()


def test_a_library_of_the_first_schema_is_brought_up_to_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "fathom.sqlite"
    _make_0001(path, monkeypatch)
    database = Database(f"sqlite:///{path}")
    store = DocumentStore(database)
    every = store.all(include_superseded=True)
    assert [(d.id, d.version, d.is_latest) for d in every] == [(1, 1, False), (2, 2, True)]
    assert store.find("/a.txt").id == 2
    assert store.text(1) == "harbour 1"
    assert store.active_embedder() == "old-embedder"
    log = OpLog(database, "old-embedder")
    ((ids, vectors),) = log.vectors()
    assert ids == [1, 2, 3, 4]
    assert vectors.tolist() == [[1.0] * 4, [2.0] * 4, [2.0] * 4, [3.0] * 4]
    assert log.last_seq() == 8
    full_text = Fts5Index(database)
    assert {i for i, _ in full_text.search("harbour fee", top_k=9)} == {1, 2, 3, 4}
    store.delete(2)
    assert {i for i, _ in full_text.search("harbour fee", top_k=9)} == {1, 2}
    assert full_text.check() is None
    ((ids, _),) = log.vectors()
    assert ids == [1, 2]
    assert database.integrity_problem() is None


def test_migrations_make_exactly_the_tables_of_the_schema(database_url: str) -> None:
    database = Database(database_url)
    assert _differences(database) == []
    database.close()


def test_an_upgraded_library_has_exactly_the_tables_of_the_schema(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _make_0001(tmp_path / "fathom.sqlite", monkeypatch)
    assert _differences(Database(f"sqlite:///{tmp_path / 'fathom.sqlite'}")) == []


def _differences(database: Database) -> list[Any]:
    with database.read() as connection:
        ours = {"include_name": lambda name, *_: not str(name).startswith("chunk_fts")}
        context = MigrationContext.configure(connection, opts=ours)
        return list(compare_metadata(context, metadata))


def test_what_was_there_before_owners_belongs_to_nobody(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("rag.store.database.SCHEMA_VERSION", "0003")
        database = Database(database_url)
    with database.write() as connection:
        run = connection.exec_driver_sql
        for number in (1, 2):
            run(
                "INSERT INTO document(title, source, version, content_sha256, media_type,"
                " num_bytes, num_chars, num_pages, num_chunks, warnings, created_at) VALUES"
                f" ('title', '/{number}.txt', 1, '{number:064}', 'text/plain',"
                " 9, 9, 0, 1, '[]', 't')"
            )
            run(f"INSERT INTO document_text VALUES ({number}, 'harbour {number}')")
            run(f"INSERT INTO source_version VALUES ('/{number}.txt', 1, 'title', {number})")
            run(f"INSERT INTO collection_member VALUES ('deals', {number})")
            run(f"INSERT INTO answer VALUES ('receipt-{number}', 't', 'who?', '{{}}')")
            run(f"INSERT INTO answer_document VALUES ('receipt-{number}', {number})")
        run("DELETE FROM document WHERE id = 2")
    database.close()

    database = Database(database_url)
    assert _differences(database) == []
    store = DocumentStore(database)
    (document,) = store.all()
    assert (document.id, document.owner, document.collections) == (1, "", ("deals",))
    assert store.text(1) == "harbour 1"
    assert DocumentStore(database, "anna").all(include_superseded=True) == []
    with database.read() as connection:
        assert connection.exec_driver_sql("SELECT DISTINCT owner FROM answer").scalars().all() == [
            ""
        ]
    content = CanonicalText("new", "text/plain")
    saved = store.save(
        SourceFile("/1.txt", "title", "f" * 64, 3),
        content,
        [],
        np.empty((0, 4), np.float32),
        embedder="e",
    )
    assert (saved.id, saved.version) == (3, 2)  # a number of a deleted document is not given again
    with pytest.raises(StoreError), database.write() as connection:
        connection.exec_driver_sql("INSERT INTO document_text VALUES (99, 'of no document')")
    database.close()


def test_a_library_of_a_newer_schema_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "fathom.sqlite"
    Database(f"sqlite:///{path}").engine.dispose()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StoreError, match=f"schema 9999; this Fathom knows up to {SCHEMA_VERSION}"):
        Database(f"sqlite:///{path}")
