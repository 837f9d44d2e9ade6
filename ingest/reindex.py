"""Deriving anew: a library's vectors by another embedder, a document from its original."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ingest.chunking import chunk_text, embedded_text
from ingest.pipeline import original_path
from ingest.readers.guard import read_guarded
from rag.errors import EmbedderMismatchError
from rag.retrieval.embedding import Embedder
from rag.retrieval.vector_index import VectorIndex
from rag.settings import Settings
from rag.store.access import EVERY_OWNER
from rag.store.database import Database
from rag.store.documents import DocumentStore, StoredChunk
from rag.store.oplog import OpLog
from rag.types import Document

FloatArray = npt.NDArray[np.float32]
# What a kill can cost: seconds on a CPU. A GPU has seconds of work in hand beside them.
CHUNKS_PER_COMMIT = 256
CHUNKS_PER_READ = 5_000

OnProgress = Callable[[int, int], None]  # chunks embedded so far, chunks in all


def reembed_library(
    database: Database,
    embedder: Embedder,
    settings: Settings,
    *,
    on_progress: OnProgress | None = None,
) -> int:
    """Embed all chunks with another embedder beside the vectors in use, then switch to it.

    Until the switch, which is one transaction, every process answers with the old vectors; after
    it, one that still embeds with the old model gets EmbedderMismatchError at its next search.
    Each batch is committed: a run that was killed goes on where it stopped.

    Args:
        database: the library.
        embedder: the new embedder.
        settings: where the index lies.
        on_progress: called after each batch.

    Returns:
        How many chunks were embedded by this run.

    Raises:
        EmbedderMismatchError: if a chunk is longer than the new embedder reads; nothing was
            embedded. Such a library is read anew: its chunks have to be cut shorter.
    """
    store = DocumentStore(database, EVERY_OWNER)
    progress = on_progress or (lambda done, total: None)
    if store.active_embedder() == embedder.fingerprint:
        return 0

    # 1. no chunk may be cut off silently
    for part in _chunks_to_embed(store, embedder, CHUNKS_PER_READ):
        _require_that_all_fit(part, embedder)

    embedded = 0
    while True:
        # 2. what has no new vector yet, also what other processes have ingested meanwhile
        for part in _chunks_to_embed(store, embedder, CHUNKS_PER_COMMIT + embedder.queued_texts):
            _require_that_all_fit(part, embedder)
            vectors = embed_chunks(store, embedder, part)
            store.add_vectors(embedder.fingerprint, [stored.id for stored in part], vectors)
            embedded += len(part)
            progress(embedded, max(store.num_chunks(), embedded))

        # 3. build the new index beside the old one, so that the first search need not wait
        log = OpLog(database, embedder.fingerprint)
        folder, name = settings.index_dir, embedder.fingerprint
        index = VectorIndex(log, folder, dim=embedder.dim, embedder=name)
        index.rebuild(alone=False)

        # 4. switch; where chunks came in between, go on with them
        try:
            store.activate_embedder(embedder.fingerprint)
        except EmbedderMismatchError:
            continue
        if index.num_vectors != log.num_vectors():  # another process has re-embedded as well
            index.rebuild()
        index.snapshot(keep=1, wait=True)  # drops the snapshots of the old embedder
        return embedded


def embed_chunks(
    store: DocumentStore, embedder: Embedder, chunks: Sequence[StoredChunk]
) -> FloatArray:
    """Return the vectors of stored chunks as ingest would make them: float32 [len(chunks), dim]."""
    titles: dict[int, str] = {}
    for stored in chunks:
        if stored.document_id not in titles:
            titles[stored.document_id] = store.find(str(stored.document_id)).title
    texts = []
    for stored in chunks:
        title, chunk = titles[stored.document_id], stored.chunk
        text = embedded_text(title, chunk.heading_path, chunk.text)
        # where both do not fit, the heading gives way, not the end of the text
        fits = len(embedder.token_offsets(text)) <= embedder.max_tokens
        texts.append(text if fits else chunk.text)
    return embedder.embed(texts)


def reread_document(
    document: Document, *, store: DocumentStore, embedder: Embedder, settings: Settings
) -> None:
    """Read a document's original again and put what it says in the place of what is stored.

    Raises:
        ReadError: if the original cannot be read any more; nothing was changed.
    """
    original: Path = original_path(settings, document.content_sha256)
    content = read_guarded(original, name=document.title, settings=settings)
    chunks = chunk_text(
        content,
        title=document.title,
        token_offsets=embedder.token_offsets,
        max_tokens=embedder.max_tokens,
    )
    texts = [embedded_text(document.title, c.heading_path, c.text) for c in chunks]
    vectors = embedder.embed(texts)
    store.replace(document.id, content, chunks, vectors, embedder=embedder.fingerprint)


def _chunks_to_embed(
    store: DocumentStore, embedder: Embedder, limit: int
) -> Iterator[list[StoredChunk]]:
    last = 0
    while part := store.chunks_without_vector(embedder.fingerprint, limit, after_id=last):
        yield part
        last = part[-1].id


def _require_that_all_fit(chunks: Sequence[StoredChunk], embedder: Embedder) -> None:
    lengths = [len(embedder.token_offsets(stored.chunk.text)) for stored in chunks]
    too_long = sum(length > embedder.max_tokens for length in lengths)
    if too_long:
        longest = chunks[lengths.index(max(lengths))]
        raise EmbedderMismatchError(
            f"{embedder.fingerprint} reads {embedder.max_tokens} tokens; {too_long:,} of the"
            f" {len(chunks):,} chunks from {chunks[0].id} to {chunks[-1].id} are longer, chunk"
            f" {longest.id} of document {longest.document_id} has {max(lengths)}",
            hint="choose an embedder that reads as much, or ingest into a new --home with this one",
        )
