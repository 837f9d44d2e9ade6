"""Accounts and ownership: nobody sees, finds, counts or deletes anything of another."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from typer.testing import CliRunner

from conftest import HANDBOOK, HashEmbedder, make_tiny_engine
from ingest.pipeline import original_path
from rag.answering.replay import replay
from rag.errors import AccountError, DocumentNotFoundError, QuotaError, StoreError
from rag.lm.local_engine import LocalEngine
from rag.settings import Settings
from rag.store.access import EVERY_OWNER, EVERYONE
from rag.store.accounts import AccountStore
from rag.store.database import Database
from rag.store.documents import DocumentStore, SourceFile
from rag.types import Answer, CanonicalText, Chunk, Document, Route
from ui.assembly import Fathom
from ui.cli import app
from ui.doctor import examine_library
from ui.fair_queue import MAX_WAITING_EACH, FairQueue, Ticket, Waiting
from ui.library import Library

PASSWORD = "correct horse battery"
SECRET = "The zolothurn lies under the third bollard.\n"


@pytest.fixture
def anna(library: Fathom, cheap_hashes: None) -> Library:
    """Return the library as anna sees it; she has an account."""
    library.accounts.add("anna", PASSWORD)
    return library.for_owner("anna")


@pytest.fixture
def ben(library: Fathom, cheap_hashes: None) -> Library:
    """Return the library as ben sees it; he has an account."""
    library.accounts.add("ben", PASSWORD)
    return library.for_owner("ben")


def write(folder: Path, name: str, text: str) -> Path:
    """Write a file in a new folder, so that one name can be given twice."""
    number = len(list(folder.glob("given-*")))
    path = folder / f"given-{number}" / name
    path.parent.mkdir()
    path.write_text(text)
    return path


def give(owner: Library, folder: Path, name: str, text: str) -> Document:
    """Ingest a text as if it had been uploaded."""
    return owner.ingest(write(folder, name, text), source=f"upload:{name}").document


# ---- the store ---------------------------------------------------------------------------------


def save(store: DocumentStore, source: str, text: str, collections: Sequence[str] = ()) -> Document:
    """Store a document of one chunk; its hash is that of the text."""
    import hashlib

    digest = hashlib.sha256(text.encode()).hexdigest()
    chunk = Chunk(0, 0, len(text), text, 3)
    vectors = np.full((1, 4), 0.5, dtype=np.float32)
    return store.save(
        SourceFile(source, source, digest, len(text)),
        CanonicalText(text, "text/plain"),
        [chunk],
        vectors,
        embedder="test",
        collections=collections,
    )


@pytest.fixture
def stores(database_url: str) -> Iterator[tuple[DocumentStore, DocumentStore]]:
    """Return the stores of two owners in one database, of each kind."""
    database = Database(database_url)
    yield DocumentStore(database, "anna"), DocumentStore(database, "ben")
    database.close()


def test_every_query_of_a_store_is_its_owners(
    stores: tuple[DocumentStore, DocumentStore],
) -> None:
    anna, ben = stores
    hers = save(anna, "report.txt", SECRET, ["deals"])
    own = save(ben, "report.txt", "Ben's own words", ["deals"])
    anna.save_token_count(hers.id, "t", 7)
    ben.save_token_count(hers.id, "t", 8)
    chunk_id = anna.chunk_ids([hers.id])[0]
    assert [d.id for d in ben.all(include_superseded=True)] == [own.id]
    assert own.version == hers.version == 1
    assert ben.find("report.txt").id == own.id
    with pytest.raises(DocumentNotFoundError) as caught:
        ben.find(str(hers.id))
    assert "report" in str(caught.value)  # his own is named, hers is not counted
    assert "there are 1:" in str(caught.value)
    assert ben.text(hers.id) == ""
    for parts in (ben.pages(hers.id), ben.sections(hers.id), ben.chunks_of(hers.id)):
        assert list(parts) == []
    assert ben.chunks([chunk_id]) == {}
    assert ben.chunk_ids([hers.id, own.id]) == ben.chunk_ids([own.id])
    assert ben.token_counts([hers.id], "t") == {}
    assert anna.token_counts([hers.id], "t") == {hers.id: 7}
    assert [(c.name, c.num_documents) for c in ben.collections()] == [("deals", 1)]
    assert [d.id for d in ben.all(collection="deals")] == [own.id]
    assert ben.usage() == (1, len("Ben's own words"))
    everything = DocumentStore(anna._database, EVERY_OWNER)
    assert {d.id for d in everything.all()} == {hers.id, own.id}
    assert everything.text(hers.id) == SECRET
    assert DocumentStore(anna._database).all() == []


def test_what_another_owns_cannot_be_changed(stores: tuple[DocumentStore, DocumentStore]) -> None:
    anna, ben = stores
    hers = save(anna, "report.txt", SECRET, ["deals"])
    ben.delete(hers.id)
    with pytest.raises(DocumentNotFoundError):
        ben.add_to_collection("mine", [hers.id])
    for change in (ben.dissolve_collection, ben.delete_collection, ben.unshare_collection):
        with pytest.raises(DocumentNotFoundError, match="there are: none"):
            change("deals")
    with pytest.raises(DocumentNotFoundError):
        ben.remove_from_collection("deals", [hers.id])
    vectors = np.full((1, 4), 0.5, dtype=np.float32)
    content = CanonicalText("other", "text/plain")
    with pytest.raises(DocumentNotFoundError):
        ben.replace(hers.id, content, [Chunk(0, 0, 5, "other", 1)], vectors, embedder="test")
    assert anna.text(hers.id) == SECRET
    assert anna.find(str(hers.id)).collections == ("deals",)


def test_the_same_bytes_are_two_documents(stores: tuple[DocumentStore, DocumentStore]) -> None:
    anna, ben = stores
    hers, own = save(anna, "a.txt", SECRET), save(ben, "b.txt", SECRET)
    assert hers.id != own.id
    assert own.title == "b.txt"
    file = SourceFile("c.txt", "c.txt", hers.content_sha256, len(SECRET))
    assert ben.recall(file) == own
    removed: list[str] = []
    anna.delete(hers.id)
    anna.if_unheld(own.content_sha256, lambda: removed.append("too early"))
    assert ben.text(own.id) == SECRET
    ben.delete(own.id)
    ben.if_unheld(own.content_sha256, lambda: removed.append("now"))
    assert removed == ["now"]


def test_a_shared_collection_is_read_and_not_changed(
    stores: tuple[DocumentStore, DocumentStore],
) -> None:
    anna, ben = stores
    hers = save(anna, "report.txt", SECRET, ["deals"])
    hidden = save(anna, "diary.txt", "Dear diary", ["private"])
    carl = DocumentStore(anna._database, "carl")
    anna.share_collection("deals", "ben")
    assert anna.readers() == {"deals": ["ben"]}
    shared = ben.find(str(hers.id))
    assert shared.collections == ("anna/deals",)
    assert shared.owner == "anna"
    assert ben.text(hers.id) == SECRET
    assert [d.id for d in ben.all(collection="anna/deals")] == [d.id for d in ben.all()]
    assert [c.name for c in ben.collections()] == ["anna/deals"]
    assert hidden.id not in [d.id for d in ben.all(include_superseded=True)]
    assert carl.all() == [] == carl.collections()
    with pytest.raises(StoreError, match="belongs to somebody else"):
        ben.delete(hers.id)
    with pytest.raises(StoreError, match="belongs to somebody else"):
        ben.add_to_collection("mine", [hers.id])
    for change in (ben.dissolve_collection, ben.delete_collection, ben.unshare_collection):
        with pytest.raises(StoreError, match="belongs to anna"):
            change("anna/deals")
    with pytest.raises(StoreError, match="belongs to anna"):
        ben.share_collection("anna/deals", "carl")
    anna.share_collection("deals", EVERYONE)
    assert [d.id for d in carl.all()] == [hers.id]
    anna.unshare_collection("deals")
    assert ben.all() == carl.all() == []
    assert ben.text(hers.id) == ""


def test_a_new_collection_is_shared_with_nobody(
    stores: tuple[DocumentStore, DocumentStore],
) -> None:
    anna, ben = stores
    hers = save(anna, "report.txt", SECRET, ["deals"])
    anna.share_collection("deals", "ben")
    anna.delete(hers.id)  # the collection went with its last document
    again = save(anna, "other.txt", "Other words", ["deals"])
    assert anna.readers() == {}
    assert ben.all() == []
    anna.share_collection("deals", "ben")
    anna.dissolve_collection("deals")
    anna.add_to_collection("deals", [again.id])
    assert ben.all() == []


# ---- asking ------------------------------------------------------------------------------------


def test_answers_come_from_ones_own_documents(anna: Library, ben: Library, tmp_path: Path) -> None:
    for number in range(6):  # theirs lie between each other in the one index
        give(anna, tmp_path, f"a{number}.md", f"# Part {number}\n\n{SECRET}")
        give(ben, tmp_path, f"b{number}.md", f"# Part {number}\n\nBollard {number} is painted red.")
    own = {d.id for d in ben.documents()}
    hits = ben.service()._retriever.retrieve(
        "Where is the zolothurn?", ben.documents(), num_candidates=50
    )
    assert {hit.chunk.document_id for hit in hits} <= own
    assert "zolothurn" not in " ".join(hit.chunk.chunk.text for hit in hits)
    for route in (None, Route.RETRIEVAL, Route.SCAN):
        answer = ben.service().answer("Where is the zolothurn?", route=route)
        assert {c.document for c in answer.citations} <= own
        assert "third bollard" not in str(answer.to_json())
    hers = anna.documents()[0].id
    with pytest.raises(DocumentNotFoundError):
        ben.service().answer("Where?", document_ids=[hers])
    found = anna.service().answer("Where is the zolothurn?", route=Route.RETRIEVAL)
    assert any("zolothurn" in c.quote for c in found.citations)


def test_receipts_are_ones_own(anna: Library, ben: Library, tmp_path: Path) -> None:
    give(anna, tmp_path, "a.md", HANDBOOK)
    given = anna.service().answer("What is the harbour fee?")
    assert anna.receipts.load(given.receipt.id) == given
    for look in (ben.receipts.load, ben.receipts.asked):
        with pytest.raises(DocumentNotFoundError):
            look(given.receipt.id)
    with pytest.raises(DocumentNotFoundError):
        replay(given.receipt.id, ben.receipts, ben.service())
    other = Route.RETRIEVAL if given.receipt.route is Route.FULL else Route.FULL
    anna.service().answer("What is the harbour fee?", route=other)
    assert len(anna.receipts.since("2000")) == 2
    assert anna.receipts.overruled() != []
    assert ben.receipts.since("2000") == []
    assert ben.receipts.overruled() == []


def test_nothing_tells_that_another_has_the_same_file(
    anna: Library, ben: Library, library: Fathom, tmp_path: Path
) -> None:
    first = anna.ingest(write(tmp_path, "secret-name.md", HANDBOOK), source="upload:secret-name.md")
    second = ben.ingest(write(tmp_path, "mine.md", HANDBOOK), source="upload:mine.md")
    assert (first.outcome, second.outcome) == ("added", "added")
    assert "secret" not in second.message
    original = original_path(library.settings, first.document.content_sha256)
    anna.delete(first.document.id)
    assert original.exists()
    assert ben.service().answer("What is the harbour fee?").citations
    assert all(check.passed for check in examine_library(library))
    ben.delete(second.document.id)
    assert not original.exists()
    assert all(check.passed for check in examine_library(library))


def test_an_original_deleted_by_another_while_it_is_saved_is_there_afterwards(
    anna: Library, ben: Library, library: Fathom, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hers = give(anna, tmp_path, "a.md", HANDBOOK)
    save_document = DocumentStore.save

    def save_late(store: DocumentStore, *arguments: object, **options: object) -> Document:
        if store is ben.store:  # his bytes are in their place, his row is not there yet
            anna.delete(hers.id)
        return save_document(store, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(DocumentStore, "save", save_late)
    own = give(ben, tmp_path, "b.md", HANDBOOK)
    assert original_path(library.settings, own.content_sha256).read_text() == HANDBOOK
    assert all(check.passed for check in examine_library(library))


def test_a_kept_document_serves_only_those_who_may_read_it(
    settings: Settings, tmp_path: Path
) -> None:
    keeping = Fathom(settings, embedder=HashEmbedder())
    engine = make_tiny_engine()
    keeping._given_engine = LocalEngine(
        engine._model, engine._tokenizer._tokenizer, name="tiny", document_kv=keeping.document_kv
    )
    for name in ("anna", "ben"):
        keeping.accounts.add(name, PASSWORD)
    anna, ben = keeping.for_owner("anna"), keeping.for_owner("ben")
    hers = give(anna, tmp_path, "handbook.md", HANDBOOK)
    own = give(ben, tmp_path, "handbook.md", HANDBOOK)
    question = "What is the harbour fee?"

    def cached(owner: Library, document: Document) -> int | None:
        answer = owner.service().answer(question, document_ids=[document.id], route=Route.FULL)
        assert answer.receipt.route is Route.FULL
        return answer.receipt.cached_tokens

    assert cached(anna, hers) == 0
    assert cached(ben, own) == 0  # the same bytes under the same name, and yet not hers
    first = cached(ben, own)
    assert first is not None
    assert first > 0
    anna.store.add_to_collection("harbour", [hers.id])
    anna.store.share_collection("harbour", "ben")
    assert cached(ben, hers) == first  # hers, which he may read now
    anna.delete(hers.id)
    assert len(list(settings.document_kv_dir.glob("*.safetensors"))) == 1
    assert cached(ben, own) == first


def test_two_at_once_never_see_each_other(anna: Library, ben: Library, tmp_path: Path) -> None:
    """Both ingest, ask, list and delete side by side; every word that each gets is his own."""
    words = {"anna": "zolothurn", "ben": "quibberish"}
    start = threading.Barrier(2)

    def live(owner: Library) -> list[str]:
        seen: list[str] = []
        other = words["ben" if owner.owner == "anna" else "anna"]
        start.wait()
        for turn in range(4):
            text = f"# Note {turn}\n\nThe {words[owner.owner]} has number {turn}.\n" * 5
            document = give(owner, tmp_path / owner.owner, "note.md", text)
            answer = owner.service().answer(f"Where is the {other}?")
            seen.append(str(answer.to_json()))
            seen += [owner.text(d.id, 0, 10_000) for d in owner.documents()]
            seen += [str(c) for c in owner.store.collections()]
            assert [d.version for d in owner.documents()] == [turn + 1]
            if turn == 2:
                owner.delete(document.id)
                assert owner.documents()[0].version == turn
                give(owner, tmp_path / owner.owner, "note.md", text)
        return seen

    for name in words:
        (tmp_path / name).mkdir()
    with ThreadPoolExecutor(2) as both:
        hers, his = both.map(live, (anna, ben))
    assert "quibberish has" not in " ".join(hers)
    assert "zolothurn has" not in " ".join(his)


def test_a_share_of_the_disk_is_not_exceeded(settings: Settings, tmp_path: Path) -> None:
    small = settings.model_copy(update={"max_documents_per_user": 2, "max_bytes_per_user": 100})
    fathom = Fathom(small, embedder=HashEmbedder())
    owner = fathom.for_owner("anna")
    give(owner, tmp_path, "a.md", "Some words")
    with pytest.raises(QuotaError, match="MiB of files"):
        give(owner, tmp_path, "b.md", "word " * 30)
    give(owner, tmp_path, "b.md", "Other words")
    with pytest.raises(QuotaError, match="you have 2 documents and may keep 2"):
        give(owner, tmp_path, "c.md", "More words")
    assert len(owner.documents()) == 2
    give(fathom, tmp_path, "c.md", "word " * 30)  # whoever runs the machine has no share


# ---- accounts ----------------------------------------------------------------------------------


@pytest.fixture
def accounts(database_url: str) -> Iterator[AccountStore]:
    """Return the accounts of an empty database of each kind."""
    database = Database(database_url)
    yield AccountStore(database)
    database.close()


def test_a_password_lets_in_and_nothing_else_does(accounts: AccountStore) -> None:
    assert not accounts.any()
    accounts.add("anna", PASSWORD)
    assert accounts.any()
    assert accounts.password_is_right("anna", PASSWORD)
    for name, password in (
        ("anna", PASSWORD.upper()),
        ("anna", ""),
        ("anna", PASSWORD + "\0"),
        ("anna", "x" * 10_000),
        ("ben", PASSWORD),
        ("", ""),
        ("anna' OR 1=1 --", PASSWORD),
    ):
        assert not accounts.password_is_right(name, password)
    with accounts._database.read() as connection:
        row = connection.exec_driver_sql("SELECT name, password_hash FROM account").one()
    assert row.password_hash.startswith("$argon2id$v=19$")
    assert PASSWORD not in row.password_hash


@pytest.mark.parametrize(
    ("name", "password", "problem"),
    [
        ("Anna", PASSWORD, "cannot name"),
        ("library", PASSWORD, "cannot name"),
        ("*", PASSWORD, "cannot name"),
        ("a/b", PASSWORD, "cannot name"),
        ("", PASSWORD, "cannot name"),
        ("carl", "short", "has 5 characters; expected 10"),
        ("carl", "", "has 0 characters"),
        ("carl", "x" * 2000, "expected 10 to 1,024"),
        ("anna", PASSWORD, "already"),
    ],
)
@pytest.mark.usefixtures("cheap_hashes")
def test_a_bad_account_is_refused(library: Fathom, name: str, password: str, problem: str) -> None:
    library.accounts.add("anna", PASSWORD)
    with pytest.raises(AccountError, match=problem):
        library.accounts.add(name, password)
    assert [account.name for account in library.accounts.all()] == ["anna"]


@pytest.mark.usefixtures("cheap_hashes")
def test_sessions_and_keys_end_with_the_account(accounts: AccountStore) -> None:
    for name in ("anna", "ben"):
        accounts.add(name, PASSWORD)
    session, key, other = (
        accounts.open_session("anna"),
        accounts.make_key("anna"),
        accounts.make_key("ben"),
    )
    assert accounts.account_of_session(session) == accounts.account_of_key(key) == "anna"
    assert accounts.account_of_session(key) is None  # each in its own place
    assert accounts.account_of_key(session) is None
    assert accounts.account_of_key("") is None
    with accounts._database.read() as connection:
        stored = str(connection.exec_driver_sql("SELECT * FROM credential").all())
    for secret in (session, key, other):
        assert secret not in stored
    accounts.set_password("anna", "another long one")
    assert accounts.account_of_session(session) is None
    assert accounts.account_of_key(key) == "anna"
    assert accounts.password_is_right("anna", "another long one")
    assert not accounts.password_is_right("anna", PASSWORD)
    session = accounts.open_session("anna")
    accounts.close_session(session)
    assert accounts.account_of_session(session) is None
    session = accounts.open_session("anna")
    accounts.remove("anna")
    assert accounts.account_of_session(session) is None
    assert accounts.account_of_key(key) is None
    assert accounts.account_of_key(other) == "ben"
    with pytest.raises(AccountError, match="there are: ben"):
        accounts.open_session("anna")


def test_a_session_expires(accounts: AccountStore, monkeypatch: pytest.MonkeyPatch) -> None:
    accounts.add("anna", PASSWORD)
    monkeypatch.setattr("rag.store.accounts.SESSION_DAYS", -1)
    assert accounts.account_of_session(accounts.open_session("anna")) is None


def test_removing_an_account_removes_what_it_had(
    library: Fathom, anna: Library, ben: Library, tmp_path: Path
) -> None:
    hers = give(anna, tmp_path, "a.md", SECRET)
    give(ben, tmp_path, "b.md", HANDBOOK)
    ben.store.add_to_collection("open", [ben.documents()[0].id])
    ben.store.share_collection("open", "anna")
    given = anna.service().answer("Where is the zolothurn?", document_ids=[hers.id])
    library.remove_account("anna")
    assert not original_path(library.settings, hers.content_sha256).exists()
    assert len(library.everything.all(include_superseded=True)) == 1
    library.accounts.add("anna", PASSWORD)  # somebody else of that name inherits nothing
    again = library.for_owner("anna")
    assert again.documents() == []
    assert again.store.collections() == []
    with pytest.raises(DocumentNotFoundError):
        again.receipts.load(given.receipt.id)
    assert all(check.passed for check in examine_library(library))
    library.accounts.remove("anna")
    give(again, tmp_path, "late.md", SECRET)  # by a request that was running meanwhile
    with pytest.raises(AccountError, match="something of an earlier account"):
        library.accounts.add("anna", PASSWORD)
    library.remove_account("anna")
    library.accounts.add("anna", PASSWORD)
    assert again.documents() == []


def test_the_command_line_keeps_accounts(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    runner = CliRunner()

    def run(*words: str, typed: str = "") -> str:
        done = runner.invoke(app, ["users", *words], input=typed, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    run("add", "anna", "--password-stdin", typed=f"{PASSWORD}\n")
    with pytest.raises(AccountError, match="at a terminal"):
        run("add", "ben")
    key = run("key", "anna").strip()
    assert key.startswith("fathom-")
    assert '"num_keys": 1' in run("list", "--json")
    fathom = Fathom(settings, embedder=HashEmbedder())
    assert fathom.accounts.account_of_key(key) == "anna"
    fathom.store.add_to_collection("open", [give(fathom, tmp_path, "a.md", SECRET).id])
    assert "open: everyone" in run("share", "open", "--with", "everyone")
    assert [c.name for c in fathom.for_owner("anna").store.collections()] == ["library/open"]
    with monkeypatch.context() as patch:
        patch.setenv("FATHOM_USER", "anna")
        found = runner.invoke(app, ["list", "--json"], catch_exceptions=False)
        assert '"collections": ["library/open"]' in found.stdout
        patch.setenv("FATHOM_USER", "nobody")
        with pytest.raises(AccountError, match="there are: anna"):
            runner.invoke(app, ["list"], catch_exceptions=False)
    assert run("share", "open", "--stop") == ""
    assert fathom.for_owner("anna").documents() == []
    run("password", "anna", "--password-stdin", typed="another long one\n")
    assert fathom.accounts.password_is_right("anna", "another long one")
    run("key", "anna", "--revoke")
    assert fathom.accounts.account_of_key(key) is None
    run("remove", "anna", "--yes")
    assert not fathom.accounts.any()


# ---- turns -------------------------------------------------------------------------------------


def test_one_owners_thirty_questions_keep_another_waiting_for_one() -> None:
    queue = FairQueue()
    running = queue.join("anna")
    hers = [queue.join("anna") for _ in range(30)]
    his = queue.join("ben")
    assert next(his.wait(Event())) == Waiting(1)
    assert next(hers[0].wait(Event())) == Waiting(2)
    assert next(hers[29].wait(Event())) == Waiting(31)
    with his, running:
        running.__exit__(None, None, None)
        assert list(his.wait(Event())) == []  # it is his turn
    assert list(hers[0].wait(Event())) == []
    assert queue.num_waiting == 29


def test_turns_are_shared_by_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has had the model for long waits until the others have had as much."""
    clock = [0.0]
    monkeypatch.setattr("ui.fair_queue.time.monotonic", lambda: clock[0])
    queue = FairQueue()
    turns = {queue.join("anna"): 100.0 for _ in range(2)}
    turns |= {queue.join("ben"): 10.0 for _ in range(12)}
    order: list[str] = []
    while queue.is_running:
        turn = queue._running
        assert isinstance(turn, Ticket)
        order.append(turn.owner)
        clock[0] += turns[turn]
        queue._leave(turn)
    assert order == ["anna", *["ben"] * 10, "anna", *["ben"] * 2]
    assert queue._seconds == {}


def test_too_many_questions_of_one_owner_are_refused() -> None:
    queue = FairQueue()
    turns = [queue.join("anna") for _ in range(MAX_WAITING_EACH + 1)]
    with pytest.raises(QuotaError, match=f"{MAX_WAITING_EACH} questions of yours"):
        queue.join("anna")
    queue.join("ben")
    for turn in turns:
        queue._leave(turn)
    assert queue.num_waiting == 0


def test_a_question_that_is_called_off_gives_its_place_up() -> None:
    queue = FairQueue()
    running, second, third = (queue.join(name) for name in ("anna", "ben", "carl"))
    stop = Event()
    with second:
        assert next(second.wait(stop)) == Waiting(1)
        stop.set()
        assert list(second.wait(stop)) == []
    assert next(third.wait(Event())) == Waiting(1)
    queue._leave(running)
    assert list(third.wait(Event())) == []


def test_thirty_questions_at_once_are_all_answered(
    anna: Library, ben: Library, library: Fathom, tmp_path: Path
) -> None:
    for owner in (anna, ben):
        give(owner, tmp_path, "handbook.md", HANDBOOK)
    ended: list[str] = []

    def ask(owner: Library) -> Answer:
        answer = next(
            event.answer
            for event in owner.stream("What is the harbour fee?", route=Route.RETRIEVAL)
            if not isinstance(event, Waiting) and hasattr(event, "answer")
        )
        ended.append(owner.owner)
        return answer

    library.service()
    with ThreadPoolExecutor(31) as pool:
        hers = [pool.submit(ask, anna) for _ in range(25)]
        his = [pool.submit(ask, ben) for _ in range(5)]
        answers = [done.result() for done in hers + his]
    assert len({answer.receipt.id for answer in answers}) == 30
    for owner, done in ((anna, hers), (ben, his)):
        own = {d.id for d in owner.documents()}
        assert all({c.document for c in d.result().citations} <= own for d in done)
    assert library.queue.num_waiting == 0
    assert not library.queue.is_running
    assert "ben" not in ended[-8:]  # his five went between hers
