"""The parts of a document, which are written with it: text, pages, sections, chunks, vectors."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection, insert, select

from rag.store.database import upsert
from rag.store.schema import chunk, chunk_vector, document_text, page, section
from rag.types import CanonicalText, Chunk

FloatArray = npt.NDArray[np.float32]
HEADING_SEPARATOR = " > "
ROWS_PER_INSERT = 1_000


def insert_parts(
    connection: Connection,
    document_id: int,
    content: CanonicalText,
    chunks: Sequence[Chunk],
    vectors: FloatArray,
    embedder: str,
) -> None:
    """Insert all parts of a document; `vectors` is float32 [len(chunks), dim]."""
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
    insert_vectors(
        connection, embedder, [id_of[c.ordinal] for c in chunks], vectors, range(len(chunks))
    )


def insert_vectors(
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
