"""An embedder with a queue of its own is given enough to fill it, in bounded memory."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from conftest import HashEmbedder
from ingest import pipeline
from ingest.chunking import WINDOW_CHARS
from ingest.pipeline import GROUP_CHUNKS, PART_CHUNKS, READ_AHEAD, IngestResult
from rag.errors import SourceNotFoundError
from rag.retrieval import gpu_embedder
from rag.retrieval.embedding import FloatArray
from rag.retrieval.gpu_embedder import QUEUED_TEXTS, GpuEmbedder
from rag.settings import Settings
from rag.types import IngestProgress
from test_embedding import tiny_embedder as tiny_embedder
from test_pipeline import CountingEmbedder, files, leftovers, long_text, named, outcomes_of
from ui.assembly import Fathom


class QueueEmbedder(CountingEmbedder):
    """Embeds its first texts only once everything is cut."""

    queued_texts = 300

    def __init__(self, *last_words: str) -> None:
        """Wait until a text with each of the words has come to be cut."""
        super().__init__()
        self._awaited = set(last_words)
        self._cut = Event()
        if not last_words:
            self._cut.set()

    def token_offsets(self, text: str) -> list[tuple[int, int]]:
        self._awaited -= {word for word in self._awaited if word in text}
        if not self._awaited:
            self._cut.set()
        return super().token_offsets(text)

    def embed(
        self, texts: Sequence[str], *, on_progress: Callable[[int], None] | None = None
    ) -> FloatArray:
        assert self._cut.wait(60), "what is cut waits for what is embedded"
        return super().embed(texts, on_progress=on_progress)


def vectors_of(library: Fathom) -> tuple[list[int], Any]:
    library.index.catch_up()
    return library.index.vectors(sorted(library.index.ids()))


def plain_library(settings: Settings, folder: Path) -> Fathom:
    return Fathom(settings.model_copy(update={"home": folder}), embedder=HashEmbedder())


def same_content(found: Fathom, expected: Fathom) -> None:
    """Assert that two libraries have the same documents, chunks and vectors in one order."""
    assert [d.title for d in found.documents()] == [d.title for d in expected.documents()]
    for one, other in zip(found.documents(), expected.documents(), strict=True):
        chunks, others = (
            library.store.chunks_of(document.id)
            for library, document in ((found, one), (expected, other))
        )
        assert [stored.chunk for stored in chunks] == [stored.chunk for stored in others]
    assert vectors_of(found)[0] == vectors_of(expected)[0]
    np.testing.assert_allclose(vectors_of(found)[1], vectors_of(expected)[1], atol=1e-6)


def test_what_is_cut_of_a_long_document_is_given_at_once_up_to_the_queue(
    settings: Settings, tmp_path: Path
) -> None:
    path = tmp_path / "long.txt"
    path.write_text(long_text(3_200) + "\n\nThis is the end.")
    embedder = QueueEmbedder("the end")
    library = Fathom(settings, embedder=embedder)
    library.ingest(path)
    most = GROUP_CHUNKS + embedder.queued_texts
    # All but the last window was cut before the second call, whatever the first took of it.
    assert sum(embedder.calls) > 2 * most + WINDOW_CHARS / 200
    assert most <= max(embedder.calls) < most + PART_CHUNKS
    expected = plain_library(settings, tmp_path / "plain")
    expected.ingest(path)
    same_content(library, expected)


def test_short_documents_are_read_ahead_until_they_fill_the_queue(
    settings: Settings, tmp_path: Path
) -> None:
    paths = files(tmp_path / "notes", 24)
    embedder = QueueEmbedder(*(f"Ship {number} lies" for number in range(24)))
    library = Fathom(settings, embedder=embedder)
    seen: list[IngestProgress] = []
    sources = [named(path) for path in paths]
    outcomes = list(library.ingest_files(sources, on_progress=seen.append))
    assert outcomes_of(outcomes) == ["added"] * 24
    # What the first call finds, the rest, and the last ones that were cut but not handed over.
    assert len(embedder.calls) <= 2 + settings.num_readers < 24 / READ_AHEAD + 1
    assert [p.fraction for p in seen] == sorted(p.fraction for p in seen)
    assert (seen[-1].fraction, seen[-1].chunks) == (1.0, 24)
    expected = plain_library(settings, tmp_path / "plain")
    list(expected.ingest_files(sources))
    same_content(library, expected)


def test_no_more_files_are_read_ahead_than_the_queue_holds(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = files(tmp_path / "notes", 40)
    begun: list[str] = []
    copy = pipeline._copy

    def counted(source: Any, own: Settings) -> Any:  # noqa: ANN401
        begun.append(source.title)
        return copy(source, own)

    monkeypatch.setattr(pipeline, "_copy", counted)
    embedder = QueueEmbedder("Ship 9 lies")
    embedder.queued_texts = 10
    library = Fathom(settings, embedder=embedder)
    ahead: list[int] = []
    inner = embedder.embed

    def embed(
        texts: Sequence[str], *, on_progress: Callable[[int], None] | None = None
    ) -> FloatArray:
        vectors = inner(texts, on_progress=on_progress)
        ahead.append(len(begun) - sum(embedder.calls))
        return vectors

    monkeypatch.setattr(embedder, "embed", embed)
    assert len(outcomes_of(list(library.ingest_files([named(path) for path in paths])))) == 40
    # Ten had begun before the first was embedded, and there were never more.
    assert max(ahead) <= max(10, READ_AHEAD, settings.num_readers)


def test_a_bad_file_a_known_one_and_a_stop_are_what_they_are_without_a_queue(
    settings: Settings, tmp_path: Path
) -> None:
    paths = files(tmp_path / "notes", 8)
    paths[2].write_bytes(b"")
    library = Fathom(settings, embedder=QueueEmbedder())
    running = library.ingest_files([named(path) for path in paths])
    first = next(running)
    running.close()  # type: ignore[attr-defined]
    assert isinstance(first, IngestResult)
    assert leftovers(settings) == []
    kept = {document.title for document in library.documents()}
    sources = [named(path) for path in paths]
    outcomes = list(library.ingest_files([*sources, SourceNotFoundError("x", hint="y")]))
    names = [o.document.title if isinstance(o, IngestResult) else o.error for o in outcomes]
    assert [name for name in names if isinstance(name, str)] == [
        path.name for path in paths if path != paths[2]
    ]
    assert [isinstance(name, str) for name in names] == [True] * 2 + [False] + [True] * 5 + [False]
    known = {
        o.document.title for o in outcomes if isinstance(o, IngestResult) and o.outcome == "known"
    }
    assert known == kept
    assert leftovers(settings) == []


def test_what_waits_for_its_commit_is_bounded(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "UNCOMMITTED_CHUNKS", 2)
    embedder = CountingEmbedder()
    library = Fathom(settings, embedder=embedder)
    waiting: list[int] = []
    commit = pipeline._commit

    def slowly(*args: Any) -> IngestResult:  # noqa: ANN401
        time.sleep(0.05)  # slower than files are read
        waiting.append(sum(embedder.calls) - len(waiting))
        return commit(*args)

    monkeypatch.setattr(pipeline, "_commit", slowly)
    outcomes = list(library.ingest_files([named(path) for path in files(tmp_path / "notes", 20)]))
    assert outcomes_of(outcomes) == ["added"] * 20
    assert max(waiting) <= 2 + max(embedder.calls)


def test_the_embedder_for_a_gpu_gets_several_lots_at_once(
    settings: Settings, tiny_embedder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way with the real embedder, on a CPU: lots behind one another in one call."""
    embedder = GpuEmbedder(tiny_embedder, name="tiny", device="cpu")
    assert embedder.queued_texts == QUEUED_TEXTS
    monkeypatch.setattr(gpu_embedder, "LOT_CHARACTERS", 8_000)
    library = Fathom(settings, embedder=embedder)
    path = tmp_path / "long.txt"
    path.write_text(long_text(900) + "\n\nThis is the end.")
    cut, calls, lots = Event(), [0], [0]
    offsets, encoded, embed = embedder._tokens.offsets, embedder._tokens.encoded, embedder.embed

    def cutting(text: str) -> list[tuple[int, int]]:
        if "the end" in text:
            cut.set()
        return offsets(text)

    def tokenizing(texts: list[str]) -> Any:  # noqa: ANN401
        lots[-1] += 1
        return encoded(texts)

    def embedding(texts: list[str], **options: Any) -> FloatArray:  # noqa: ANN401
        assert cut.wait(60)
        calls.append(len(texts))
        lots.append(0)
        return embed(texts, **options)

    monkeypatch.setattr(embedder._tokens, "offsets", cutting)
    monkeypatch.setattr(embedder._tokens, "encoded", tokenizing)
    monkeypatch.setattr(embedder, "embed", embedding)
    document = library.ingest(path).document
    assert sum(calls) == document.num_chunks
    assert max(calls) > GROUP_CHUNKS + PART_CHUNKS
    assert max(lots) >= 3
    # Whatever came together, the vectors are those of each chunk.
    stored = library.store.chunks_of(document.id)
    assert vectors_of(library)[0] == [each.id for each in stored]
    texts = [f"long.txt\n{each.chunk.text}" for each in stored]
    cosines = np.sum(vectors_of(library)[1] * embed(texts), axis=1)
    assert float(cosines.min()) >= 0.999


def test_python_runs_beside_the_tokenizer_that_cuts_chunks(tiny_embedder: Path) -> None:
    """Else the embedder, and every other chunker, would wait for each window of a document."""
    from threading import Thread

    from rag.retrieval.embedder_tokens import EmbedderTokens

    tokens = EmbedderTokens(tiny_embedder, longest=128)
    text = "Ships report to the harbour office on arrival. " * 20_000
    begun, ended, seen = Event(), Event(), [0]

    def look() -> None:
        begun.wait()
        while not ended.is_set():
            seen[0] += 1
            time.sleep(0.001)

    thread = Thread(target=look)
    thread.start()
    begun.set()
    found = tokens.offsets(text)
    ended.set()
    thread.join()
    assert len(found) > 50_000
    assert seen[0] > 10
