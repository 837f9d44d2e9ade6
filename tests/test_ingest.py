"""From files to documents in the store: what is kept, what is refused, what survives."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import INGEST_DOCS, HashEmbedder
from ingest.pipeline import original_path
from ingest.readers.text import underlined_titles
from ingest.sample import write_sample
from rag.errors import (
    EmptyDocumentError,
    FathomError,
    ReaderFailedError,
    SourceNotFoundError,
    StorageFullError,
    UnsupportedFormatError,
)
from ui.assembly import Fathom

EMBEDDER = HashEmbedder()
needs_documents = pytest.mark.skipif(
    not INGEST_DOCS.is_dir(), reason="../shared/data/ingest_docs is not here"
)


def test_chunks_are_the_text_at_their_offsets(small_fathom: Fathom) -> None:
    document = small_fathom.documents()[0]
    text = small_fathom.store.text(document.id)
    chunks = small_fathom.store.chunks_of(document.id)
    assert document.num_chunks == len(chunks) > 2
    assert all(text[c.chunk.start : c.chunk.end] == c.chunk.text for c in chunks)
    assert chunks[-1].chunk.heading_path == ("Harbour handbook", "Lights")


def test_same_content_is_known_and_changed_content_is_a_new_version(
    library: Fathom, handbook: Path, tmp_path: Path
) -> None:
    first = library.ingest(handbook)
    copy = tmp_path / "copy.md"
    copy.write_bytes(handbook.read_bytes())
    again = library.ingest(copy)
    handbook.write_text(handbook.read_text() + "\nThe harbour closes in winter.\n")
    changed = library.ingest(handbook)
    assert (first.outcome, again.outcome, changed.outcome) == ("added", "known", "new-version")
    assert "handbook.md" in again.message
    assert [d.version for d in library.store.all(include_superseded=True)] == [1, 2]
    # copy.md still stands for the first content
    assert [d.id for d in library.documents()] == [first.document.id, changed.document.id]
    library.delete(changed.document.id)
    assert [d.id for d in library.documents()] == [first.document.id]


def test_delete_leaves_no_word_in_any_file(small_fathom: Fathom) -> None:
    document = small_fathom.documents()[0]
    small_fathom.index.catch_up()
    small_fathom.index.snapshot()
    small_fathom.delete(document.id)
    assert not original_path(small_fathom.settings, document.content_sha256).exists()
    for path in small_fathom.settings.home.rglob("*"):
        if path.is_file():
            assert b"pilot boat" not in path.read_bytes(), path
    assert small_fathom.index.num_vectors == 0
    assert small_fathom.lexical.search("berth", top_k=5) == []


def _failing(library: Fathom, path: Path) -> FathomError:
    with pytest.raises(FathomError) as caught:
        library.ingest(path)
    assert caught.value.hint
    assert library.documents() == []
    left = [p for p in library.settings.originals_dir.rglob("*") if p.is_file()]
    assert left == [], "nothing is kept of a file that failed"
    return caught.value


def test_bad_files_are_refused_and_leave_nothing(library: Fathom, tmp_path: Path) -> None:
    library.settings.originals_dir.mkdir(parents=True)
    empty, blank = tmp_path / "empty.txt", tmp_path / "blank.txt"
    empty.touch()
    blank.write_text(" \n\n ")
    fake, office = tmp_path / "fake.pdf", tmp_path / "table.xyz"
    fake.write_text("<html>not a pdf</html>")
    office.write_bytes(bytes(range(256)))
    assert isinstance(_failing(library, tmp_path / "missing.txt"), SourceNotFoundError)
    assert isinstance(_failing(library, empty), EmptyDocumentError)
    assert isinstance(_failing(library, blank), EmptyDocumentError)
    assert isinstance(_failing(library, fake), ReaderFailedError)
    assert "fake.pdf" in str(_failing(library, fake))
    assert isinstance(_failing(library, office), UnsupportedFormatError)
    assert isinstance(_failing(library, tmp_path), SourceNotFoundError)


def test_a_full_disk_is_told_and_nothing_is_half_written(
    library: Fathom, handbook: Path, tmp_path: Path
) -> None:
    with library.database.engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
    # SQLite's own limit gives SQLITE_FULL exactly as a full disk does
    from sqlalchemy import event

    def limit(raw: object, _record: object) -> None:
        raw.execute(f"PRAGMA max_page_count = {pages + 1}")  # type: ignore[attr-defined]

    event.listen(library.database.engine, "connect", limit)
    library.database.engine.dispose()
    handbook.write_text(handbook.read_text() * 50)
    with pytest.raises(StorageFullError, match="nothing was written"):
        library.ingest(handbook)
    event.remove(library.database.engine, "connect", limit)
    library.database.engine.dispose()
    assert library.documents() == []
    assert library.ingest(handbook).outcome == "added"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_file_system_is_told(library: Fathom, handbook: Path, tmp_path: Path) -> None:
    disk = library.settings.originals_dir
    disk.mkdir(parents=True)
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)],
        capture_output=True,
        check=False,
    )
    if mount.returncode:
        pytest.skip("this system does not let root mount a tmpfs")
    try:
        big = tmp_path / "big.txt"
        big.write_text("word " * 40_000)
        with pytest.raises(StorageFullError, match="disk is full"):
            library.ingest(big)
        assert [p for p in disk.rglob("*") if p.is_file()] == []
        assert library.ingest(handbook).outcome == "added"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_kill_in_the_middle_loses_nothing_acknowledged(tmp_path: Path) -> None:
    """A process is killed while it ingests; every file it had acknowledged is whole."""
    files = tmp_path / "files"
    files.mkdir()
    for number in range(40):
        (files / f"{number:02}.txt").write_text(f"file {number} " + "words and words. " * 50)
    home = tmp_path / "home"
    code = (
        "import sys; sys.path[:0] = [sys.argv[1], sys.argv[2]];"
        "from conftest import HashEmbedder; from rag.settings import Settings;"
        "from ui.assembly import Fathom; from pathlib import Path;"
        "f = Fathom(Settings(home=Path(sys.argv[3])), embedder=HashEmbedder());"
        "[print(f.ingest(p).document.id, flush=True) for p in sorted(Path(sys.argv[4]).iterdir())]"
    )
    here = Path(__file__).resolve()
    arguments = [str(here.parents[1]), str(here.parent), str(home), str(files)]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    acknowledged = [int(process.stdout.readline()) for _ in range(5)]
    process.send_signal(signal.SIGKILL)
    acknowledged += [int(line) for line in process.stdout.read().split()]
    process.stdout.close()
    process.wait()
    from rag.settings import Settings

    library = Fathom(Settings(home=home), embedder=EMBEDDER)
    assert set(acknowledged) <= {d.id for d in library.documents()}
    for document in library.documents():
        assert len(library.store.chunks_of(document.id)) == document.num_chunks
    outcomes = [library.ingest(path).outcome for path in sorted(files.iterdir())]
    assert outcomes.count("known") >= 5
    assert len(library.documents()) == 40


def test_sample_is_the_language_reference(tmp_path: Path, library: Fathom) -> None:
    path = write_sample(tmp_path)
    text = path.read_text()
    assert len(text) > 400_000
    assert len([s for s in underlined_titles(text) if s.level == 1]) >= 79


@needs_documents
def test_pdf_has_pages_labels_and_sections(library: Fathom) -> None:
    document = library.ingest(INGEST_DOCS / "debian-policy.pdf").document
    pages = library.store.pages(document.id)
    text = library.store.text(document.id)
    assert document.num_pages == len(pages) == 193
    assert [p.end + 2 for p in pages[:-1]] == [p.start for p in pages[1:]]
    sections = library.store.sections(document.id)
    placed = [s for s in sections if text[s.start :].split("\n", 1)[0].startswith(s.title[:10])]
    assert len(sections) > 300
    assert len(placed) > 0.9 * len(sections)
    assert "need of OCR" in document.warnings[0]


def test_reader_stops_at_its_memory_limit(library: Fathom, tmp_path: Path) -> None:
    small = library.settings.model_copy(update={"reader_memory_bytes": 260 * 2**20})
    big = tmp_path / "big.txt"
    big.write_text("word " * 20_000_000)
    tight = Fathom(small, embedder=EMBEDDER)
    with pytest.raises(ReaderFailedError, match="MiB"):
        tight.ingest(big)
    assert tight.documents() == []
