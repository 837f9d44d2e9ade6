"""Doctor finds every planted inconsistency, mends what can be mended, and says what cannot."""

import hashlib
import json
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from conftest import HANDBOOK, HashEmbedder
from ingest.originals import ingesting
from ingest.pipeline import original_path
from rag.lm.local_engine import LocalEngine
from rag.lm.weights_checksum import tensors_digest
from rag.settings import Settings
from ui.assembly import Fathom
from ui.doctor import Check, examine, examine_library, repair

EMBEDDER = HashEmbedder()


_opened: list[Fathom] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while _opened:
        _opened.pop().database.engine.dispose()


def reopened(fathom: Fathom) -> Fathom:
    """Return the library as another process sees it."""
    again = Fathom(fathom.settings, embedder=EMBEDDER, engine=fathom._given_engine)
    _opened.append(again)
    return again


def failing(fathom: Fathom) -> dict[str, str]:
    """Return what a fresh process finds wrong with the library: check and detail."""
    return {c.name: c.detail for c in examine_library(reopened(fathom)) if not c.passed}


def mended(fathom: Fathom) -> list[str]:
    return list(repair(reopened(fathom)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_engine: LocalEngine) -> Path:
    """Make a library of two documents and an answer, with a snapshot; return its folder."""
    folder = tmp_path_factory.mktemp("made")
    settings = Settings(
        home=folder / "home", kv_reserve_bytes=0, max_new_tokens=16, prefill_deadline_seconds=1e9
    )
    fathom = Fathom(settings, embedder=EMBEDDER, engine=tiny_engine)
    (folder / "handbook.md").write_text(HANDBOOK)
    (folder / "tides.txt").write_text("The tide turns at noon.\n\nLow water is at six.")
    fathom.ingest(folder / "handbook.md")
    fathom.ingest(folder / "tides.txt")
    fathom.service().answer("What is the harbour fee?")
    fathom.index.snapshot()
    fathom.database.engine.dispose()
    return folder


@pytest.fixture
def ready(made: Path, settings: Settings, tiny_engine: LocalEngine) -> Fathom:
    """Return a copy of the library, nothing amiss."""
    shutil.copytree(made / "home", settings.home)
    return Fathom(settings, embedder=EMBEDDER, engine=tiny_engine)


def test_4_bit_weights_that_are_asked_for_and_not_there_are_told(ready: Fathom) -> None:
    assert "4-bit weights" not in {check.name for check in examine(ready)}
    asking = ready.settings.model_copy(update={"decode_weights": "4-bit"})
    (check,) = (
        check
        for check in examine(Fathom(asking, embedder=EMBEDDER, engine=ready.engine))
        if check.name == "4-bit weights"
    )
    assert "it has none for this device" in check.detail


def test_a_flipped_byte_of_a_fetched_model_is_found(ready: Fathom, tmp_path: Path) -> None:
    folder = tmp_path / "models" / ready.settings.embedder
    folder.mkdir(parents=True)
    weights = folder / "model.safetensors"
    weights.write_bytes(b"weights")
    source = {weights.name: hashlib.sha256(b"weights").hexdigest(), "a.gguf": "0" * 64}
    manifest = {"name": folder.name, "source": source, "files": {weights.name: 7}}
    (folder / "fathom.json").write_text(json.dumps(manifest))
    settings = ready.settings.model_copy(update={"models_dir": tmp_path / "models"})
    fathom = Fathom(settings, embedder=EMBEDDER, engine=ready.engine)

    def embedder() -> Check:
        return next(check for check in examine(fathom) if check.name == "embedder")

    assert embedder().passed
    weights.write_bytes(b"weighty")
    assert not embedder().passed
    assert str(weights) in embedder().detail

    # What was converted here has no checksum of a publisher's, but one of its own.
    own = {"source": {"a.gguf": "0" * 64}, "sha256": {weights.name: source[weights.name]}}
    (folder / "fathom.json").write_text(json.dumps(manifest | own))
    assert str(weights) in embedder().detail
    weights.write_bytes(b"weights")
    assert embedder().passed
    written = {"numbers": torch.arange(8, dtype=torch.int8)}
    path = folder / "integers.weights"
    save_file(written, path, metadata={"sha256": tensors_digest(written)})
    assert embedder().passed
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert "integers.weights is damaged" in embedder().detail


def test_nothing_is_wrong_with_a_sound_library(ready: Fathom) -> None:
    assert failing(ready) == {}
    assert mended(ready) == []


def sql(*statements: str) -> Callable[[Fathom], None]:
    def plant(fathom: Fathom) -> None:
        with fathom.database.engine.connect() as connection:
            raw = connection.connection.dbapi_connection
            assert raw is not None
            raw.execute("PRAGMA foreign_keys=OFF")
            for statement in statements:
                raw.execute(statement)
        fathom.database.engine.dispose()

    return plant


def flip_a_bit(fathom: Fathom) -> None:
    (file,) = fathom.settings.index_dir.rglob("*.faiss")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def put(name: str) -> Callable[[Fathom], None]:
    def plant(fathom: Fathom) -> None:
        path = fathom.settings.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"left over")

    return plant


def change_the_index(change: Callable[[Fathom], None]) -> Callable[[Fathom], None]:
    """Damage the index itself and snapshot it, so that only a comparison can tell."""

    def plant(fathom: Fathom) -> None:
        fathom.index.catch_up()
        change(fathom)
        fathom.index.snapshot()

    return plant


def forget_vectors(fathom: Fathom) -> None:
    fathom.index._dead.update(list(fathom.index.ids())[:2])


def add_foreign_vector(fathom: Fathom) -> None:
    fathom.index._delta.add_with_ids(EMBEDDER.embed(["foreign"]), np.array([10_000]))


def swap_a_vector(fathom: Fathom) -> None:
    chunk_id = max(fathom.index.ids())
    fathom.index._dead.add(chunk_id)
    fathom.index._delta.add_with_ids(EMBEDDER.embed(["another text"]), np.array([chunk_id]))


def original_of(fathom: Fathom, number: int) -> Path:
    document = fathom.store.find(str(number))
    return original_path(fathom.settings, document.content_sha256)


UNIT = np.eye(1, 64, dtype=np.float32)
SHORT = np.ones(3, dtype=np.float32).tobytes().hex()
LONG = (2 * UNIT).tobytes().hex()
NAN = (np.nan * UNIT).tobytes().hex()

# what is planted: (the check that finds it, a word of what it says, how it is planted)
PLANTED: dict[str, tuple[str, str, Callable[[Fathom], None]]] = {
    "chunk is not the text": (
        "texts", "is not the text",
        sql("UPDATE chunk SET text = 'forged', end = start + 6 WHERE id = 2"),
    ),
    "chunk is missing": ("texts", "chunks instead of", sql("DELETE FROM chunk WHERE id = 2")),
    "chunk count is wrong": (
        "texts", "chunks instead of", sql("UPDATE document SET num_chunks = 99 WHERE id = 1"),
    ),
    "text is changed": ("texts", "characters", sql("UPDATE document_text SET text = 'x' || text")),
    "text is missing": ("texts", "0 characters", sql("DELETE FROM document_text")),
    "section lies beyond the text": ("texts", "beyond", sql("UPDATE section SET start = 99999")),
    "vector is missing": (
        "vectors", "chunk 2 has no vector", sql("DELETE FROM chunk_vector WHERE chunk_id = 2"),
    ),
    "vector is too short": (
        "vectors", "12 bytes", sql(f"UPDATE chunk_vector SET vector = x'{SHORT}' WHERE chunk_id=2"),
    ),
    "vector is not unit": (
        "vectors", "length 2", sql(f"UPDATE chunk_vector SET vector = x'{LONG}' WHERE chunk_id=2"),
    ),
    "vector is no number": (
        "vectors", "nan", sql(f"UPDATE chunk_vector SET vector = x'{NAN}' WHERE chunk_id=2"),
    ),
    "full-text row is missing": (
        "lexical index", "differs",
        sql("INSERT INTO chunk_fts(chunk_fts, rowid, text, heading, scope)"
            " SELECT 'delete', id, text, heading, scope FROM chunk WHERE id = 2"),
    ),
    "full-text row is foreign": (
        "lexical index", "differs",
        sql("INSERT INTO chunk_fts(rowid, text, heading, scope) VALUES (9999, 'ghost', '', 'd1')"),
    ),
    "scope names another document": (
        "lexical index", "another", sql("UPDATE chunk SET scope = 'd2' WHERE id = 2"),
    ),
    "trigger is missing": ("rows", "chunk_deleted", sql("DROP TRIGGER chunk_deleted")),
    "page belongs to nothing": (
        "rows", "page", sql("INSERT INTO page VALUES (77, 1, NULL, 0, 5)"),
    ),
    "section belongs to nothing": (
        "rows", "section", sql("INSERT INTO section VALUES (77, 0, 1, 'lost', 0)"),
    ),
    "vector belongs to nothing": (
        "rows", "chunk_vector",
        sql(f"INSERT INTO chunk_vector VALUES (777, 'hash-64', x'{LONG}')"),
    ),
    "document has no name": (
        "rows", "no name", sql("DELETE FROM source_version WHERE document_id = 1"),
    ),
    "floor beyond the log": (
        "rows", "floor", sql("UPDATE meta SET value = '500' WHERE key = 'oplog_floor'"),
    ),
    "index lacks vectors": (
        "vector index", "2 vectors are missing", change_the_index(forget_vectors),
    ),
    "index has a foreign vector": (
        "vector index", "belong to no chunk", change_the_index(add_foreign_vector),
    ),
    "index has another vector": ("vector index", "differ", change_the_index(swap_a_vector)),
    "stored vector has changed": (
        "vector index", "1 vectors",
        sql(f"UPDATE chunk_vector SET vector = x'{UNIT.tobytes().hex()}' WHERE chunk_id = 2"),
    ),
    "bit flipped in a snapshot": ("index snapshots", "checksum", flip_a_bit),
    "half-written snapshot": (
        "index snapshots", "no snapshot needs it", put("index/index-000000000099.faiss.tmp"),
    ),
    "snapshot of another index": (
        "index snapshots", "no snapshot needs it", put("index/0123456789ab/index-1.faiss"),
    ),
    "original is missing": (
        "original files", "is missing", lambda fathom: original_of(fathom, 1).unlink(),
    ),
    "original has changed": (
        "original files", "has changed", lambda fathom: put(str(original_of(fathom, 1)))(fathom),
    ),
    "original belongs to nothing": (
        "original files", "belongs to no document", put("originals/ab/" + "ab" * 32),
    ),
    "copy of a killed ingest": (
        "original files", "belongs to no document", put("originals/incoming-1-a0b1c2d3"),
    ),
    "upload of a killed server": ("leftover files", "tmp/x/up.pdf", put("tmp/x/up.pdf")),
    "receipt quotes the deleted": (
        "receipts", "still has words",
        sql("DELETE FROM chunk WHERE document_id = 1",
            "DELETE FROM document_text WHERE document_id = 1",
            "DELETE FROM section WHERE document_id = 1",
            "DELETE FROM source_version WHERE document_id = 1",
            "DELETE FROM token_count WHERE document_id = 1",
            "DELETE FROM chunk_vector WHERE chunk_id NOT IN (SELECT id FROM chunk)",
            "DELETE FROM document WHERE id = 1"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_each_planted_inconsistency_is_found_and_mended(ready: Fathom, name: str) -> None:
    check, word, plant = PLANTED[name]
    plant(ready)
    found = failing(ready)
    assert word in found.get(check, ""), found
    mended(ready)
    assert failing(ready) == {}
    # and the library works: every document is found by its own words
    fathom = reopened(ready)
    documents = fathom.documents()
    assert len(documents) == (1 if name.startswith("receipt") else 2)
    retriever = fathom.service()._retriever
    hits = retriever.retrieve("The tide turns at noon.", documents, num_candidates=3)
    assert "tide turns at noon" in hits[0].chunk.chunk.text


def test_everything_at_once_is_mended(ready: Fathom) -> None:
    several = [
        "chunk is not the text", "vector is too short", "full-text row is foreign",
        "page belongs to nothing", "original has changed", "copy of a killed ingest",
        "bit flipped in a snapshot", "trigger is missing", "floor beyond the log",
    ]  # fmt: skip
    for name in several:
        PLANTED[name][2](ready)
    assert len(failing(ready)) >= 6
    said = mended(ready)
    assert all(line.endswith("mended") for line in said), said
    assert failing(ready) == {}


def test_other_processes_follow_a_repair(ready: Fathom) -> None:
    other = reopened(ready)
    other.index.catch_up()
    swap_a_vector(other)
    with ready.database.write() as connection:
        connection.exec_driver_sql(
            f"UPDATE chunk_vector SET vector = x'{UNIT.tobytes().hex()}' WHERE chunk_id = 2"
        )
    mended(ready)
    other.index.catch_up()
    ids, rows = other.index.vectors([2])
    assert ids == [2]
    assert np.array_equal(rows, UNIT)


def test_what_cannot_be_mended_comes_with_advice(ready: Fathom) -> None:
    original_of(ready, 1).write_text("changed")
    sql(
        "UPDATE document SET source = '/gone/handbook.md' WHERE id = 1",
        "UPDATE document_text SET text = 'x' || text WHERE document_id = 1",
    )(ready)
    before = failing(ready)
    assert set(before) == {"original files", "texts"}
    assert "give the same file to fathom ingest again" in before["original files"]
    assert "fathom delete 1, then fathom ingest" in before["texts"]
    assert mended(ready) == []
    assert failing(ready) == before


def test_the_same_file_again_brings_a_lost_original_back(ready: Fathom, made: Path) -> None:
    original_of(ready, 1).unlink()
    ready.ingest(made / "handbook.md")
    assert failing(ready) == {}


def test_files_of_a_running_ingest_are_no_strays(ready: Fathom) -> None:
    put("originals/incoming-1-a0b1c2d3")(ready)
    with ingesting(ready.settings):
        assert failing(ready) == {}
        assert mended(ready) == []
    assert set(failing(ready)) == {"original files"}


def test_another_embedder_is_named(ready: Fathom) -> None:
    with ready.database.write() as connection:
        connection.exec_driver_sql("UPDATE meta SET value = 'other' WHERE key = 'embedder'")
    found = failing(ready)
    assert "searched with other" in found["vectors"]
    assert "FATHOM_EMBEDDER" in found["vectors"]


def test_a_receipt_keeps_its_numbers_when_its_words_go(ready: Fathom) -> None:
    (receipt,) = _receipts(ready)
    PLANTED["receipt quotes the deleted"][2](ready)
    mended(ready)
    answer = ready.receipts.load(receipt)
    assert "crowns" not in json.dumps(answer.to_json())
    assert replace(answer.receipt, reason="") is not None
    assert answer.receipt.prompt_tokens > 0


def _receipts(fathom: Fathom) -> list[str]:
    with fathom.database.read() as connection:
        return [row[0] for row in connection.exec_driver_sql("SELECT id FROM answer")]


def test_doctor_is_the_same_on_either_database(database_url: str, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home", database_url=database_url)
    fathom = reopened(Fathom(settings, embedder=EMBEDDER))
    for name, text in (("a.md", HANDBOOK), ("b.txt", "The tide turns at noon.")):
        (tmp_path / name).write_text(text)
        fathom.ingest(tmp_path / name)
    fathom.index.snapshot()
    assert failing(fathom) == {}
    with fathom.database.write() as connection:
        for statement in (
            "UPDATE meta SET value = '500' WHERE key = 'oplog_floor'",
            "UPDATE chunk SET text = 'forged', scope = 'd9' WHERE id = 2",
            "DELETE FROM chunk_vector WHERE chunk_id = 3",
            "DELETE FROM source_version WHERE document_id = 2",
            "DROP TRIGGER chunk_deleted"
            + (" ON chunk" if fathom.database.kind == "postgresql" else ""),
        ):
            connection.exec_driver_sql(statement)
    found = failing(fathom)
    assert {"rows", "lexical index", "texts", "vectors"} <= set(found)
    for word in ("floor 500", "chunk_deleted", "no name stands for document 2"):
        assert word in found["rows"]
    said = mended(fathom)
    assert all(line.endswith("mended") for line in said), said
    assert failing(fathom) == {}
    assert reopened(fathom).lexical.search("tide", top_k=1)


def test_doctor_holds_one_document_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rag.store.oplog.PAGE", 200)
    monkeypatch.setattr("rag.store.integrity.VECTORS_PER_READ", 200)
    fathom = Fathom(Settings(home=tmp_path / "home"), embedder=EMBEDDER)

    def take(number: int) -> None:
        path = tmp_path / f"{number}.txt"
        path.write_text(f"Document {number}. " + "Some words of it. " * 4000)
        fathom.ingest(path)

    def peak_bytes() -> int:
        fathom.index.snapshot()
        tracemalloc.start()
        assert failing(fathom) == {}
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    take(0)
    peak_bytes()  # what is loaded once
    small = peak_bytes()
    for number in range(1, 8):
        take(number)
    assert peak_bytes() < 1.5 * small
