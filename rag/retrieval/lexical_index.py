"""BM25 over the chunks: the interface, SQLite's FTS5, and the choice between that and tantivy."""

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Protocol

from sqlalchemy import Connection, delete, func, select, text

from rag.errors import StoreError
from rag.store.database import Database, upsert
from rag.store.oplog import TextLog
from rag.store.schema import chunk, meta

# FTS5 weighs every chunk that holds any word of the question, and a deletion merges all its rows:
# both grow with the library (docs/decisions/0010). tantivy skips most, and writes anew only what a
# deletion touches. Half of this is the way back.
LARGEST_FTS5_CHUNKS = 100_000

# Weights of the columns text, heading and scope: a word of the heading says what the chunk is
# about, though less than the chunk itself; the scope only filters.
_COLUMN_WEIGHTS = "1.0, 0.5, 0.0"
# A scope is one more word to look for, which is fastest for a few documents; each further one
# costs, so that more are looked up by number. The plus keeps SQLite from turning the search round.
_FEW_DOCUMENTS = 30
_AMONG_DOCUMENTS = (
    "AND +rowid IN (SELECT id FROM chunk WHERE document_id IN (SELECT value FROM json_each(:ids)))"
)
_WORD = re.compile(r"\w+")


class LexicalIndex(Protocol):
    """Full-text search in one library: BM25 with English stemming, equal to the store."""

    def search(
        self, question: str, *, top_k: int, document_ids: Sequence[int] | None = None
    ) -> list[tuple[int, float]]:
        """Return up to `top_k` (chunk id, BM25 score, higher is nearer), best first.

        Any word of the question may match; no sign in it is taken for query syntax.

        Args:
            question: in words.
            top_k: how many to return at most.
            document_ids: search only the chunks of these; None searches all.
        """

    def frequencies(
        self, words: Sequence[str], *, document_ids: Sequence[int] | None = None
    ) -> dict[str, int]:
        """Return for each word how many chunks hold it or another form of it.

        Args:
            words: single words.
            document_ids: count only the chunks of these; None counts all.
        """

    def check(self) -> str | None:
        """Return what is wrong between the index and the chunks, or None."""

    def rebuild(self) -> None:
        """Build the index anew from the chunks."""

    def erase_deleted(self) -> None:
        """Remove what deleted chunks have left in the index's files."""


def open_lexical_index(database: Database, folder: Path) -> LexicalIndex:
    """Return FTS5 or, for a SQLite library of more than 100,000 chunks, tantivy in `folder`."""
    if database.kind == "sqlite":
        index = SQLiteIndex(database, folder)
        index.settle()
        return index
    return _tantivy(database, folder)


def _tantivy(database: Database, folder: Path) -> LexicalIndex:
    from rag.retrieval.tantivy_index import TantivyIndex

    return TantivyIndex(TextLog(database), folder)


class SQLiteIndex:
    """FTS5 or tantivy, whichever the library has now: any process may change it."""

    def __init__(self, database: Database, folder: Path) -> None:
        self._database = database
        self._folder = folder
        self.fts5 = Fts5Index(database)

    @cached_property
    def tantivy(self) -> LexicalIndex:
        """The index that takes the place of the FTS5 rows, made when it is first needed."""
        return _tantivy(self._database, self._folder)

    def settle(self) -> None:
        """Change from FTS5 to tantivy or back if the size of the library asks for it."""
        with self._database.read() as connection:
            num_chunks = connection.scalar(select(func.count()).select_from(chunk)) or 0
            is_kept = self._database.keeps_words(connection)
        if is_kept and num_chunks > LARGEST_FTS5_CHUNKS:
            self.fts5.drop()
        elif not is_kept and num_chunks <= LARGEST_FTS5_CHUNKS // 2:
            self.fts5.rebuild()
            is_kept = True
        if is_kept and num_chunks <= LARGEST_FTS5_CHUNKS:
            # nobody would take deleted words out of it
            shutil.rmtree(self._folder, ignore_errors=True)

    def search(
        self, question: str, *, top_k: int, document_ids: Sequence[int] | None = None
    ) -> list[tuple[int, float]]:
        """Return up to `top_k` (chunk id, BM25 score), best first; see `LexicalIndex`."""
        try:
            return self.fts5.search(question, top_k=top_k, document_ids=document_ids)
        except _RowsNotKeptError:
            return self.tantivy.search(question, top_k=top_k, document_ids=document_ids)

    def frequencies(
        self, words: Sequence[str], *, document_ids: Sequence[int] | None = None
    ) -> dict[str, int]:
        """Return for each word how many chunks hold it; see `LexicalIndex`."""
        try:
            return self.fts5.frequencies(words, document_ids=document_ids)
        except _RowsNotKeptError:
            return self.tantivy.frequencies(words, document_ids=document_ids)

    def check(self) -> str | None:
        """Return what is wrong between the index and the chunks, or None."""
        try:
            return self.fts5.check()
        except _RowsNotKeptError:
            return self.fts5.remains() or self.tantivy.check()

    def rebuild(self) -> None:
        """Build the index anew from the chunks."""
        with self._database.read() as connection:
            is_kept = self._database.keeps_words(connection)
        if is_kept:
            self.fts5.rebuild()
        else:
            self.fts5.drop()
            self.tantivy.rebuild()

    def erase_deleted(self) -> None:
        """Remove what deleted chunks have left in the index's files."""
        self.settle()
        with self._database.read() as connection:
            is_kept = self._database.keeps_words(connection)
        if not is_kept:
            self.tantivy.erase_deleted()


class _RowsNotKeptError(Exception):
    """The library has no FTS5 rows now."""


class Fts5Index:
    """SQLite's own full-text rows, kept by triggers in the store's transactions."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def search(
        self, question: str, *, top_k: int, document_ids: Sequence[int] | None = None
    ) -> list[tuple[int, float]]:
        """Return up to `top_k` (chunk id, BM25 score), best first; see `LexicalIndex`."""
        words = dict.fromkeys(word.lower() for word in _WORD.findall(question))
        if not words or (document_ids is not None and not document_ids):
            return []
        values, among = _match(words, document_ids)
        query = text(
            f"SELECT rowid, -bm25(chunk_fts, {_COLUMN_WEIGHTS}) AS score FROM chunk_fts"
            f" WHERE chunk_fts MATCH :match {among} ORDER BY score DESC LIMIT :top_k"
        )
        with self._rows() as connection:
            rows = connection.execute(query, {**values, "top_k": top_k}).all()
        return [(row.rowid, float(row.score)) for row in rows]

    def frequencies(
        self, words: Sequence[str], *, document_ids: Sequence[int] | None = None
    ) -> dict[str, int]:
        """Return for each word how many chunks hold it; see `LexicalIndex`."""
        if document_ids is not None and not document_ids:
            return dict.fromkeys(words, 0)
        if not words:
            return {}
        counts: list[str] = []
        values: dict[str, str] = {}
        for number, word in enumerate(words):
            of_word, among = _match([word], document_ids)
            values |= of_word | {f"match{number}": of_word["match"]}
            counts.append(
                f"(SELECT count(*) FROM chunk_fts WHERE chunk_fts MATCH :match{number} {among})"
            )
        del values["match"]
        with self._rows() as connection:  # in one statement: each by itself costs as much again
            row = connection.execute(text(f"SELECT {', '.join(counts)}"), values).one()
        return dict(zip(words, row, strict=True))

    def check(self) -> str | None:
        """Return what is wrong between the full-text rows and the chunks, or None."""
        statement = text("INSERT INTO chunk_fts(chunk_fts, rank) VALUES ('integrity-check', 1)")
        with self._rows():
            pass
        try:
            with self._database.write() as connection:
                connection.execute(statement)
        except StoreError as error:
            return error.message
        return None

    def rebuild(self) -> None:
        """Build the full-text rows anew from the chunks."""
        with self._database.write() as connection:
            connection.execute(text("INSERT INTO chunk_fts(chunk_fts) VALUES ('rebuild')"))
            connection.execute(delete(meta).where(meta.c.key == "without_fts5"))

    def drop(self) -> None:
        """Empty the full-text rows, and keep none until `rebuild`."""
        with self._database.write() as connection:
            connection.execute(text("INSERT INTO chunk_fts(chunk_fts) VALUES ('delete-all')"))
            upsert(connection, meta, [{"key": "without_fts5", "value": "1"}])
        self._database.erase_deleted()

    def remains(self) -> str | None:
        """Say if there are full-text rows although none are kept."""
        with self._database.read() as connection:
            rows = connection.scalar(text("SELECT count(*) FROM chunk_fts_docsize"))
        return f"{rows} full-text rows are left that nothing keeps" if rows else None

    @contextmanager
    def _rows(self) -> Iterator[Connection]:
        """Yield a connection in one read transaction, in which the rows are known to be kept."""
        with self._database.read() as connection:
            if not self._database.keeps_words(connection):
                raise _RowsNotKeptError
            yield connection


def _match(words: Iterable[str], document_ids: Sequence[int] | None) -> tuple[dict[str, str], str]:
    """Return the query's values and the condition that keeps it among the documents."""
    any_word = " OR ".join(f'"{word}"' for word in words)
    values = {"match": f"{{text heading}} : ({any_word})"}
    if document_ids is None:
        return values, ""
    if len(document_ids) <= _FEW_DOCUMENTS:
        scopes = " OR ".join(f'"d{int(i)}"' for i in document_ids)
        return {"match": f"(scope : ({scopes})) AND ({values['match']})"}, ""
    return {**values, "ids": json.dumps([int(i) for i in document_ids])}, _AMONG_DOCUMENTS
