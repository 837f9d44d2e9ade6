"""A library changes its embedding model while it goes on answering, and loses nothing."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from conftest import HANDBOOK
from hash_embedder import HashEmbedder
from ingest.reindex import CHUNKS_PER_COMMIT, reembed_library
from rag.errors import EmbedderMismatchError
from rag.settings import Settings
from ui.assembly import Fathom
from ui.doctor import examine_library

HERE = Path(__file__).resolve().parent


class WideEmbedder(HashEmbedder):
    """Another model: other vectors, of another length."""

    fingerprint = "wide-128"
    dim = 128


class ShortEmbedder(HashEmbedder):
    fingerprint = "short-64"
    max_tokens = 10


class BusyEmbedder(WideEmbedder):
    """Does something else between its batches, as other processes do."""

    def __init__(self, meanwhile: Callable[[int], None]) -> None:
        self._meanwhile = meanwhile
        self._num_batches = 0

    def embed(
        self, texts: Sequence[str], *, on_progress: Callable[[int], None] | None = None
    ) -> npt.NDArray[np.float32]:
        self._num_batches += 1
        self._meanwhile(self._num_batches)
        return super().embed(texts, on_progress=on_progress)


@pytest.fixture
def library(tmp_path: Path) -> Fathom:
    """Return a library with several batches of chunks, and an answerable question."""
    library = Fathom(Settings(home=tmp_path / "home"), embedder=HashEmbedder())
    (tmp_path / "handbook.md").write_text(HANDBOOK)
    parts = (f"# Part {n}\n\nThe bell of part {n} rings {n} times." for n in range(600))
    (tmp_path / "bells.md").write_text("\n\n".join(parts))
    library.ingest(tmp_path / "handbook.md")
    library.ingest(tmp_path / "bells.md")
    library.index.snapshot()
    return library


def with_embedder(library: Fathom, embedder: HashEmbedder) -> Fathom:
    """Return the library as a process with this embedder opens it."""
    return Fathom(library.settings, embedder=embedder)


def finds(library: Fathom, text: str) -> bool:
    library.index.catch_up()
    hits = library.index.search(library.embedder.embed([text])[0], top_k=3)
    stored = library.store.chunks([i for i, _ in hits])
    return any(text in stored[i].chunk.text for i, _ in hits)


def wrong_with(library: Fathom) -> list[str]:
    return [f"{c.name}: {c.detail}" for c in examine_library(library) if not c.passed]


def test_all_chunks_get_new_vectors_and_the_old_are_gone(library: Fathom) -> None:
    seen: list[tuple[int, int]] = []
    num_chunks = library.store.num_chunks()
    embedded = reembed_library(
        library.database,
        WideEmbedder(),
        library.settings,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert embedded == num_chunks > 2 * CHUNKS_PER_COMMIT
    assert seen[-1] == (num_chunks, num_chunks)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    new = with_embedder(library, WideEmbedder())
    assert finds(new, "The bell of part 77 rings 77 times.")
    assert wrong_with(new) == []
    assert len(list(library.settings.index_dir.rglob("*.faiss"))) == 1, "only the new snapshot"
    assert reembed_library(library.database, WideEmbedder(), library.settings) == 0


def test_the_old_index_answers_until_the_switch_and_then_says_so(library: Fathom) -> None:
    answered = []

    def search(_: int) -> None:
        answered.append(finds(library, "The bell of part 77 rings 77 times."))

    reembed_library(library.database, BusyEmbedder(search), library.settings)
    assert len(answered) >= 3
    assert all(answered)
    with pytest.raises(EmbedderMismatchError, match="searched with wide-128 now") as caught:
        library.index.catch_up()
    assert "FATHOM_EMBEDDER" in caught.value.hint


def test_what_others_ingest_and_delete_meanwhile_is_in_the_new_index(
    library: Fathom, tmp_path: Path
) -> None:
    late = tmp_path / "late.txt"
    late.write_text("The night ferry leaves at eleven.")
    other = with_embedder(library, HashEmbedder())

    def meanwhile(batch: int) -> None:
        if batch == 2:
            other.ingest(late)
            other.delete(other.store.find("handbook.md").id)

    reembed_library(library.database, BusyEmbedder(meanwhile), library.settings)
    new = with_embedder(library, WideEmbedder())
    assert finds(new, "The night ferry leaves at eleven.")
    assert not finds(new, "The harbour fee is 35 crowns a night.")
    assert wrong_with(new) == []


def test_what_is_ingested_just_before_the_switch_is_not_lost(
    library: Fathom, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = tmp_path / "late.txt"
    late.write_text("The night ferry leaves at eleven.")
    other = with_embedder(library, HashEmbedder())
    activate = type(library.store).activate_embedder
    tries = []

    def activate_late(store: object, embedder: str) -> None:
        tries.append(embedder)
        if len(tries) == 1:
            other.ingest(late)
        activate(store, embedder)  # type: ignore[arg-type]

    monkeypatch.setattr(type(library.store), "activate_embedder", activate_late)
    reembed_library(library.database, WideEmbedder(), library.settings)
    assert len(tries) == 2
    new = with_embedder(library, WideEmbedder())
    assert finds(new, "The night ferry leaves at eleven.")
    assert wrong_with(new) == []


def test_an_embedder_that_reads_less_is_refused_with_numbers(library: Fathom) -> None:
    with pytest.raises(EmbedderMismatchError, match=r"reads 10 tokens; \d+ of the") as caught:
        reembed_library(library.database, ShortEmbedder(), library.settings)
    assert "new --home" in caught.value.hint
    assert finds(library, "The bell of part 77 rings 77 times."), "nothing has changed"
    assert wrong_with(library) == []


def test_a_killed_run_goes_on_where_it_stopped(library: Fathom) -> None:
    code = (
        "import sys; from pathlib import Path; from rag.settings import Settings;"
        "from ui.assembly import Fathom; from test_reindex import *;"
        "f = Fathom(Settings(home=Path(sys.argv[1])), embedder=HashEmbedder());"
        "stop = lambda done, total: (print(done, flush=True), sys.stdin.readline());"
        "reembed_library(f.database, WideEmbedder(), f.settings, on_progress=stop)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(library.settings.home)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])},
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert int(process.stdout.readline()) == CHUNKS_PER_COMMIT
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdin.close()
    process.stdout.close()
    assert finds(library, "The bell of part 77 rings 77 times."), "the old one still answers"
    rest = reembed_library(library.database, WideEmbedder(), library.settings)
    assert rest == library.store.num_chunks() - CHUNKS_PER_COMMIT
    assert wrong_with(with_embedder(library, WideEmbedder())) == []


def test_a_process_that_had_the_new_model_too_early_starts_anew(library: Fathom) -> None:
    early = with_embedder(library, WideEmbedder())
    with pytest.raises(EmbedderMismatchError):
        early.index.catch_up()
    reembed_library(library.database, WideEmbedder(), library.settings)
    assert finds(early, "The bell of part 77 rings 77 times.")
    assert early.index.differences().wrong == []
