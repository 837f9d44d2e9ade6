"""BM25 over the chunks: SQLite's FTS5, kept by triggers in the store's own transactions."""

import re
from collections.abc import Sequence

from sqlalchemy import text

from rag.store.database import Database

# Weights of the columns text, heading and scope: a word of the heading says what the chunk is
# about, though less than the chunk itself; the scope only filters.
_COLUMN_WEIGHTS = "1.0, 0.5, 0.0"
_WORD = re.compile(r"\w+")


class LexicalIndex:
    """Full-text search in one library."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def search(
        self, question: str, *, top_k: int, document_ids: Sequence[int] | None = None
    ) -> list[tuple[int, float]]:
        """Return up to `top_k` (chunk id, BM25 score, higher is nearer), best first.

        Any word of the question may match; FTS5's query syntax in it has no effect.
        """
        words = dict.fromkeys(word.lower() for word in _WORD.findall(question))
        if not words or document_ids == []:
            return []
        any_word = " OR ".join(f'"{word}"' for word in words)
        match = f"{{text heading}} : ({any_word})"
        if document_ids is not None:
            scopes = " OR ".join(f'"d{int(i)}"' for i in document_ids)
            match = f"(scope : ({scopes})) AND ({match})"
        query = text(
            f"SELECT rowid, -bm25(chunk_fts, {_COLUMN_WEIGHTS}) AS score FROM chunk_fts"
            " WHERE chunk_fts MATCH :match ORDER BY score DESC LIMIT :top_k"
        )
        with self._database.read() as connection:
            rows = connection.execute(query, {"match": match, "top_k": top_k}).all()
        return [(row.rowid, float(row.score)) for row in rows]

    def frequencies(
        self, words: Sequence[str], *, document_ids: Sequence[int] | None = None
    ) -> dict[str, int]:
        """Return for each word, stemmed, how many chunks hold it, of these documents or of all."""
        scope = ""
        if document_ids is not None:
            scope = "(scope : (" + " OR ".join(f'"d{int(i)}"' for i in document_ids) + ")) AND "
        query = text("SELECT count(*) FROM chunk_fts WHERE chunk_fts MATCH :match")
        with self._database.read() as connection:
            return {
                word: connection.scalar(query, {"match": f'{scope}({{text heading}} : "{word}")'})
                or 0
                for word in words
            }

    def check(self) -> str | None:
        """Return what is wrong between the full-text rows and the chunks, or None."""
        from rag.errors import StoreError

        statement = text("INSERT INTO chunk_fts(chunk_fts, rank) VALUES ('integrity-check', 1)")
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
