"""Many files at once: in order, together, and nothing left behind."""

from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from sqlalchemy import event

from conftest import HashEmbedder
from ingest.chunking import chunk_text, embedded_text
from ingest.pipeline import GROUP_CHUNKS, PART_CHUNKS, IngestFailure, IngestResult, original_path
from ingest.sources import SourceToRead, find_sources
from rag.errors import ReaderFailedError, SourceNotFoundError, StorageFullError
from rag.retrieval.embedding import FloatArray
from rag.settings import Settings
from rag.types import CanonicalText, IngestProgress
from ui.assembly import Fathom


class CountingEmbedder(HashEmbedder):
    """Remembers how many texts came with each call."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def embed(
        self, texts: Sequence[str], *, on_progress: Callable[[int], None] | None = None
    ) -> FloatArray:
        self.calls.append(len(texts))
        return super().embed(texts, on_progress=on_progress)


def named(path: Path, collection: str | None = None) -> SourceToRead:
    return SourceToRead(path, str(path), path.name, collection)


def files(folder: Path, count: int) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"note-{number:02}.txt" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_text(f"Ship {number} lies at berth {number * 3}.")
    return paths


def outcomes_of(outcomes: Sequence[IngestResult | IngestFailure]) -> list[str]:
    return [o.outcome for o in outcomes if isinstance(o, IngestResult)]


def leftovers(settings: Settings) -> list[Path]:
    return list(settings.originals_dir.glob("incoming-*"))


def test_outcomes_keep_their_order_and_a_bad_file_stops_no_other(
    library: Fathom, tmp_path: Path
) -> None:
    paths = files(tmp_path / "notes", 5)
    paths[2].write_bytes(b"")
    sources = [named(path) for path in paths]
    outcomes = list(
        library.ingest_files([*sources[:4], SourceNotFoundError("x", hint="y"), *sources[4:]])
    )
    assert [type(o) for o in outcomes] == [
        *(IngestResult, IngestResult, IngestFailure, IngestResult, IngestFailure, IngestResult)
    ]
    assert [d.title for d in library.documents()] == [p.name for p in (*paths[:2], *paths[3:])]
    assert leftovers(library.settings) == []
    assert library.index.num_vectors == 4


def test_what_is_stored_is_known_and_costs_no_embedding(settings: Settings, tmp_path: Path) -> None:
    embedder = CountingEmbedder()
    library = Fathom(settings, embedder=embedder)
    sources = [named(path) for path in files(tmp_path / "notes", 6)]
    assert len(list(library.ingest_files(sources[:3]))) == 3
    embedder.calls.clear()
    again = list(library.ingest_files(sources))
    assert [o.outcome for o in again if isinstance(o, IngestResult)] == ["known"] * 3 + [
        "added"
    ] * 3
    assert sum(embedder.calls) == 3


def test_short_documents_are_embedded_together_as_if_alone(
    library: Fathom, settings: Settings, tmp_path: Path
) -> None:
    paths = files(tmp_path / "notes", 12)
    list(library.ingest_files([named(path) for path in paths]))
    alone = Fathom(
        settings.model_copy(update={"home": tmp_path / "alone"}), embedder=HashEmbedder()
    )
    for path in paths:
        alone.ingest(path)
    alone.index.catch_up()
    assert library.index.ids() == alone.index.ids()
    ids = sorted(library.index.ids())
    np.testing.assert_array_equal(library.index.vectors(ids)[1], alone.index.vectors(ids)[1])


class OverlapEmbedder(HashEmbedder):
    """Lets the cutting of a document go on only once its first chunks have come to be embedded."""

    def __init__(self) -> None:
        self.embedding = Event()
        self.num_cuts = 0
        self.waited_in_vain = False

    def token_offsets(self, text: str) -> list[tuple[int, int]]:
        self.num_cuts += 1
        if self.num_cuts == 3 * PART_CHUNKS:
            self.waited_in_vain = not self.embedding.wait(60)
        return super().token_offsets(text)

    def embed(
        self, texts: Sequence[str], *, on_progress: Callable[[int], None] | None = None
    ) -> FloatArray:
        self.embedding.set()
        return super().embed(texts, on_progress=on_progress)


def long_text(num_paragraphs: int) -> str:
    return "\n\n".join(f"Paragraph {n} is about ship {n * 7}. " * 4 for n in range(num_paragraphs))


def test_the_first_chunks_are_embedded_while_the_rest_is_cut(
    settings: Settings, tmp_path: Path
) -> None:
    path = tmp_path / "long.txt"
    path.write_text(long_text(600))
    embedder = OverlapEmbedder()
    library = Fathom(settings, embedder=embedder)
    document = library.ingest(path).document
    assert embedder.num_cuts > 3 * PART_CHUNKS, "else this test could not fail"
    assert not embedder.waited_in_vain
    stored = library.store.chunks_of(document.id)
    content = CanonicalText(library.store.text(document.id), "text/plain")
    assert [s.chunk for s in stored] == chunk_text(
        content, title="long.txt", token_offsets=HashEmbedder().token_offsets, max_tokens=64
    )
    assert document.num_chunks == len(stored) > GROUP_CHUNKS
    ids = [s.id for s in stored]
    found, vectors = library.index.vectors(ids)
    texts = [embedded_text("long.txt", s.chunk.heading_path, s.chunk.text) for s in stored]
    assert found == ids
    np.testing.assert_allclose(vectors, HashEmbedder().embed(texts), atol=1e-6)


class BreakingEmbedder(CountingEmbedder):
    """Fails in the middle of a text that says so."""

    def token_offsets(self, text: str) -> list[tuple[int, int]]:
        if text.startswith("Here it breaks") and any(self.calls):
            raise ReaderFailedError("broken in the middle", hint="h")
        return super().token_offsets(text)


def test_nothing_is_kept_of_a_document_that_fails_in_the_middle(
    settings: Settings, tmp_path: Path
) -> None:
    before, *after = files(tmp_path / "notes", 3)
    broken = tmp_path / "broken.txt"
    broken.write_text(long_text(1_500) + "\n\nHere it breaks, at the end.")
    embedder = BreakingEmbedder()
    library = Fathom(settings, embedder=embedder)
    sources = [named(path) for path in (before, broken, *after)]
    outcomes = list(library.ingest_files(sources))
    assert [type(o) for o in outcomes] == [IngestResult, IngestFailure, IngestResult, IngestResult]
    assert sum(embedder.calls) > 3 + PART_CHUNKS, "else this test could not fail"
    assert [d.title for d in library.documents()] == [p.name for p in (before, *after)]
    assert library.index.num_vectors == library.store.num_chunks() == 3
    assert leftovers(settings) == []


def test_the_same_content_twice_in_one_call_is_one_document(
    library: Fathom, tmp_path: Path
) -> None:
    first, second = files(tmp_path / "notes", 2)
    second.write_bytes(first.read_bytes())
    outcomes = list(library.ingest_files([named(first), named(second)]))
    assert [o.outcome for o in outcomes if isinstance(o, IngestResult)] == ["added", "known"]
    (document,) = library.documents()
    assert (
        original_path(library.settings, document.content_sha256).read_bytes() == first.read_bytes()
    )


def test_progress_only_grows_and_ends_at_everything(library: Fathom, tmp_path: Path) -> None:
    long = tmp_path / "long.txt"
    long.write_text("\n\n".join(f"Paragraph {n} is about ship {n * 7}." for n in range(900)))
    seen: list[IngestProgress] = []
    sources = [named(path) for path in (*files(tmp_path / "notes", 3), long)]
    list(library.ingest_files(sources, on_progress=seen.append))
    assert [p.fraction for p in seen] == sorted(p.fraction for p in seen)
    last = seen[-1]
    assert (last.fraction, last.num_files, last.seconds_left) == (1.0, 4, 0.0)
    assert last.chunks == library.store.num_chunks() > GROUP_CHUNKS / 4
    assert {p.stage for p in seen} == {"reading", "embedding"}


def test_a_caller_that_stops_keeps_what_it_got_and_leaves_no_copies(
    library: Fathom, tmp_path: Path
) -> None:
    sources = [named(path) for path in files(tmp_path / "notes", 30)]
    running = library.ingest_files(sources)
    first = next(running)
    running.close()  # type: ignore[attr-defined]
    assert isinstance(first, IngestResult)
    assert library.store.find(str(first.document.id)) == first.document
    assert leftovers(library.settings) == []
    assert len(list(library.ingest_files(sources))) == 30
    assert len(library.documents()) == 30


def test_a_full_disk_ends_the_ingest_and_keeps_what_was_acknowledged(
    library: Fathom, tmp_path: Path
) -> None:
    sources = [named(path) for path in files(tmp_path / "notes", 40)]
    (before,) = library.ingest_files(sources[:1])
    assert isinstance(before, IngestResult)
    with library.database.read() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()

    def limit(raw: object, _record: object) -> None:
        raw.execute(f"PRAGMA max_page_count = {pages + 4}")  # type: ignore[attr-defined]

    event.listen(library.database.engine, "connect", limit)
    library.database.engine.dispose()
    acknowledged: list[IngestResult | IngestFailure] = [before]
    with pytest.raises(StorageFullError):
        acknowledged.extend(library.ingest_files(sources[1:]))
    kept = [outcome.document.id for outcome in acknowledged if isinstance(outcome, IngestResult)]
    assert len(kept) == len(acknowledged)
    assert set(kept) <= {document.id for document in library.documents()}
    assert leftovers(library.settings) == []


def test_a_folder_is_a_collection_with_its_paths_as_titles(library: Fathom, tmp_path: Path) -> None:
    folder = tmp_path / "harbour"
    files(folder, 1)
    (folder / "fees").mkdir()
    (folder / "fees" / "night.md").write_text("# Night\n\nThe fee is 35 crowns.\n")
    sources = list(find_sources([folder], settings=library.settings, downloads=tmp_path))
    assert not [o for o in library.ingest_files(sources) if isinstance(o, IngestFailure)]
    titles = {d.title: d.collections for d in library.documents()}
    assert titles == {"fees/night.md": ("harbour",), "note-00.txt": ("harbour",)}
