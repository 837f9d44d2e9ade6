"""How often is the evidence found? Evidence recall of each way to search, beside a BM25 floor."""

import hashlib
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eval.bench.bm25_floor import BM25Floor
from eval.evidence_sets import EvidenceQuestion, EvidenceSet, ingest_set
from eval.metrics import RANKS, evidence_read, recall_at_ranks
from eval.statistics import Interval, cluster_bootstrap
from ingest.pipeline import ingest_files
from rag.answering.context import nearest_passages, retrieved_context
from rag.retrieval.embedder_tokens import Offsets
from rag.retrieval.embedding import Embedder, FloatArray
from rag.retrieval.lexical_index import open_lexical_index
from rag.retrieval.reranker import Reranker
from rag.retrieval.retriever import Hit, Retriever
from rag.retrieval.vector_index import VectorIndex
from rag.settings import Settings
from rag.store.database import Database
from rag.store.documents import DocumentStore
from rag.store.oplog import OpLog
from rag.types import Document

TOKEN_BUDGETS = (256, 512, 1024, 2048)
COLUMNS = (*(f"@{k}" for k in RANKS), *(f"{n}t" for n in TOKEN_BUDGETS))


@dataclass(frozen=True, slots=True)
class ArmReport:
    """One way to search on one set.

    `recall` holds the columns `@k`, within the k nearest passages, and `NNNt`, within what is read
    of NNN tokens. `ahead_of` holds, for each arm before it, the paired difference to that arm.
    """

    arm: str
    passage_tokens: float
    recall: dict[str, Interval]
    ahead_of: dict[str, dict[str, Interval]]


@dataclass(frozen=True, slots=True)
class SetReport:
    """One set: its size, its arms, and the wall-clock time of one hybrid retrieval."""

    name: str
    num_questions: int
    num_documents: int
    p50_milliseconds: float
    p95_milliseconds: float
    arms: tuple[ArmReport, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the set's part of the JSON line."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Found:
    """What one arm gave for one question: a value for each column, and the passages' lengths."""

    recall: list[float]
    passage_tokens: list[int]


def bench_retrieval(
    evidence: EvidenceSet,
    *,
    embedder: Embedder,
    settings: Settings,
    reranker: Reranker | None = None,
    cache_folder: Path | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> SetReport:
    """Ingest one set's documents into a temporary library, ask every question, score every arm.

    Each question is asked of its own document. The arms are `floor`, and of ours `lexical`,
    `dense`, `hybrid` and, with a reranker, `reranked`: the same candidates in the order of one
    score, of the other, and of both.

    Args:
        evidence: documents and questions.
        embedder: embeds chunks and questions.
        settings: chunk length, number of candidates and reader limits; its home is not touched.
        reranker: the cross-encoder of the last arm.
        cache_folder: where chunk vectors are kept between runs; None keeps none.
        on_progress: called with the stage, what is done of it and its total.

    Raises:
        ReadError: if a document's text does not survive ingesting, so that spans would not fit.
    """
    progress = on_progress or (lambda stage, done, total: None)
    count_tokens = cache(lambda text: len(embedder.token_offsets(text)))
    with tempfile.TemporaryDirectory(prefix="fathom-bench-") as folder:
        library = settings.model_copy(update={"home": Path(folder), "database_url": None})
        store, retrievers, documents = ingested_library(
            evidence, embedder, library, reranker, cache_folder, progress
        )
        texts = {document.id: document.text for document in evidence.documents}
        floors = {name: BM25Floor(text) for name, text in texts.items()}
        found: dict[str, list[_Found]] = {}
        seconds: list[float] = []
        for number, question in enumerate(evidence.questions, start=1):
            document = documents[question.document]
            text = texts[question.document]
            windows = floors[question.document].ranked(question.question)
            found.setdefault("floor", []).append(
                _score_windows(windows, text, question, evidence.long_spans, embedder)
            )
            for arm, hits in _arms(question.question, document, retrievers, library, seconds):
                found.setdefault(arm, []).append(
                    _score_hits(hits, document, question, evidence.long_spans, store, count_tokens)
                )
            progress("asking", number, len(evidence.questions))
    p50, p95 = np.percentile(np.array(seconds) * 1000, [50, 95])
    return SetReport(
        name=evidence.name,
        num_questions=len(evidence.questions),
        num_documents=len(evidence.documents),
        p50_milliseconds=round(float(p50), 2),
        p95_milliseconds=round(float(p95), 2),
        arms=_compared(found, [question.document for question in evidence.questions]),
    )


def card(report: SetReport) -> str:
    """Return the set's table for people; `*` marks a difference whose interval excludes zero."""
    head = f"{report.name}: {report.num_questions} questions on {report.num_documents} documents"
    times = f"{report.p50_milliseconds:.1f} ms a question, 95% within {report.p95_milliseconds:.1f}"
    lines = [f"{head}; {times}", _row("", "tokens", list(COLUMNS))]
    for arm in report.arms:
        cells = [f"{arm.recall[column].mean:.3f}" for column in COLUMNS]
        lines.append(_row(arm.arm, f"{arm.passage_tokens:.0f}", cells))
    last = report.arms[-1]
    for other, differences in last.ahead_of.items():
        cells = [
            f"{differences[c].mean:+.3f}{'*' if differences[c].excludes_zero else ''}"
            for c in COLUMNS
        ]
        lines.append(_row(f"{last.arm} - {other}", "", cells))
    return "\n".join(lines)


class CachedEmbedder:
    """An embedder that keeps the vectors of chunks in a file, by its fingerprint and the text."""

    def __init__(self, embedder: Embedder, folder: Path) -> None:
        """Open or create `vectors.sqlite` in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        self._embedder = embedder
        self.fingerprint, self.dim = embedder.fingerprint, embedder.dim
        self.max_tokens = embedder.max_tokens
        self.queued_texts = embedder.queued_texts
        self._file = sqlite3.connect(folder / "vectors.sqlite", isolation_level=None)
        self._file.execute("CREATE TABLE IF NOT EXISTS vector (key BLOB PRIMARY KEY, value BLOB)")

    def token_offsets(self, text: str) -> Offsets:
        """Return the `[start, end)` characters of every token of `text`, in order."""
        return self._embedder.token_offsets(text)

    def embed(
        self, texts: Sequence[str], *, on_progress: Callable[[int], None] | None = None
    ) -> FloatArray:
        """Return float32 [len(texts), dim], unit length; only unknown texts are embedded."""
        keys = [hashlib.sha256(f"{self.fingerprint}\0{text}".encode()).digest() for text in texts]
        known = {key: self._known(key) for key in keys}
        unknown = [i for i, key in enumerate(keys) if known[key] is None]
        if unknown:
            vectors = self._embedder.embed([texts[i] for i in unknown], on_progress=on_progress)
            rows = [(keys[i], vector.tobytes()) for i, vector in zip(unknown, vectors, strict=True)]
            self._file.execute("BEGIN")
            self._file.executemany("INSERT OR REPLACE INTO vector VALUES (?, ?)", rows)
            self._file.execute("COMMIT")
            known |= dict(rows)
        values = [known[key] or b"" for key in keys]
        return np.frombuffer(b"".join(values), dtype=np.float32).reshape(len(texts), self.dim)

    def _known(self, key: bytes) -> bytes | None:
        row = self._file.execute("SELECT value FROM vector WHERE key = ?", (key,)).fetchone()
        return bytes(row[0]) if row else None


def ingested_library(
    evidence: EvidenceSet,
    embedder: Embedder,
    settings: Settings,
    reranker: Reranker | None,
    cache_folder: Path | None,
    progress: Callable[[str, int, int], None],
) -> tuple[DocumentStore, dict[str, Retriever], dict[str, Document]]:
    """Ingest the documents the way every document goes; return them by the set's own ids."""
    database = Database(settings.resolved_database_url)
    store = DocumentStore(database)
    ingesting = CachedEmbedder(embedder, cache_folder) if cache_folder else embedder
    documents = ingest_set(
        evidence.documents,
        lambda sources: ingest_files(sources, store=store, embedder=ingesting, settings=settings),
        settings.home,
        on_progress=lambda done, total: progress("ingesting", done, total),
    )
    index = VectorIndex(
        OpLog(database, embedder.fingerprint),
        settings.index_dir,
        dim=embedder.dim,
        embedder=embedder.fingerprint,
    )
    lexical = open_lexical_index(database, settings.lexical_dir)
    retrievers = {"hybrid": Retriever(store, index, lexical, embedder)}
    if reranker:
        retrievers["reranked"] = Retriever(store, index, lexical, embedder, reranker)
    return store, retrievers, documents


def _arms(
    question: str,
    document: Document,
    retrievers: dict[str, Retriever],
    settings: Settings,
    seconds: list[float],
) -> Iterator[tuple[str, list[Hit]]]:
    """Yield each arm's hits in its order; the time of the hybrid retrieval goes into `seconds`."""
    started = time.perf_counter()
    hits = retrievers["hybrid"].retrieve(
        question, [document], num_candidates=settings.num_candidates
    )
    seconds.append(time.perf_counter() - started)
    yield "lexical", sorted(hits, key=lambda hit: -hit.lexical)
    yield "dense", sorted(hits, key=lambda hit: -hit.cosine)
    yield "hybrid", hits
    if "reranked" in retrievers:
        reranked = retrievers["reranked"]
        yield (
            "reranked",
            reranked.retrieve(question, [document], num_candidates=settings.num_candidates),
        )


def _score_hits(
    hits: list[Hit],
    document: Document,
    question: EvidenceQuestion,
    long_spans: bool,
    store: DocumentStore,
    count_tokens: Callable[[str], int],
) -> _Found:
    passages = list(islice(nearest_passages(hits, [document], store=store), max(RANKS)))
    spans = [(passage.start, passage.end) for passage in passages]
    recall = recall_at_ranks(spans, question.spans, long_spans=long_spans)
    for budget in TOKEN_BUDGETS:
        context = retrieved_context(
            hits, [document], store=store, count_tokens=count_tokens, token_budget=budget
        )
        read = [(p.passage.start, p.passage.end) for p in context.passages]
        recall.append(evidence_read(read, question.spans, long_spans=long_spans))
    return _Found(recall, [count_tokens(passage.text) for passage in passages])


def _score_windows(
    windows: Sequence[tuple[int, int]],
    text: str,
    question: EvidenceQuestion,
    long_spans: bool,
    embedder: Embedder,
) -> _Found:
    """Score the floor. Its last window is cut where the budget ends: nothing is left unspent."""
    recall = recall_at_ranks(windows, question.spans, long_spans=long_spans)
    offsets = [embedder.token_offsets(text[a:b]) for a, b in windows[: max(RANKS)]]
    for budget in TOKEN_BUDGETS:
        read: list[tuple[int, int]] = []
        left = budget
        for (start, _), tokens in zip(windows, offsets, strict=False):
            part = tokens[:left]
            if part:
                read.append((start, start + part[-1][1]))
            left -= len(part)
        recall.append(evidence_read(read, question.spans, long_spans=long_spans))
    return _Found(recall, [len(tokens) for tokens in offsets])


def _compared(found: dict[str, list[_Found]], clusters: list[str]) -> tuple[ArmReport, ...]:
    tables = {arm: np.array([f.recall for f in rows]) for arm, rows in found.items()}  # [Q, C]
    reports: list[ArmReport] = []
    for arm, table in tables.items():
        reports.append(
            ArmReport(
                arm=arm,
                passage_tokens=round(
                    float(np.mean([n for row in found[arm] for n in row.passage_tokens])), 1
                ),
                recall=_intervals(table, clusters),
                ahead_of={
                    before.arm: _intervals(table - tables[before.arm], clusters)
                    for before in reports
                },
            )
        )
    return tuple(reports)


def _intervals(table: npt.NDArray[np.float64], clusters: list[str]) -> dict[str, Interval]:
    return {column: cluster_bootstrap(table[:, at], clusters) for at, column in enumerate(COLUMNS)}


def _row(label: str, tokens: str, cells: list[str]) -> str:
    return f"  {label:<18}{tokens:>6}  " + "".join(f"{cell:<8}" for cell in cells).rstrip()
