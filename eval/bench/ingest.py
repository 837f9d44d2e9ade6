"""How fast documents are ingested, beside plain sentence-transformers on the same chunks."""

import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from ingest.pipeline import IngestFailure, ingest_files
from ingest.sources import SourceToRead
from rag.retrieval.embedder_tokens import Offsets
from rag.retrieval.embedding import Embedder, FloatArray
from rag.settings import Settings
from rag.store.database import Database
from rag.store.documents import DocumentStore

PEER_BATCH_TEXTS = 32  # the default of sentence-transformers
Peer = Callable[[list[str]], npt.NDArray[np.float32]]  # texts -> float32 [n, dim], unit length


@dataclass(frozen=True, slots=True)
class IngestBench:
    """One run; seconds are medians of its rounds, wall clock.

    `embedder_seconds` is the part of `seconds` spent inside the embedder, the limit that no ingest
    with this embedder can beat; `embedder_share` is their ratio. `peer_seconds` is what plain
    sentence-transformers takes to embed the same texts, without reading or storing any; `ratio` is
    the median over the rounds of peer to ours. `min_cosine` compares the vectors of both.
    `peak_bytes` is the largest resident size of this process until the first ingest was done, the
    embedder included; the processes that read are apart and have a limit of their own.
    """

    files: int
    pages: int
    chunks: int
    tokens: int
    seconds: float
    embedder_seconds: float
    peer_seconds: float
    ratio: float
    embedder_share: float
    min_cosine: float
    peak_bytes: int

    @property
    def pages_per_second(self) -> float:
        """Pages ingested a second, 0 where the formats have none."""
        return self.pages / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """The embedder's tokens ingested a second."""
        return self.tokens / self.seconds

    def to_json(self) -> dict[str, Any]:
        """Return the object that `fathom bench ingest` prints last."""
        return {"bench": "ingest", **asdict(self)} | {
            "pages_per_second": self.pages_per_second,
            "tokens_per_second": self.tokens_per_second,
        }


def bench_ingest(
    sources: Sequence[SourceToRead],
    embedder: Embedder,
    load_peer: Callable[[], Peer],
    settings: Settings,
    *,
    rounds: int = 1,
) -> IngestBench:
    """Ingest the files into a library of their own, then let the peer embed the same texts.

    Args:
        sources: the files; those that cannot be read are left out of every figure.
        embedder: ours, warmed up.
        load_peer: called once the first ingest is done, e.g. with `plain_sentence_transformers`.
        settings: limits; the library lies in a temporary folder.
        rounds: how often both run, in turn.
    """
    runs: list[tuple[float, float, float]] = []
    peer: Peer | None = None
    for _ in range(rounds):
        timed = TimedEmbedder(embedder)
        with tempfile.TemporaryDirectory() as home:
            own = settings.model_copy(update={"home": Path(home), "database_url": None})
            database = Database(own.resolved_database_url)
            begun = time.perf_counter()
            outcomes = list(
                ingest_files(sources, store=DocumentStore(database), embedder=timed, settings=own)
            )
            seconds = time.perf_counter() - begun
            database.engine.dispose()
        if peer is None:
            peak, peer = _peak_bytes(), load_peer()
        begun = time.perf_counter()
        vectors = peer(timed.texts)
        runs.append((seconds, timed.seconds, time.perf_counter() - begun))
    documents = [o.document for o in outcomes if not isinstance(o, IngestFailure)]
    return IngestBench(
        files=len(documents),
        pages=sum(document.num_pages for document in documents),
        chunks=len(timed.texts),
        tokens=sum(len(embedder.token_offsets(text)) for text in timed.texts),
        seconds=median(ours for ours, _, _ in runs),
        embedder_seconds=median(inside for _, inside, _ in runs),
        peer_seconds=median(peers for _, _, peers in runs),
        ratio=median(peers / ours for ours, _, peers in runs),
        embedder_share=median(inside / ours for ours, inside, _ in runs),
        min_cosine=float(np.min(np.sum(vectors * np.concatenate(timed.vectors), axis=1))),
        peak_bytes=peak,
    )


def plain_sentence_transformers(folder: Path, *, device: str, dtype: str | None = None) -> Peer:
    """Return the peer: `SentenceTransformer.encode` as its documentation shows it.

    Args:
        folder: the model's.
        device: cuda or cpu.
        dtype: of its weights; by default as stored.
    """
    from sentence_transformers import SentenceTransformer

    options = {"dtype": dtype} if dtype else {}
    model = SentenceTransformer(
        str(folder), device=device, local_files_only=True, model_kwargs=options
    )
    model.encode(["warm up"])

    def embed(texts: list[str]) -> npt.NDArray[np.float32]:
        found = model.encode(texts, batch_size=PEER_BATCH_TEXTS, normalize_embeddings=True)
        return np.asarray(found, dtype=np.float32)

    return embed


def card(bench: IngestBench) -> str:
    """Return the figures for people."""
    return "\n".join(
        (
            f"{bench.files} files, {bench.pages:,} pages, {bench.chunks:,} chunks,"
            f" {bench.tokens:,} tokens of the embedder",
            f"ours      {bench.seconds:8.1f} s  {bench.tokens_per_second:8,.0f} tokens/s"
            f"  {bench.pages_per_second:6.1f} pages/s, read, chunked, embedded and on disk",
            f"embedder  {bench.embedder_seconds:8.1f} s  {bench.embedder_share:8.1%} of ours,"
            " the limit",
            f"peer      {bench.peer_seconds:8.1f} s"
            f"  {bench.tokens / bench.peer_seconds:8,.0f} tokens/s, sentence-transformers on the"
            " same texts, embedded only",
            f"ratio     {bench.ratio:8.2f}    of the peer's seconds to ours; the vectors' cosine is"
            f" {bench.min_cosine:.5f} or more",
            f"memory    {bench.peak_bytes / 2**20:8,.0f} MiB resident at most, embedder included",
        )
    )


class TimedEmbedder:
    """An embedder that counts the seconds it is busy, and keeps what went through it."""

    def __init__(self, embedder: Embedder) -> None:
        """Begin at 0."""
        self._embedder = embedder
        self.fingerprint = embedder.fingerprint
        self.dim = embedder.dim
        self.max_tokens = embedder.max_tokens
        self.queued_texts = embedder.queued_texts
        self.seconds = 0.0
        self.texts: list[str] = []
        self.vectors: list[FloatArray] = []

    def token_offsets(self, text: str) -> Offsets:
        """Return what the embedder does."""
        return self._embedder.token_offsets(text)

    def embed(
        self, texts: Sequence[str], *, on_progress: Callable[[int], None] | None = None
    ) -> FloatArray:
        """Return what the embedder does."""
        begun = time.perf_counter()
        vectors = self._embedder.embed(texts, on_progress=on_progress)
        self.seconds += time.perf_counter() - begun
        self.texts += texts
        self.vectors.append(vectors)
        return vectors


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
