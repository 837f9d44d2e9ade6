"""The index is a cache of the store; two searches become one ranking."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from conftest import HashEmbedder
from rag.retrieval.retriever import reciprocal_rank_fusion
from rag.retrieval.vector_index import VectorIndex
from rag.store.oplog import OpLog
from ui.assembly import Fathom
from ui.doctor import examine, repair

EMBEDDER = HashEmbedder()


def _index(fathom: Fathom) -> VectorIndex:
    return VectorIndex(
        OpLog(fathom.database, EMBEDDER.fingerprint),
        fathom.settings.index_dir,
        dim=EMBEDDER.dim,
        embedder=EMBEDDER.fingerprint,
    )


def _agrees(index: VectorIndex, fathom: Fathom) -> bool:
    documents = [d.id for d in fathom.store.all(include_superseded=True)]
    return index.ids() == set(fathom.store.chunk_ids(documents))


def _add(fathom: Fathom, folder: Path, name: str, text: str) -> int:
    path = folder / name
    path.write_text(text)
    return fathom.ingest(path).document.id


def test_reciprocal_rank_fusion_by_hand() -> None:
    fused = reciprocal_rank_fusion([[1, 2], [2, 3]])
    assert list(fused) == [2, 1, 3]
    assert fused[2] == pytest.approx(1 / 62 + 1 / 61)


def test_search_is_exact(small_fathom: Fathom) -> None:
    index = _index(small_fathom)
    index.catch_up()
    query = EMBEDDER.embed(["north beacon flashes green"])[0]
    found = index.search(query, top_k=3)
    ids = sorted(index.ids())
    scores = np.stack([index.vector(i) for i in ids]) @ query
    best = sorted(zip(scores.tolist(), ids, strict=True), reverse=True)[:3]
    assert [i for i, _ in found] == [i for _, i in best]
    assert [s for _, s in found] == pytest.approx([s for s, _ in best], abs=1e-6)


def test_search_stays_within_the_documents_asked(small_fathom: Fathom, tmp_path: Path) -> None:
    other = _add(small_fathom, tmp_path, "other.txt", "The fee in the other harbour is 90.")
    service = small_fathom.service()
    documents = service.documents([other])
    hits = service._retriever.retrieve("harbour fee", documents, num_candidates=10)
    assert {hit.chunk.document_id for hit in hits} == {other}


def test_every_process_catches_up(small_fathom: Fathom, tmp_path: Path) -> None:
    first, second = _index(small_fathom), _index(small_fathom)
    first.catch_up(), second.catch_up()
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
    late.catch_up()
    number = _add(small_fathom, tmp_path, "a.txt", "alpha")
    small_fathom.delete(number)  # snapshots and cuts the log
    assert OpLog(small_fathom.database, EMBEDDER.fingerprint).changes_since(0) is None
    late.catch_up()
    assert _agrees(late, small_fathom)


@pytest.mark.parametrize("damage", ["flip", "cut", "json", "gone", "all", "stray"])
def test_damaged_snapshots_are_skipped(small_fathom: Fathom, damage: str) -> None:
    index = _index(small_fathom)
    index.catch_up()
    file = index.snapshot()
    assert file is not None
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[:100])
    elif damage == "json":
        file.with_suffix(".json").write_text("{")
    elif damage == "gone":
        file.unlink()
    elif damage == "all":
        for path in small_fathom.settings.index_dir.iterdir():
            path.unlink()
    else:
        (file.parent / "index-000000000099.faiss.tmp").write_bytes(b"x")
    again = _index(small_fathom)
    again.catch_up()
    assert _agrees(again, small_fathom)


def test_snapshot_of_another_embedder_is_not_used(small_fathom: Fathom) -> None:
    index = _index(small_fathom)
    index.catch_up()
    file = index.snapshot()
    assert file is not None
    manifest = json.loads(file.with_suffix(".json").read_text())
    manifest["embedder"] = "another"
    file.with_suffix(".json").write_text(json.dumps(manifest))
    assert "another" in _index(small_fathom).bad_snapshots()[0]


def test_fts_syntax_in_a_question_is_only_words(small_fathom: Fathom) -> None:
    for question in ["fee AND (", '"', "heading:fee NOT *", "a' OR 1=1 --", "NEAR(fee, 2)"]:
        small_fathom.lexical.search(question, top_k=5)
    assert small_fathom.lexical.search("crowns", top_k=5)
    assert small_fathom.lexical.search("***", top_k=5) == []


def test_concurrent_writers_and_readers_agree(library: Fathom, tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for number in range(5):
                _add(library, tmp_path, f"{name}{number}.txt", f"{name} {number} text")
                library.service()._retriever.retrieve("text", library.documents(), num_candidates=5)
        except BaseException as error:
            errors.append(error)

    library.service()
    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    library.index.catch_up()
    assert _agrees(library.index, library)
    assert len(library.documents()) == 15


def _failures(fathom: Fathom) -> set[str]:
    about_the_library = {"texts", "original files", "lexical index", "index snapshots"}
    about_the_library |= {"vector index", "database"}
    return {c.name for c in examine(fathom) if not c.passed and c.name in about_the_library}


def test_doctor_finds_and_mends(small_fathom: Fathom) -> None:
    small_fathom.index.catch_up()
    file = small_fathom.index.snapshot()
    assert file is not None
    assert _failures(small_fathom) == set()
    file.write_bytes(b"broken")
    with small_fathom.database.write() as connection:
        connection.exec_driver_sql("DELETE FROM chunk_fts_data WHERE id > 10")
        connection.exec_driver_sql("DELETE FROM oplog")
        connection.exec_driver_sql("DROP TRIGGER chunk_deleted")
        connection.exec_driver_sql("DELETE FROM chunk WHERE ordinal = 0")
        connection.exec_driver_sql("UPDATE document SET num_chunks = num_chunks - 1")
    stray = small_fathom.settings.originals_dir / "ab" / "abc"
    stray.parent.mkdir(exist_ok=True)
    stray.write_text("left over")
    found = _failures(small_fathom)
    found.discard("database")  # newer SQLite checks the full-text rows along with it
    assert found == {"original files", "lexical index", "index snapshots", "vector index"}
    repair(small_fathom)
    assert _failures(small_fathom) == set()
    assert not stray.exists()


def test_doctor_names_what_it_cannot_mend(small_fathom: Fathom) -> None:
    with small_fathom.database.write() as connection:
        connection.exec_driver_sql("UPDATE document_text SET text = 'x' || text")
    (original,) = small_fathom.settings.originals_dir.glob("*/*")
    original.write_text("changed")
    assert _failures(small_fathom) == {"texts", "original files"}
