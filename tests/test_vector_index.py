"""The index equals the store, whatever its size, its age or the state of its snapshots."""

import json
import shutil
import tracemalloc
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from conftest import HashEmbedder
from rag.retrieval.vector_index import IndexPlan, IndexSize, VectorIndex
from rag.store.database import Database
from rag.store.documents import DocumentStore, SourceFile
from rag.store.oplog import OpLog
from rag.types import CanonicalText, Chunk
from ui.assembly import Fathom

EMBEDDER = HashEmbedder()
DIM = 32
FLAT = IndexPlan()
HALF = IndexPlan(sizes=(IndexSize(np.inf, "SQfp16"),))
TRAINED = IndexPlan(
    sizes=(IndexSize(1000, "Flat"), IndexSize(np.inf, "IVF{lists},SQfp16")), fold_at_least=200
)
FloatArray = npt.NDArray[np.float32]


def clustered(num_vectors: int, seed: int) -> FloatArray:
    """Return unit vectors around 50 centres: float32 [num_vectors, DIM]."""
    centres = np.random.default_rng(0).standard_normal((50, DIM))
    random = np.random.default_rng(seed)
    rows = centres[random.integers(50, size=num_vectors)]
    rows = rows + 0.7 * random.standard_normal(rows.shape)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


class Shelf:
    """A store that takes vectors as they are: one document of one-character chunks each time."""

    def __init__(self, folder: Path) -> None:
        self.database = Database(f"sqlite:///{folder / 'fathom.sqlite'}")
        self.store = DocumentStore(self.database)
        self.folder = folder / "index"

    def add(self, vectors: FloatArray) -> int:
        name = str(uuid.uuid4())
        chunks = [Chunk(i, i, i + 1, "x", 1) for i in range(len(vectors))]
        content = CanonicalText("x" * len(vectors), "text/plain")
        source = SourceFile(name, name, name, len(vectors))
        return self.store.save(source, content, chunks, vectors, embedder="test").id

    def index(self, plan: IndexPlan = FLAT) -> VectorIndex:
        index = VectorIndex(
            OpLog(self.database, "test"), self.folder, dim=DIM, embedder="test", plan=plan
        )
        index.catch_up()
        return index

    def stored(self, *documents: int) -> tuple[list[int], FloatArray]:
        """Return the ids and vectors of some documents, or of all."""
        pages = list(OpLog(self.database, "test").vectors())
        ids = [i for page, _ in pages for i in page]
        rows = np.concatenate([rows for _, rows in pages]) if pages else np.empty((0, DIM), "f4")
        if not documents:
            return ids, rows
        wanted = set(self.store.chunk_ids(documents))
        kept = [n for n, i in enumerate(ids) if i in wanted]
        return [ids[n] for n in kept], rows[kept]

    def nearest(self, query: FloatArray, top_k: int, *documents: int) -> list[int]:
        ids, rows = self.stored(*documents)
        order = np.argsort(-(rows @ query), kind="stable")[:top_k]
        return [ids[n] for n in order]


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    """Return an empty store for bare vectors."""
    shelf = Shelf(tmp_path)
    yield shelf
    shelf.database.engine.dispose()


def equals_store(index: VectorIndex, shelf: Shelf, tolerance: float = 0.0) -> bool:
    """Whether the index holds exactly the stored ids, each with its stored vector."""
    ids, rows = shelf.stored()
    found, vectors = index.vectors(ids)
    same = index.ids() == set(ids) and index.num_vectors == len(ids) and set(found) == set(ids)
    order = np.argsort(np.asarray(found))
    return same and (not ids or float(np.abs(vectors[order] - rows).max()) <= tolerance)


@pytest.mark.parametrize(
    ("num_vectors", "kind"),
    [
        (0, "Flat"),
        (50_000, "Flat"),
        (50_001, "SQfp16"),
        (200_000, "SQfp16"),
        (250_000, "IVF2000,SQfp16"),
        (4_000_000, "IVF8000,SQfp16"),
    ],
)
def test_the_kind_follows_from_the_size(num_vectors: int, kind: str) -> None:
    assert IndexPlan().kind(num_vectors) == kind


@pytest.mark.parametrize("plan", [FLAT, HALF])
def test_flat_search_finds_the_nearest(shelf: Shelf, plan: IndexPlan) -> None:
    shelf.add(clustered(500, 1))
    index = shelf.index(plan)
    for query in clustered(20, 2):
        found = index.search(query, top_k=10)
        assert [i for i, _ in found] == shelf.nearest(query, 10)
    ids, rows = shelf.stored()
    best, score = found[0]
    assert score == pytest.approx(float(rows[ids.index(best)] @ query), abs=1e-3)


def test_a_large_library_gets_a_trained_index_with_its_recall(shelf: Shelf) -> None:
    shelf.add(clustered(3000, 1))
    index = shelf.index(TRAINED)
    assert index.kind == "IVF219,SQfp16"
    assert index.recall_at_10 is not None
    assert index.recall_at_10 >= 0.95
    hits = [
        len({i for i, _ in index.search(q, top_k=10)} & set(shelf.nearest(q, 10)))
        for q in clustered(100, 2)
    ]
    assert np.mean(hits) / 10 > 0.9, "the promise holds for vectors it has not seen"
    file = index.snapshot()
    assert file is not None
    manifest = json.loads(file.with_suffix(".json").read_text())
    assert manifest["recall_at_10"] == index.recall_at_10
    again = shelf.index(TRAINED)
    assert (again.kind, again.recall_at_10) == (index.kind, index.recall_at_10)


def test_training_is_repeatable(shelf: Shelf) -> None:
    shelf.add(clustered(2000, 1))
    first, second = shelf.index(TRAINED), shelf.index(TRAINED)
    for query in clustered(5, 2):
        assert first.search(query, top_k=10) == second.search(query, top_k=10)


def test_flat_is_kept_where_training_does_not_find_enough(shelf: Shelf) -> None:
    random = np.random.default_rng(3).standard_normal((3000, DIM))  # no clusters to find
    shelf.add(np.asarray(random / np.linalg.norm(random, axis=1, keepdims=True), dtype="f4"))
    strict = IndexPlan(sizes=TRAINED.sizes, min_recall=1.01)
    index = shelf.index(strict)
    assert (index.kind, index.recall_at_10) == ("SQfp16", None)
    assert equals_store(index, shelf, 1e-3)


def test_an_index_that_outgrows_its_kind_is_built_anew(shelf: Shelf) -> None:
    first = shelf.add(clustered(900, 1))
    index = shelf.index(TRAINED)
    index.snapshot()
    assert index.kind == "Flat"
    shelf.add(clustered(600, 2))
    index.catch_up()
    assert index.kind == "IVF155,SQfp16"
    assert equals_store(index, shelf, 1e-3)
    shelf.store.delete(first)
    index.catch_up()
    index.snapshot()
    assert index.kind == "Flat"
    assert equals_store(index, shelf)


@pytest.mark.parametrize("plan", [FLAT, HALF, TRAINED])
def test_delta_and_tombstones_change_nothing_that_is_found(shelf: Shelf, plan: IndexPlan) -> None:
    documents = [shelf.add(clustered(150, seed)) for seed in range(10)]
    index = shelf.index(plan)
    index.snapshot()  # all in main
    shelf.store.delete(documents[2])
    added = shelf.add(clustered(30, 99))
    index.catch_up()
    assert index._pending() == 180, "not folded yet"
    assert equals_store(index, shelf, 1e-3)
    dead = set(shelf.stored()[0]) ^ index.ids()
    assert dead == set()
    ids, rows = shelf.stored(added)
    for number, row in zip(ids, rows, strict=True):
        assert index.search(row, top_k=1)[0][0] == number, "found in the delta"
    before = [index.search(q, top_k=5) for q in clustered(20, 5)]
    index.snapshot()  # folds
    assert index._pending() == 0
    after = [index.search(q, top_k=5) for q in clustered(20, 5)]
    assert [[i for i, _ in found] for found in before] == [[i for i, _ in f] for f in after]


@pytest.mark.parametrize("plan", [FLAT, HALF, TRAINED])
@pytest.mark.parametrize("gather_at_most", [0, 10_000])
def test_chosen_documents_are_searched_exactly_and_alone(
    shelf: Shelf, plan: IndexPlan, gather_at_most: int
) -> None:
    """Results and scores among the chosen are the same whatever else is in the library."""
    plan = replace(plan, gather_at_most=gather_at_most)
    one, two = shelf.add(clustered(80, 1)), shelf.add(clustered(80, 2))
    among = shelf.store.chunk_ids([one, two])
    queries = clustered(20, 3)
    expected = [shelf.nearest(q, 10, one, two) for q in queries]
    alone = shelf.index(plan)
    scores_alone = [[s for _, s in alone.search(q, top_k=10, among=among)] for q in queries]
    # nearer to every question than anything chosen is
    foreign = shelf.add(np.concatenate([queries, clustered(2000, 4)]))
    index = shelf.index(plan)
    for query, best, scores in zip(queries, expected, scores_alone, strict=True):
        found = index.search(query, top_k=10, among=among)
        assert [i for i, _ in found] == best
        assert [s for _, s in found] == pytest.approx(scores, abs=2e-3)
        assert index.search(query, top_k=1)[0][0] in shelf.store.chunk_ids([foreign])


def test_an_empty_choice_finds_nothing(shelf: Shelf) -> None:
    shelf.add(clustered(10, 1))
    assert shelf.index().search(clustered(1, 2)[0], top_k=5, among=[]) == []
    assert shelf.index().search(clustered(1, 2)[0], top_k=5, among=[999]) == []


def test_building_holds_one_page_beside_the_index(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Python holds while it builds does not grow with the library; faiss's part is its own."""
    monkeypatch.setattr("rag.store.oplog.PAGE", 500)

    def peak_bytes() -> int:
        index = shelf.index()
        tracemalloc.start()
        index._reset()
        index._build()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    shelf.add(clustered(1500, 1))
    small = peak_bytes()
    shelf.add(clustered(8500, 2))
    assert peak_bytes() - small < 0.25 * (8500 * DIM * 4)


# ---- following the store -----------------------------------------------------------------------


def _index(fathom: Fathom) -> VectorIndex:
    index = VectorIndex(
        OpLog(fathom.database, EMBEDDER.fingerprint),
        fathom.settings.index_dir,
        dim=EMBEDDER.dim,
        embedder=EMBEDDER.fingerprint,
    )
    index.catch_up()
    return index


def _agrees(index: VectorIndex, fathom: Fathom) -> bool:
    documents = [d.id for d in fathom.store.all(include_superseded=True)]
    return index.ids() == set(fathom.store.chunk_ids(documents))


def _add(fathom: Fathom, folder: Path, name: str, text: str) -> int:
    path = folder / name
    path.write_text(text)
    return fathom.ingest(path).document.id


def test_every_process_catches_up(small_fathom: Fathom, tmp_path: Path) -> None:
    first, second = _index(small_fathom), _index(small_fathom)
    number = _add(small_fathom, tmp_path, "a.txt", "alpha")
    first.catch_up()
    first.snapshot()
    small_fathom.delete(number)
    _add(small_fathom, tmp_path, "b.txt", "beta")
    for index in (first, second, _index(small_fathom)):
        index.catch_up()
        assert _agrees(index, small_fathom)


def test_an_index_behind_the_cut_log_starts_anew(small_fathom: Fathom, tmp_path: Path) -> None:
    late = _index(small_fathom)
    number = _add(small_fathom, tmp_path, "a.txt", "alpha")
    small_fathom.delete(number)  # snapshots and cuts the log
    assert OpLog(small_fathom.database, EMBEDDER.fingerprint).changes_since(0) is None
    late.catch_up()
    assert _agrees(late, small_fathom)


def test_a_long_log_is_replayed_in_pages(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    index = shelf.index()
    log = OpLog(shelf.database, "test")
    first = shelf.add(clustered(90, 1))
    shelf.add(clustered(40, 2))
    shelf.store.delete(first)
    replay = OpLog.changes_since
    monkeypatch.setattr(OpLog, "changes_since", lambda self, seq: replay(self, seq, limit=7))
    index.catch_up()
    assert index._seq == log.last_seq()
    assert equals_store(index, shelf)


@pytest.mark.parametrize(
    "damage",
    ["flip", "cut", "empty", "json", "fields", "gone", "both", "all", "stray", "embedder", "dim",
     "future", "swapped", "library"],
)  # fmt: skip
def test_a_damaged_snapshot_is_named_and_skipped(small_fathom: Fathom, damage: str) -> None:
    index = _index(small_fathom)
    file = index.snapshot()
    assert file is not None
    manifest = file.with_suffix(".json")
    data = bytearray(file.read_bytes())
    fields = json.loads(manifest.read_text())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage in ("cut", "empty"):
        file.write_bytes(data[:100] if damage == "cut" else b"")
    elif damage == "json":
        manifest.write_text('{"file": ')
    elif damage == "fields":
        manifest.write_text('{"file": "index.faiss", "surprise": 1}')
    elif damage == "gone":
        file.unlink()
    elif damage in ("both", "all"):
        for path in [file, manifest] if damage == "both" else [*file.parent.iterdir()]:
            path.unlink()
    elif damage == "stray":
        (file.parent / "index-000000000099.faiss.tmp").write_bytes(b"x" * 100)
    elif damage == "swapped":
        file.write_bytes(b"some other bytes")
    else:
        wrong = {"embedder": ("embedder", "another"), "dim": ("dim", 7), "future": ("seq", 10**9)}
        wrong["library"] = ("library", "another")
        key, value = wrong[damage]
        manifest.write_text(json.dumps(fields | {key: value}))
    if damage not in ("both", "all"):
        (complaint,) = _index(small_fathom).bad_snapshots()
        assert file.stem[:10] in complaint
    again = _index(small_fathom)
    assert _agrees(again, small_fathom)
    again.rebuild()
    assert again.bad_snapshots() == []


def test_many_changes_are_snapshotted_without_being_asked(shelf: Shelf) -> None:
    index = shelf.index()
    shelf.add(clustered(900, 1))
    index.catch_up()
    assert list(shelf.folder.rglob("*.faiss")) == []
    shelf.add(clustered(200, 2))
    index.catch_up()
    assert len(list(shelf.folder.rglob("*.faiss"))) == 1
    assert equals_store(shelf.index(), shelf)


def test_an_unchanged_index_is_not_written_again(shelf: Shelf) -> None:
    shelf.add(clustered(50, 1))
    index = shelf.index()
    file = index.snapshot()
    assert file is not None
    written = file.stat().st_mtime_ns
    assert index.snapshot() == shelf.index().snapshot() == file
    assert file.stat().st_mtime_ns == written
    index.rebuild()
    assert file.stat().st_mtime_ns != written


def test_a_snapshot_from_the_future_of_a_restored_library_goes(shelf: Shelf) -> None:
    shelf.add(clustered(50, 1))
    shelf.database.erase_deleted()  # all of it in the one file
    database, backup = shelf.folder.parent / "fathom.sqlite", shelf.folder.parent / "backup.sqlite"
    shutil.copyfile(database, backup)
    shelf.add(clustered(50, 2))
    future = shelf.index().snapshot()
    assert future is not None
    shelf.database.engine.dispose()
    for path in shelf.folder.parent.glob("fathom.sqlite*"):
        path.unlink()
    backup.rename(database)
    index = shelf.index()
    assert equals_store(index, shelf)
    assert index.num_vectors == 50
    index.snapshot()
    assert not future.exists()
    assert index.bad_snapshots() == []


def test_a_deletion_leaves_one_snapshot_without_the_deleted(shelf: Shelf) -> None:
    shelf.add(clustered(50, 1))
    secret = shelf.add(clustered(50, 2))
    (needle,) = [row.tobytes() for row in shelf.stored(secret)[1][:1]]
    index = shelf.index()
    index.snapshot()
    late = shelf.index()
    assert any(needle in p.read_bytes() for p in shelf.folder.rglob("*") if p.is_file())
    (shelf.folder / "of-an-older-embedder").mkdir()
    (shelf.folder / "of-an-older-embedder" / "index-1.faiss").write_bytes(needle)
    shelf.store.delete(secret)
    index.snapshot(keep=1, wait=True)
    late.snapshot()  # had not caught up; it must not bring the deleted back
    assert not any(needle in p.read_bytes() for p in shelf.folder.rglob("*") if p.is_file())
    assert equals_store(late, shelf)
