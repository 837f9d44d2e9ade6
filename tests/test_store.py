"""The store, on SQLite and on PostgreSQL: identity, versions, collections, deletion."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from rag.errors import DocumentNotFoundError, EmbedderMismatchError, StoreError
from rag.routing.question_class import classify_question
from rag.store.calibrations import CalibrationStore
from rag.store.database import Database
from rag.store.documents import DocumentStore, SourceFile
from rag.store.oplog import OpLog
from rag.store.receipts import REDACTED, ReceiptStore
from rag.types import (
    Answer,
    CanonicalText,
    Chunk,
    Citation,
    Document,
    KVBytes,
    Page,
    ReadExtent,
    Receipt,
    Route,
    Seconds,
    Section,
)

EMBEDDER = "test-embedder"
DIM = 8


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = Database(database_url)
    yield opened
    opened.close()


@pytest.fixture
def store(database: Database) -> DocumentStore:
    return DocumentStore(database)


def _file(source: str, content: str) -> SourceFile:
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    return SourceFile(source, Path(source).name, sha256, len(content))


def _save(
    store: DocumentStore, source: str, content: str, *, collections: Sequence[str] = ()
) -> Document:
    """Save one document whose content is one word a chunk."""
    return store.save(
        _file(source, content),
        CanonicalText(content, "text/plain", sections=(Section(1, "Fees", 0),)),
        _chunks(content),
        _vectors(content),
        embedder=EMBEDDER,
        collections=collections,
    )


def _chunks(content: str) -> list[Chunk]:
    found, start = [], 0
    for ordinal, word in enumerate(content.split(" ")):
        end = start + len(word)
        found.append(Chunk(ordinal, start, end, word, 1, heading_path=("Fees",)))
        start = end + 1
    return found


def _vectors(content: str) -> npt.NDArray[np.float32]:
    rows = [len(word) + np.arange(DIM) for word in content.split(" ")]
    return np.asarray(rows, dtype=np.float32)


def _take(store: DocumentStore, source: str, content: str) -> Document:
    """Take a file the way the pipeline does."""
    return store.recall(_file(source, content)) or _save(store, source, content)


def _latest(store: DocumentStore) -> dict[int, str]:
    return {d.id: store.text(d.id) for d in store.all()}


# ---- a document --------------------------------------------------------------------------------


def test_a_document_comes_back_as_it_was_saved(store: DocumentStore, database: Database) -> None:
    content = CanonicalText(
        "Fee: 35 \N{EURO SIGN} \N{GRINNING FACE} end",
        "text/plain",
        pages=(Page(1, "iv", 0, 5), Page(2, None, 5, 15)),
        sections=(Section(1, "Fee", 0),),
        warnings=("page 2 needs OCR",),
    )
    chunks = [Chunk(0, 0, 5, "Fee: ", 2, 1, 1, ("a", "b")), Chunk(1, 5, 15, content.text[5:], 4)]
    saved = store.save(
        _file("/a.txt", "a"), content, chunks, np.eye(2, DIM, dtype=np.float32), embedder=EMBEDDER
    )
    assert store.find("1") == store.find("/a.txt") == store.find("a.txt") == saved
    assert (saved.num_chars, saved.num_pages, saved.num_chunks) == (15, 2, 2)
    assert saved.warnings == content.warnings
    assert store.pages(1) == list(content.pages)
    assert store.sections(1) == list(content.sections)
    assert [s.chunk for s in store.chunks_of(1)] == chunks
    assert store.text(1) == content.text
    assert store.text(1, 10, 11) == "\N{GRINNING FACE}", "offsets are code points"
    assert store.text(1, 9) == content.text[9:]
    changes = OpLog(database, EMBEDDER).changes_since(0)
    assert changes is not None
    assert changes.added == [s.id for s in store.chunks_of(1)]
    assert changes.vectors.tolist() == np.eye(2, DIM).tolist()


def test_documents_are_found_by_their_ids_at_once(store: DocumentStore, database: Database) -> None:
    first, second = _save(store, "/a.txt", "one"), _save(store, "/2.txt", "two")
    newer = _save(store, "/a.txt", "three")
    superseded = store.find(str(first.id))
    wanted = [newer.id, second.id, first.id, second.id]
    assert store.with_ids(wanted) == [newer, second, superseded]
    assert store.with_ids([]) == []
    for unknown in (99, 0, -1, 2**80):
        with pytest.raises(DocumentNotFoundError, match=f"no document '{unknown}'; there are 2"):
            store.with_ids([second.id, unknown])
    with pytest.raises(DocumentNotFoundError, match="there are 0"):
        DocumentStore(database, "anna").with_ids([first.id])


def test_what_no_database_can_hold_is_replaced_sign_for_sign(store: DocumentStore) -> None:
    text = CanonicalText("ab\0cd\ud800e", "text/plain", sections=(Section(1, "x\0", 0),)).text
    assert text == "ab\N{REPLACEMENT CHARACTER}cd\N{REPLACEMENT CHARACTER}e"
    document = _save(store, "/odd\udcff.txt", text)
    assert store.text(document.id) == text
    assert store.find("/odd\udcff.txt") == document
    assert _save(store, "/odd\udcfe.txt", "other").version == 1


def test_more_ids_than_one_statement_can_bind(store: DocumentStore) -> None:
    document = _save(store, "/a.txt", "one two")
    many = [*range(10_000, 43_000), document.id]
    ids = [s.id for s in store.chunks_of(document.id)]
    store.save_token_count(document.id, "t", 7)
    assert set(store.chunks([*many, *ids])) >= set(ids)
    assert store.chunk_ids(many) == ids
    assert store.token_counts(many, "t") == {document.id: 7}
    store.add_vectors("other", [*range(10_000, 43_000), *ids], np.ones((33_002, 2), np.float32))
    assert store.chunks_without_vector("other", 5) == []
    store.add_to_collection("c", [document.id])
    store.remove_from_collection("c", many)
    assert store.collections() == []


def test_token_count_of_a_deleted_document_is_not_kept(store: DocumentStore) -> None:
    store.save_token_count(99, "t", 7)
    assert store.token_counts([99], "t") == {}


# ---- identity ----------------------------------------------------------------------------------


def test_changed_content_is_a_new_version_and_the_old_one_stays_citable(
    store: DocumentStore,
) -> None:
    first, second = _take(store, "/a.txt", "one"), _take(store, "/a.txt", "two")
    assert (first.version, second.version) == (1, 2)
    assert _latest(store) == {second.id: "two"}
    assert store.find("/a.txt") == second
    assert not store.find(str(first.id)).is_latest
    assert store.text(first.id, 0, 3) == "one"


def test_content_that_a_name_goes_back_to_is_the_latest_again(store: DocumentStore) -> None:
    first, second = _take(store, "/a.txt", "one"), _take(store, "/a.txt", "two")
    assert _take(store, "/a.txt", "one").id == first.id
    assert _latest(store) == {first.id: "one"}
    assert store.find("/a.txt").id == first.id
    assert [d.id for d in store.all(include_superseded=True)] == [first.id, second.id]
    assert _take(store, "/a.txt", "three").version == 4
    assert list(_latest(store).values()) == ["three"]


def test_content_that_another_name_has_left_stays_searched(store: DocumentStore) -> None:
    first = _take(store, "/a.txt", "one")
    assert _take(store, "/b.txt", "one").id == first.id, "one content, one document"
    second = _take(store, "/a.txt", "two")
    assert _latest(store) == {first.id: "one", second.id: "two"}
    assert store.find("b.txt").id == first.id
    assert store.find("a.txt").id == second.id


def test_content_kept_only_as_an_old_version_is_found_under_its_new_name(
    store: DocumentStore,
) -> None:
    first = _take(store, "/a.txt", "one")
    _take(store, "/a.txt", "two")
    assert _take(store, "/b.txt", "one").id == first.id
    assert set(_latest(store).values()) == {"one", "two"}


def test_deleting_the_latest_version_brings_back_the_one_before(store: DocumentStore) -> None:
    first, second = _take(store, "/a.txt", "one"), _take(store, "/a.txt", "two")
    _take(store, "/a.txt", "one")
    store.delete(first.id)
    assert _latest(store) == {second.id: "two"}
    store.delete(second.id)
    assert store.all(include_superseded=True) == []
    store.delete(second.id)  # a second time does nothing
    assert _take(store, "/a.txt", "one").version == 1


def test_numbers_of_deleted_documents_and_chunks_are_never_given_again(
    store: DocumentStore,
) -> None:
    first = _take(store, "/a.txt", "one two")
    chunk_ids = store.chunk_ids([first.id])
    store.delete(first.id)
    again = _take(store, "/a.txt", "one two")
    assert again.id > first.id
    assert min(store.chunk_ids([again.id])) > max(chunk_ids)


def test_unknown_and_ambiguous_names_are_explained(store: DocumentStore) -> None:
    _take(store, "/x/a.txt", "one"), _take(store, "/y/a.txt", "two")
    with pytest.raises(
        DocumentNotFoundError, match=r"2 documents are titled 'a.txt': numbers 1, 2"
    ):
        store.find("a.txt")
    for reference in ("nothing", "99", "9" * 40, "\u0663", "' OR 1=1 --", "a\0"):
        with pytest.raises(DocumentNotFoundError, match=r"there are 2: 1 'a.txt', 2 'a.txt'"):
            store.find(reference)


WRITER = """
import sys
sys.path[:0] = sys.argv[1:3]
from test_store import _take, _latest
from rag.store.database import Database
from rag.store.documents import DocumentStore
from rag.store.oplog import OpLog
store = DocumentStore(Database(sys.argv[3]))
print("open", flush=True)
sys.stdin.readline()
for number in range(int(sys.argv[5])):
    _take(store, f"/{number}.txt", f"content {number}")
    _take(store, f"/{sys.argv[4]}.txt", f"content of {sys.argv[4]} {number}")
    list(OpLog(store._database, "test-embedder").vectors())
"""


def _writers(url: str, count: int, rounds: int) -> list[str]:
    """Run processes that open the library and write at the same moment; return their errors."""
    here = Path(__file__).resolve()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(here.parents[1]), str(here.parent), url,
             f"writer{number}", str(rounds)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(count)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    outputs = [process.communicate("go\n", timeout=120) for process in processes]
    codes = [process.returncode for process in processes]
    return [o[1] for code, o in zip(codes, outputs, strict=True) if code != 0]


def test_processes_that_open_and_write_at_once_make_each_document_once(database_url: str) -> None:
    assert _writers(database_url, count=4, rounds=8) == []
    store = DocumentStore(Database(database_url))
    texts = [store.text(d.id) for d in store.all(include_superseded=True)]
    assert len(texts) == len(set(texts)) == 8 + 4 * 8
    assert len(store.all()) == 8 + 4
    with store._database.read() as connection:
        logged = connection.exec_driver_sql("SELECT chunk_id FROM oplog ORDER BY seq").scalars()
        assert sorted(logged) == sorted(store.chunk_ids(range(1, 1000)))
    store._database.close()


KILLED = """
import sys
sys.path[:0] = sys.argv[1:3]
from test_store import _take
from rag.store.database import Database
from rag.store.documents import DocumentStore
store = DocumentStore(Database(sys.argv[3]))
for number in range(100_000):
    document = _take(store, f"/{number}.txt", f"content {number} " + "word " * 40)
    if number % 3 == 0:
        store.delete(document.id)
    print(number, flush=True)
"""


def test_a_killed_writer_loses_nothing_acknowledged(database_url: str) -> None:
    here = Path(__file__).resolve()
    arguments = [str(here.parents[1]), str(here.parent), database_url]
    store = DocumentStore(Database(database_url))
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, *arguments], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        acknowledged = [int(process.stdout.readline()) for _ in range(15)]
        process.kill()
        acknowledged += [int(line) for line in process.stdout.read().split()]
        process.stdout.close()
        process.wait()
        for number in acknowledged[:-1]:
            if number % 3:
                assert store.text(store.find(f"/{number}.txt").id).startswith(f"content {number} ")
        documents = store.all(include_superseded=True)
        assert len({d.content_sha256 for d in documents}) == len(documents)
        assert all(len(store.chunks_of(d.id)) == d.num_chunks for d in documents)
        log = OpLog(store._database, EMBEDDER)
        stored = [chunk_id for ids, _ in log.vectors() for chunk_id in ids]
        assert stored == sorted(store.chunk_ids([d.id for d in documents]))
        replayed = log.changes_since(0, limit=1_000_000)
        assert replayed is not None
        assert replayed.added == stored
    store._database.close()


# ---- collections -------------------------------------------------------------------------------


def _collections(store: DocumentStore) -> dict[str, int]:
    return {c.name: c.num_documents for c in store.collections()}


def test_a_document_may_be_in_several_collections(store: DocumentStore) -> None:
    a = _save(store, "/a.txt", "one", collections=["law", " 2026 "])
    b = _save(store, "/b.txt", "two", collections=["law"])
    assert a.collections == ("2026", "law")
    assert _collections(store) == {"2026": 1, "law": 2}
    assert [d.id for d in store.all(collection="law")] == [a.id, b.id]
    assert [d.id for d in store.all(collection="2026")] == [a.id]
    store.remove_from_collection("law", [a.id])
    assert store.find(str(a.id)).collections == ("2026",)
    store.add_to_collection("law", [a.id, a.id])
    assert [d.id for d in store.all(collection="law")] == [a.id, b.id]


def test_a_new_version_inherits_collections_and_known_content_gains_them(
    store: DocumentStore,
) -> None:
    first = _save(store, "/a.txt", "one", collections=["law"])
    second = _save(store, "/a.txt", "two", collections=["2026"])
    assert second.collections == ("2026", "law")
    assert _collections(store) == {"2026": 1, "law": 1}, "old versions are not counted"
    known = store.recall(_file("/b.txt", "one"), collections=["copies"])
    assert known is not None
    assert known.id == first.id
    assert known.collections == ("copies", "law")
    assert _collections(store) == {"2026": 1, "copies": 1, "law": 2}
    back = store.recall(_file("/a.txt", "one"))
    assert back is not None
    assert back.collections == ("2026", "copies", "law")


def test_a_collection_goes_with_or_without_its_documents(store: DocumentStore) -> None:
    _save(store, "/a.txt", "one", collections=["law"])
    _save(store, "/a.txt", "two", collections=["law"])
    shared = _save(store, "/b.txt", "three", collections=["law", "2026"])
    store.dissolve_collection("2026")
    assert _collections(store) == {"law": 2}
    store.add_to_collection("2026", [shared.id])
    assert [d.version for d in store.delete_collection("law")] == [1, 2]
    assert [d.id for d in store.all(include_superseded=True)] == [shared.id]
    assert _collections(store) == {"2026": 1}


def test_collections_that_cannot_be_are_refused(store: DocumentStore) -> None:
    document = _save(store, "/a.txt", "one", collections=["law"])
    for call in (
        lambda: store.all(collection="x"),
        lambda: store.dissolve_collection("x"),
        lambda: store.delete_collection("x"),
        lambda: store.remove_from_collection("x", [1]),
    ):
        with pytest.raises(DocumentNotFoundError, match="no collection 'x'; there are: law"):
            call()
    with pytest.raises(DocumentNotFoundError, match="no document 77"):
        store.add_to_collection("new", [document.id, 77])
    assert _collections(store) == {"law": 1}
    for name in ("", "  ", "a\nb", "a\0"):
        with pytest.raises(StoreError, match="cannot name a collection"):
            store.add_to_collection(name, [document.id])


# ---- embedders ---------------------------------------------------------------------------------


def test_a_library_is_searched_with_one_embedder_at_a_time(
    store: DocumentStore, database: Database
) -> None:
    _save(store, "/a.txt", "one two")
    with pytest.raises(EmbedderMismatchError, match="come from test-embedder"):
        store.save(_file("/b", "b"), CanonicalText("b", "t"), [], _vectors("b")[:0], embedder="new")
    (first, second) = store.chunks_without_vector("new", 10)
    assert store.chunks_without_vector("new", 1) == [first]
    assert store.chunks_without_vector("new", 10, after_id=first.id) == [second]
    store.add_vectors("new", [first.id], np.full((1, 4), 5, np.float32))
    assert [ids for ids, _ in OpLog(database, "new").vectors()] == [[first.id]]
    with pytest.raises(EmbedderMismatchError, match="1 of 2 chunks have no vector of new yet"):
        store.activate_embedder("new")
    assert store.active_embedder() == EMBEDDER
    store.add_vectors("new", [first.id, second.id], np.full((2, 4), 6, np.float32))
    store.activate_embedder("new")
    assert store.active_embedder() == "new"
    ((_, vectors),) = OpLog(database, "new").vectors()
    assert vectors.tolist() == [[6.0] * 4] * 2
    assert list(OpLog(database, EMBEDDER).vectors()) == []


def test_calibrations_are_remembered(database: Database) -> None:
    calibrations = CalibrationStore(database)
    assert calibrations.load("prefill") is None
    calibrations.save("prefill", {"rate": 89.5})
    calibrations.save("prefill", {"rate": 90.5})
    assert CalibrationStore(database).load("prefill") == {"rate": 90.5}


# ---- the op-log --------------------------------------------------------------------------------


def test_changes_are_net_and_end_at_the_floor(store: DocumentStore, database: Database) -> None:
    log = OpLog(database, EMBEDDER)
    first = _save(store, "/a.txt", "one two")
    first_ids = store.chunk_ids([first.id])
    middle = log.last_seq()
    second = _save(store, "/b.txt", "three")
    store.delete(first.id)
    changes = log.changes_since(0)
    assert changes is not None
    assert changes.removed == sorted(first_ids + store.chunk_ids([second.id]))
    assert changes.added == store.chunk_ids([second.id])
    later = log.changes_since(middle)
    assert later is not None
    assert (later.added, later.seq) == (changes.added, log.last_seq())
    log.truncate(middle)
    assert log.changes_since(middle - 1) is None
    assert log.changes_since(middle) is not None
    log.truncate(10_000)
    assert log.last_seq() == 10_000
    log.truncate(3)
    assert log.changes_since(9_999) is None, "the floor never sinks"


def test_the_order_of_the_log_is_the_order_of_the_commits(database_url: str) -> None:
    """A writer that has begun keeps the next one out: no reader can see 11 before 10 is there."""
    database = Database(database_url)
    store, log = DocumentStore(database), OpLog(database, EMBEDDER)
    _save(store, "/0.txt", "zero")
    seen: list[int] = []
    waited = threading.Event()

    def second_writer() -> None:
        _save(store, "/b.txt", "second")
        waited.set()

    with database.write() as connection:
        insert = (
            'INSERT INTO chunk(document_id, ordinal, start, "end", heading, num_tokens, text,'
            " scope) VALUES (1, 99, 0, 1, '', 1, 'first', 'd1')"
        )
        connection.exec_driver_sql(insert)
        thread = threading.Thread(target=second_writer)
        thread.start()
        assert not waited.wait(0.5), "the second writer must not get past the first"
        changes = log.changes_since(0)
        assert changes is not None
        seen.append(changes.seq)
    thread.join(20)
    assert seen == [1]
    after = log.changes_since(seen[0])
    assert after is not None
    assert len(after.removed) == 2, "both writers' entries are still to come for that reader"
    database.close()


# ---- deletion ----------------------------------------------------------------------------------


def _answer(document: Document, quote: str) -> Answer:
    citation = Citation(
        1, document.id, document.title, 1, None, "Fees", 0, len(quote), quote, verified=True
    )
    receipt = Receipt(
        id="r1",
        route=Route.FULL,
        reason="",
        question_class=classify_question("Who?").question_class,
        gates=(),
        read=ReadExtent(1, 1, 1, 1, ""),
        prompt_tokens=1,
        cached_tokens=0,
        new_tokens=1,
        kv_bytes=KVBytes(1, 1),
        seconds=Seconds(0, 0, 0, 0, 0),
        escalations=(),
        model="m",
        embedder="e",
        prompt_sha256="",
    )
    return Answer(f"It is {quote} [1]", abstained=False, citations=(citation,), receipt=receipt)


def test_deleting_takes_the_words_out_of_past_answers(
    store: DocumentStore, database: Database
) -> None:
    document = _save(store, "/a.txt", "zanzibar one")
    receipts = ReceiptStore(database)
    receipts.save("Is it zanzibar?\0", _answer(document, "zanzibar"), [document.id])
    assert receipts.load("r1").citations[0].quote == "zanzibar"
    store.delete(document.id)
    redacted = receipts.load("r1")
    assert redacted.answer == redacted.citations[0].quote == REDACTED
    assert redacted.receipt.read.tokens == 1
    with database.read() as connection:
        rows = connection.exec_driver_sql("SELECT question, body FROM answer").all()
    assert "zanzibar" not in str(rows)


def test_an_answer_that_ends_after_the_deletion_is_stored_redacted(
    store: DocumentStore, database: Database
) -> None:
    document = _save(store, "/a.txt", "zanzibar one")
    store.delete(document.id)
    receipts = ReceiptStore(database)
    receipts.save("Is it zanzibar?", _answer(document, "zanzibar"), [document.id])
    assert "zanzibar" not in str(receipts.load("r1"))


def test_no_table_keeps_a_row_of_a_deleted_document(
    store: DocumentStore, database: Database
) -> None:
    kept = _save(store, "/keep.txt", "kept")
    document = _save(store, "/a.txt", "zanzibar one", collections=["c"])
    store.save_token_count(document.id, "t", 3)
    store.add_vectors("new", store.chunk_ids([document.id]), np.ones((2, 4), np.float32))
    store.delete(document.id)
    with database.read() as connection:
        for table in ("document_text", "section", "chunk", "source_version", "document"):
            column = "id" if table == "document" else "document_id"
            query = f"SELECT {column} FROM {table}"
            assert set(connection.exec_driver_sql(query).scalars()) == {kept.id}, table
        for table in ("collection_member", "token_count"):
            assert connection.exec_driver_sql(f"SELECT * FROM {table}").all() == [], table
        vectors = connection.exec_driver_sql("SELECT chunk_id FROM chunk_vector").scalars()
        assert set(vectors) == set(store.chunk_ids([kept.id]))


def test_ten_thousand_chunks_are_saved_and_deleted_in_seconds(store: DocumentStore) -> None:
    """Half a second on an idle machine; FTS5's own secure-delete took six."""
    words = [f"w{n}" for n in range(5_000)]
    draw = np.random.default_rng(0).zipf(1.3, (10_000, 120)) % len(words)
    texts = [" ".join(words[i] for i in row) for row in draw]
    chunks, start = [], 0
    for ordinal, text in enumerate(texts):
        chunks.append(Chunk(ordinal, start, start + len(text), text, 120))
        start += len(text)
    document = store.save(
        _file("/big.txt", "big"),
        CanonicalText("".join(texts), "text/plain"),
        chunks,
        np.random.default_rng(0).standard_normal((10_000, 384), dtype=np.float32),
        embedder=EMBEDDER,
    )
    assert document.num_chunks == store.num_chunks() == 10_000
    started = time.process_time(), time.perf_counter()
    store.delete(document.id)
    assert store.num_chunks() == 0
    assert time.process_time() - started[0] < 2.0
    assert time.perf_counter() - started[1] < 20.0, "on a busy machine"


def test_text_that_a_reader_still_sees_stays_in_the_log_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("rag.store.database.WAIT_SECONDS", 1)
    database = Database(f"sqlite:///{tmp_path / 'fathom.sqlite'}")
    store = DocumentStore(database)
    first, second = _save(store, "/a.txt", "zanzibar"), _save(store, "/b.txt", "two")
    with database.read() as connection:
        connection.exec_driver_sql("SELECT count(*) FROM chunk").scalar()
        store.delete(first.id)
    assert "still in the write-ahead log" in caplog.text
    store.delete(second.id)
    files = [path for path in tmp_path.iterdir() if b"zanzibar" in path.read_bytes()]
    assert files == []


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("nonsense", "cannot be read"),
        ("mysql://host/db", "no database of kind 'mysql'"),
        ("postgres://host/db", "no database of kind 'postgres'"),
        ("postgresql://host/db", "no database of kind 'postgresql'"),
        ("sqlite://", "names no database"),
        ("postgresql+psycopg://127.0.0.1:1/library", "cannot be reached"),
    ],
)
def test_bad_urls_are_explained(url: str, found: str) -> None:
    with pytest.raises(StoreError, match=found) as caught:
        Database(url)
    assert caught.value.hint


def test_a_file_that_is_no_database_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "fathom.sqlite"
    path.write_bytes(os.urandom(8192))
    with pytest.raises(StoreError, match="not a database"):
        Database(f"sqlite:///{path}")


def test_a_pool_without_a_free_connection_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rag.store.database.WAIT_SECONDS", 0.05)
    database = Database(f"sqlite:///{tmp_path / 'fathom.sqlite'}")
    with ExitStack() as others:
        in_use = database.engine.pool.size() + database.engine.pool._max_overflow  # type: ignore[attr-defined]
        for _ in range(in_use):
            others.enter_context(database.read())
        with pytest.raises(StoreError, match="all connections") as caught:
            others.enter_context(database.read())
    assert caught.value.hint
    with database.read() as connection:
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1
