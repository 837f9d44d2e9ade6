"""Full-text search: FTS5 and tantivy find the same, and tantivy's folder is only a cache."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest

from rag.errors import StorageFullError
from rag.retrieval.lexical_index import Fts5Index, LexicalIndex, SQLiteIndex, open_lexical_index
from rag.retrieval.tantivy_index import TantivyIndex
from rag.store.database import Database
from rag.store.documents import DocumentStore, SourceFile
from rag.store.oplog import OpLog, TextLog
from rag.types import CanonicalText, Chunk, Document

QUESTIONS = [
    "What does the pass statement do?",
    "How are keyword arguments evaluated in calls?",
    "When is the else clause of a loop executed?",
    "Which objects are considered false in a truth test?",
    "How does a generator function resume after yield?",
    "What is the method resolution order of a class?",
    "Can a context manager suppress exceptions?",
    "How do f-strings format expressions?",
    "What is the difference between is and ==?",
    "Where does import search for modules?",
    "What happens to the namespace when an annotation is evaluated?",
    "integer division and modulo of negative numbers",
]


def save(store: DocumentStore, name: str, texts: list[str], heading: str = "") -> Document:
    """Save a document that has these chunks."""
    chunks, start = [], 0
    for ordinal, text in enumerate(texts):
        path = (heading,) if heading else ()
        chunks.append(Chunk(ordinal, start, start + len(text), text, 1, heading_path=path))
        start += len(text)
    return store.save(
        SourceFile(name, name, f"{name:0>64}", 1),
        CanonicalText("".join(texts), "text/plain"),
        chunks,
        np.ones((len(texts), 2), dtype=np.float32),
        embedder="e",
    )


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(f"sqlite:///{tmp_path / 'fathom.sqlite'}")


@pytest.fixture
def store(database: Database) -> DocumentStore:
    return DocumentStore(database)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "lexical"


@pytest.fixture
def tantivy(database: Database, folder: Path) -> TantivyIndex:
    return TantivyIndex(TextLog(database), folder)


@pytest.fixture(params=["fts5", "tantivy", "tantivy on postgresql"])
def pair(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[DocumentStore, LexicalIndex]]:
    """Return a store and the full-text index over it."""
    url = f"sqlite:///{tmp_path / 'fathom.sqlite'}"
    if request.param == "tantivy on postgresql":
        server = request.getfixturevalue("postgres")
        url = server.url(server.create_database())
    database = Database(url)
    index: LexicalIndex = open_lexical_index(database, tmp_path / "lexical")
    assert isinstance(index, SQLiteIndex) == (request.param != "tantivy on postgresql")
    if request.param == "tantivy":
        index = TantivyIndex(TextLog(database), tmp_path / "lexical")
    yield DocumentStore(database), index
    database.close()


def _found(store: DocumentStore, index: LexicalIndex, question: str, top_k: int = 5) -> list[str]:
    hits = index.search(question, top_k=top_k)
    stored = store.chunks([i for i, _ in hits])
    assert [s for _, s in hits] == sorted((s for _, s in hits), reverse=True)
    return [stored[i].chunk.text for i, _ in hits]


def test_words_are_found_in_any_of_their_forms(pair: tuple[DocumentStore, LexicalIndex]) -> None:
    store, index = pair
    save(store, "a", ["Berths are booked by radio.", "The quay is closed.", "Größe, naïve 日本"])
    assert _found(store, index, "booking a berth") == ["Berths are booked by radio."]
    assert _found(store, index, "CLOSING") == ["The quay is closed."]
    assert _found(store, index, "grosse naive") or _found(store, index, "Größe")
    assert _found(store, index, "日本") == ["Größe, naïve 日本"]
    assert _found(store, index, "nothing here at all") == []


def test_headings_are_searched_and_count_less(pair: tuple[DocumentStore, LexicalIndex]) -> None:
    store, index = pair
    save(store, "a", ["thirty-five crowns"], heading="Fees")
    save(store, "b", ["fees fees here"], heading="Other")
    assert _found(store, index, "fee") == ["fees fees here", "thirty-five crowns"]


def test_chunks_that_hold_a_word_are_counted_in_any_form_and_scope(
    pair: tuple[DocumentStore, LexicalIndex],
) -> None:
    store, index = pair
    first = save(
        store, "a", ["Berths are booked.", "A berth is free.", "The quay."], heading="Fees"
    )
    many = [save(store, f"b{n}", ["One berth."]).id for n in range(31)]
    assert index.frequencies(["berth", "fees", "unicorn"]) == {"berth": 33, "fees": 3, "unicorn": 0}
    among = index.frequencies(["berths", "fee"], document_ids=[first.id])
    assert among == {"berths": 2, "fee": 3}
    assert index.frequencies(["berth"], document_ids=many) == {"berth": 31}
    assert index.frequencies(["berth"], document_ids=[]) == {"berth": 0}


def test_search_follows_the_store(pair: tuple[DocumentStore, LexicalIndex]) -> None:
    store, index = pair
    first = save(store, "a", ["harbour one"])
    assert _found(store, index, "harbour") == ["harbour one"]
    save(store, "b", ["harbour two"])
    assert sorted(_found(store, index, "harbour")) == ["harbour one", "harbour two"]
    store.delete(first.id)
    assert _found(store, index, "harbour") == ["harbour two"]
    index.erase_deleted()
    assert _found(store, index, "harbour") == ["harbour two"]
    assert index.check() is None
    index.rebuild()
    assert _found(store, index, "harbour") == ["harbour two"]


def test_search_stays_within_the_documents_asked(pair: tuple[DocumentStore, LexicalIndex]) -> None:
    store, index = pair
    for name in "abcdefghijkl":
        save(store, name, [f"harbour {name}", "d1 d2"])
    for ids in ([1], [1, 12], list(range(2, 9)), [11, 999]):
        hits = index.search("harbour d1", top_k=50, document_ids=ids)
        documents = {s.document_id for s in store.chunks([i for i, _ in hits]).values()}
        assert documents == set(ids) - {999}
        assert len(hits) == 2 * len(documents)
    assert index.search("harbour", top_k=5, document_ids=[]) == []
    many = index.search("harbour", top_k=50, document_ids=list(range(3, 50_000)))
    assert len(many) == 10


def test_no_sign_in_a_question_is_syntax(pair: tuple[DocumentStore, LexicalIndex]) -> None:
    store, index = pair
    save(store, "a", ["the fee is 35 crowns", "a quay"])
    for question in ["fee AND (", '"', "heading:fee NOT *", "fee' OR 1=1 --", "NEAR(fee, 2)",
                     "fee^9 -crowns +quay", "{fee} [a TO b]", "fee~ f?e fe*", "text:fee", "\0fee",
                     "\\fee\\"]:  # fmt: skip
        found = _found(store, index, question)
        if "fee" in question:
            assert "the fee is 35 crowns" in found, question
    assert index.search("***", top_k=5) == []
    assert index.search("", top_k=5) == []
    long_question = " ".join(f"word{i}" for i in range(20_000)) + " crowns" + " x" + "y" * 100_000
    assert _found(store, index, long_question) == ["the fee is 35 crowns"]


def test_both_rank_real_text_alike(store: DocumentStore, database: Database, folder: Path) -> None:
    """The language reference that Python carries, in pieces of 600 characters."""
    for name, text in sorted(topics.items()):
        pieces = [text[start : start + 600] for start in range(0, len(text), 600)]
        save(store, name, pieces, heading=name)
    fts5, tantivy = Fts5Index(database), TantivyIndex(TextLog(database), folder)
    same_first, shared = 0, 0.0
    for question in QUESTIONS:
        ours = [i for i, _ in fts5.search(question, top_k=10)]
        theirs = [i for i, _ in tantivy.search(question, top_k=10)]
        same_first += ours[0] in theirs[:3]
        shared += len({*ours} & {*theirs}) / 10
    assert same_first >= 11
    assert shared / len(QUESTIONS) > 0.8


# ---- tantivy as a cache of the store -----------------------------------------------------------


def test_instances_share_one_folder(database: Database, store: DocumentStore, folder: Path) -> None:
    first, second = (TantivyIndex(TextLog(database), folder) for _ in range(2))
    save(store, "a", ["harbour one"])
    assert first.search("harbour", top_k=5)
    before = _index_folder(folder)
    assert second.search("harbour", top_k=5)
    deleted = save(store, "b", ["beacon"])
    save(store, "c", ["pier"])
    assert second.search("beacon", top_k=5)
    assert first.search("beacon", top_k=5)
    assert _index_folder(folder) == before, "caught up, not built anew"
    store.delete(deleted.id)
    second.erase_deleted()
    assert _index_folder(folder) == before
    assert first.search("beacon", top_k=5) == []
    save(store, "d", ["lighthouse"])
    assert first.search("lighthouse", top_k=5)
    assert second.search("lighthouse", top_k=5)


def test_an_index_behind_the_cut_log_starts_anew(
    database: Database, store: DocumentStore, tantivy: TantivyIndex
) -> None:
    gone = save(store, "a", ["harbour one"])
    assert tantivy.search("harbour", top_k=5)
    store.delete(gone.id)
    save(store, "b", ["beacon"])
    log = OpLog(database, "e")
    log.truncate(log.last_seq())
    assert tantivy.search("harbour", top_k=5) == []
    assert tantivy.search("beacon", top_k=5)
    assert tantivy.check() is None


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _each(suffix: str, change: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (path,) = _index_folder(folder).glob(f"*{suffix}")
        change(path)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        _each(".idx", _flip),
        _each(".term", _flip),
        _each(".fast", lambda path: os.truncate(path, 10)),
        _each(".fieldnorm", Path.unlink),
        _each("meta.json", _flip),
        lambda folder: (folder / "position.json").write_text("{"),
        lambda folder: (folder / "position.json").write_text("[1]"),
        lambda folder: (folder / "position.json").write_text(
            '{"folder": "../..", "library": "x", "seq": 1, "files": {}}'
        ),
        lambda folder: (folder / "position.json").unlink(),
        lambda folder: shutil.rmtree(_index_folder(folder)),
        lambda folder: shutil.rmtree(folder),
    ],
)
def test_a_damaged_folder_is_built_anew(
    database: Database, store: DocumentStore, folder: Path, damage: Callable[[Path], None]
) -> None:
    save(store, "a", ["harbour one", "harbour two"])
    TantivyIndex(TextLog(database), folder).catch_up()
    before = _index_folder(folder)
    damage(folder)
    again = TantivyIndex(TextLog(database), folder)
    if (folder / "position.json").exists():
        assert "cannot be used" in str(again.check())
    assert len(again.search("harbour", top_k=5)) == 2
    assert again.check() is None
    assert _index_folder(folder) != before


def test_an_index_that_is_damaged_while_it_is_open_is_built_anew(
    database: Database, store: DocumentStore, folder: Path, tantivy: TantivyIndex
) -> None:
    save(store, "a", ["harbour one"])
    assert tantivy.search("harbour", top_k=5)
    for path in _index_folder(folder).iterdir():
        path.write_bytes(b"")
    save(store, "b", ["harbour two"])
    assert len(tantivy.search("harbour", top_k=5)) == 2
    assert tantivy.check() is None


def test_an_interrupted_rebuild_leaves_nothing_for_long(
    store: DocumentStore, folder: Path, tantivy: TantivyIndex
) -> None:
    save(store, "a", ["harbour one"])
    tantivy.catch_up()
    shutil.copytree(_index_folder(folder), folder / "index-interrupted")
    assert "interrupted rebuild" in str(tantivy.check())
    tantivy.erase_deleted()
    assert tantivy.check() is None


def test_another_process_may_replace_the_folder(
    database: Database, store: DocumentStore, folder: Path, tantivy: TantivyIndex
) -> None:
    save(store, "a", ["harbour one"])
    tantivy.catch_up()
    TantivyIndex(TextLog(database), folder).rebuild()
    assert tantivy.search("harbour", top_k=5)
    tantivy.erase_deleted()
    assert tantivy.check() is None


def test_a_crash_between_commit_and_position_is_mended(
    database: Database, store: DocumentStore, folder: Path
) -> None:
    save(store, "a", ["harbour one"])
    TantivyIndex(TextLog(database), folder).catch_up()
    old = (folder / "position.json").read_text()
    save(store, "b", ["harbour two"])
    TantivyIndex(TextLog(database), folder).catch_up()
    (folder / "position.json").write_text(old)
    again = TantivyIndex(TextLog(database), folder)
    assert len(again.search("harbour", top_k=5)) == 2
    assert again.check() is None


def test_a_folder_of_another_library_or_another_time_is_not_used(
    database: Database, store: DocumentStore, folder: Path, tmp_path: Path
) -> None:
    save(store, "a", ["harbour one"])
    TantivyIndex(TextLog(database), folder).catch_up()
    other = Database(f"sqlite:///{tmp_path / 'other.sqlite'}")
    save(DocumentStore(other), "b", ["beacon"])
    foreign = TantivyIndex(TextLog(other), folder)
    assert "another library" in str(foreign.check())
    assert foreign.search("harbour", top_k=5) == []
    assert foreign.search("beacon", top_k=5)
    position = json.loads((folder / "position.json").read_text())
    (folder / "position.json").write_text(json.dumps({**position, "seq": 99}))
    restored = TantivyIndex(TextLog(other), folder)
    assert restored.search("beacon", top_k=5)
    assert json.loads((folder / "position.json").read_text())["seq"] == 1


def test_deleted_words_leave_the_files(
    store: DocumentStore, folder: Path, tantivy: TantivyIndex
) -> None:
    """The term dictionary is compressed, so tantivy itself is asked; bytes are looked at too."""
    save(store, "keep", ["harbour one"])
    document = save(store, "a", ["zanzibarquay", "harbour two"])
    found = tantivy.catch_up().searcher().terms_with_prefix("text", "zanzi")
    assert found == [("zanzibarquay", 1)], "else this test could not fail"
    terms = _files(folder, ".term")
    store.delete(document.id)
    assert tantivy.search("zanzibarquay", top_k=5) == []
    assert tantivy.catch_up().searcher().terms_with_prefix("text", "zanzi") == []
    assert not terms & _files(folder, ".term"), "tantivy's own deletion would keep them"
    assert tantivy.check() is None
    assert not [p for p in folder.rglob("*") if p.is_file() and b"zanzi" in p.read_bytes()]


def test_a_deletion_writes_anew_only_the_segments_that_it_touches(
    store: DocumentStore, folder: Path, tantivy: TantivyIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rag.retrieval.tantivy_index.SEGMENT_CHUNKS", 10)
    documents = [save(store, f"d{n}", [f"harbour d{n}x{i}" for i in range(8)]) for n in range(10)]
    assert len(tantivy.search("harbour", top_k=100)) == 80
    before = _files(folder, ".idx")
    assert len(before) == 8
    store.delete(documents[4].id)  # chunks 33 to 40: the end of the fourth segment
    assert len(tantivy.search("harbour", top_k=100)) == 72
    assert len(before & _files(folder, ".idx")) == 7
    store.delete(documents[5].id)  # 41 to 48
    store.delete(documents[6].id)  # 49 to 56: the fifth segment is empty now
    found = tantivy.search("harbour", top_k=100)
    assert {s.document_id for s in store.chunks([i for i, _ in found]).values()} == {
        d.id for d in documents if d.id not in {5, 6, 7}
    }
    assert len(_files(folder, ".idx")) == 7
    assert tantivy.check() is None


def test_many_small_additions_leave_few_segments(
    database: Database, store: DocumentStore, folder: Path, tantivy: TantivyIndex
) -> None:
    for number in range(33):
        save(store, f"d{number}", [f"harbour d{number}"])
        assert tantivy.search(f"d{number}", top_k=1)
        if number == 20:
            store.delete(7)
    assert len(_files(folder, ".idx")) <= 6
    assert tantivy.check() is None
    rebuilt = TantivyIndex(TextLog(database), folder.with_name("other"))
    question = "harbour d3 d9 d30"
    assert tantivy.search(question, top_k=40) == rebuilt.search(question, top_k=40)


def test_fts5_keeps_no_deleted_word_in_the_database_file(
    database: Database, store: DocumentStore, tmp_path: Path
) -> None:
    for number in range(50):
        save(store, f"keep {number}", [f"harbour {number}"])
    document = save(store, "a", ["zanzibarquay", "harbour two"], heading="mombasapier")
    words = (b"zanzibarqu", b"mombasapi")  # stems
    assert all(_in_files(tmp_path, word) for word in words), "else this test could not fail"
    store.delete(document.id)
    assert not any(_in_files(tmp_path, word) for word in words)


def test_a_full_disk_is_told_and_mended(
    database: Database, store: DocumentStore, folder: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    save(store, "a", [f"harbour {os.urandom(300).hex()}" for _ in range(2000)])
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this system does not let root mount a tmpfs")
    index = TantivyIndex(TextLog(database), folder)
    try:
        with pytest.raises(StorageFullError, match="full-text index"):
            index.search("harbour", top_k=5)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
    assert len(index.search("harbour", top_k=5)) == 5


SEARCHER = """
import sys
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from test_lexical import save
from rag.retrieval.lexical_index import open_lexical_index
from rag.retrieval.tantivy_index import TantivyIndex
from rag.store.database import Database
from rag.store.documents import DocumentStore
from rag.store.oplog import TextLog
database = Database(sys.argv[3])
store, name, folder = DocumentStore(database), sys.argv[5], Path(sys.argv[4])
index = TantivyIndex(TextLog(database), folder)
if sys.argv[6] == "fts5":
    index = open_lexical_index(database, folder)
for number in range(6):
    document = save(store, f"{name}{number}", [f"harbour {name}{number}"])
    (hit,) = index.search(f"{name}{number}", top_k=5)
    assert hit[0] in store.chunk_ids([document.id])
    if number % 2:
        store.delete(document.id)
        index.erase_deleted()
        assert index.search(f"{name}{number}", top_k=5) == []
"""


@pytest.mark.parametrize("kind", ["fts5", "tantivy"])
def test_processes_write_delete_and_search_at_once(tmp_path: Path, kind: str) -> None:
    url, folder = f"sqlite:///{tmp_path / 'fathom.sqlite'}", tmp_path / "lexical"
    here = Path(__file__).resolve()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SEARCHER, str(here.parents[1]), str(here.parent), url,
             str(folder), name, kind],
            stderr=subprocess.PIPE, text=True,
        )
        for name in ("alpha", "beta", "gamma")
    ]  # fmt: skip
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    database = Database(url)
    index = open_lexical_index(database, folder)
    if kind == "tantivy":
        index = TantivyIndex(TextLog(database), folder)
    assert index.check() is None
    assert len(index.search("harbour", top_k=50)) == 9


def test_large_sqlite_libraries_are_searched_by_tantivy(
    database: Database, store: DocumentStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is open follows, both ways; no rows, no words and no folder are left over."""
    kept = save(store, "a", ["harbour one", "harbour two"])
    gone = save(store, "b", ["zanzibarquay"])
    index = open_lexical_index(database, folder)
    assert isinstance(index, SQLiteIndex)
    assert len(index.search("harbour", top_k=5)) == 2
    assert not folder.exists()
    assert _in_files(folder.parent, b"zanzibarqu")

    monkeypatch.setattr("rag.retrieval.lexical_index.LARGEST_FTS5_CHUNKS", 2)
    open_lexical_index(database, folder)  # by another process
    assert index.fts5.remains() is None
    assert len(index.search("harbour", top_k=5)) == 2
    assert index.frequencies(["harbour", "zanzibarquay"]) == {"harbour": 2, "zanzibarquay": 1}
    assert folder.exists()
    more = save(store, "c", ["harbour three"])
    assert len(index.search("harbour", top_k=5)) == 3
    store.delete(gone.id)
    index.erase_deleted()
    assert not _in_files(folder.parent, b"zanzibarqu")
    assert index.check() is None
    with database.write() as connection:
        connection.exec_driver_sql("INSERT INTO chunk_fts(rowid, text) VALUES (9, 'ghost')")
    assert "1 full-text rows are left" in str(index.check())
    index.rebuild()
    assert index.check() is None
    store.delete(more.id)
    index.erase_deleted()
    assert folder.exists(), "two are more than half of the limit"

    monkeypatch.undo()
    open_lexical_index(database, folder)
    assert not folder.exists(), "an index that nobody follows any more is removed"
    assert len(index.search("harbour", top_k=5)) == 2
    assert index.check() is None
    store.delete(kept.id)
    assert index.search("harbour", top_k=5) == []


def _index_folder(folder: Path) -> Path:
    return folder / str(json.loads((folder / "position.json").read_text())["folder"])


def _files(folder: Path, suffix: str) -> set[str]:
    return {path.name for path in folder.rglob(f"*{suffix}")}


def _in_files(folder: Path, word: bytes) -> bool:
    return any(word in path.read_bytes() for path in folder.rglob("*") if path.is_file())
