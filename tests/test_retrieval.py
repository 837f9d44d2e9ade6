"""Two searches become one ranking, within the documents asked about."""

import threading
from pathlib import Path

import pytest

from rag.retrieval.retriever import reciprocal_rank_fusion
from rag.retrieval.vector_index import VectorIndex
from ui.assembly import Fathom


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


def test_search_stays_within_the_documents_asked(small_fathom: Fathom, tmp_path: Path) -> None:
    other = _add(small_fathom, tmp_path, "other.txt", "The fee in the other harbour is 90.")
    service = small_fathom.service()
    documents = service.documents([other])
    hits = service._retriever.retrieve("harbour fee", documents, num_candidates=10)
    assert {hit.chunk.document_id for hit in hits} == {other}


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
