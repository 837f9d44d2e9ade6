"""Batches on the server: whose they are, how they go on, what is left of them."""

import csv
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from openpyxl import load_workbook

from conftest import HANDBOOK, HashEmbedder
from eval.batch_journal import Journal
from rag.errors import TableError
from rag.lm.local_engine import LocalEngine
from rag.settings import Settings
from rag.store.receipts import REDACTED
from served import serving
from test_app import an_answer
from ui.assembly import Fathom
from ui.batch_folder import Batch, State
from ui.tabs.batch import batches_html, head_html, progress_html, rows_html

pytestmark = pytest.mark.usefixtures("cheap_hashes")
ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = """id,question,document,remark
fee,What is the harbour fee?,handbook.md,=1+1
lost,Where is the log?,no-such-file.pdf,
empty,,,
berths,How many berths has the quay?,,kept
"""


@pytest.fixture
def url(library: Fathom) -> Iterator[str]:
    """Serve a library in which anna and ben have accounts."""
    for name in ("anna", "ben"):
        library.accounts.add(name, "correct horse battery")
    with serving(library) as address:
        yield address


@pytest.fixture
def client(library: Fathom, url: str) -> Iterator[Callable[[str], httpx.Client]]:
    """Return a function from a name to an HTTP client with a key."""
    opened: list[httpx.Client] = []

    def of(name: str) -> httpx.Client:
        headers = {"Authorization": f"Bearer {library.accounts.make_key(name)}"}
        opened.append(httpx.Client(base_url=url, headers=headers, timeout=60))
        return opened[-1]

    yield of
    for http in opened:
        http.close()


def give_handbook(http: httpx.Client) -> int:
    """Upload the handbook and return its number."""
    sent = http.post("/v1/documents", files=[("files", ("handbook.md", HANDBOOK))])
    return int(sent.json()[0]["document"]["id"])


def until_ended(http: httpx.Client, batch_id: str) -> dict[str, Any]:
    """Wait until a batch neither waits nor runs, and return its state."""
    while True:
        told: dict[str, Any] = http.get(f"/v1/batches/{batch_id}").raise_for_status().json()
        if told["state"] not in ("waiting", "running"):
            return told
        time.sleep(0.05)


def test_a_table_in_a_table_out_and_nobody_else_sees_it(
    library: Fathom, client: Callable[[str], httpx.Client]
) -> None:
    anna, ben = client("anna"), client("ben")
    nothing = anna.post("/v1/batches", json={"rows": [{"question": "What?"}]})
    assert nothing.status_code == 409
    give_handbook(anna)
    files = {"file": ("due diligence.csv", QUESTIONS)}
    made = anna.post("/v1/batches/file", files=files, data={"start": "false"})
    assert made.status_code == 201, made.text
    told = made.json()
    assert (told["state"], told["rows"], told["answered"]) == ("ready", 4, 0)
    assert [fault["row"] for fault in told["faults"]] == [2, 3]
    batch = f"/v1/batches/{told['id']}"
    for method, path in (
        ("GET", batch),
        ("GET", f"{batch}/result"),
        ("POST", f"{batch}/start"),
        ("POST", f"{batch}/stop"),
        ("DELETE", batch),
    ):
        assert ben.request(method, path).status_code == 404
    assert ben.get("/v1/batches").json() == []

    anna.post(f"{batch}/start")
    told = until_ended(anna, told["id"])
    assert (told["state"], told["answered"], told["problem"]) == ("done", 2, None)
    assert [fault["row"] for fault in told["faults"]] == [2, 3]
    rows = [json.loads(line) for line in anna.get(f"{batch}/result").text.splitlines()]
    assert [row["id"] for row in rows] == ["fee", "lost", "empty", "berths"]
    assert [bool(row["answer"]) for row in rows] == [True, False, False, True]
    assert "no-such-file.pdf" in rows[1]["error"]
    saved = anna.get(f"{batch}/result", params={"format": "csv"})
    assert "due%20diligence-answers.csv" in saved.headers["content-disposition"]
    (fee, *_) = csv.DictReader(io.StringIO(saved.content.decode("utf-8-sig")))
    assert fee["answer"] == rows[0]["answer"]
    assert not fee["remark"].startswith("=")
    book = load_workbook(io.BytesIO(anna.get(f"{batch}/result?format=xlsx").content))
    assert book.sheetnames == ["answers", "citations"]

    receipt = f"/v1/receipts/{rows[0]['receipt']}"
    assert anna.get(receipt).status_code == 200
    assert anna.delete(batch).status_code == 204
    assert anna.get(receipt).status_code == 404
    assert anna.get("/v1/batches").json() == []
    assert list((library.settings.home / "batches").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.pdf", b"x", "a.pdf"),
        ("a.csv", b"name\nx\n", "no column 'question'"),
        ("a.csv", b"question\n", "no row"),
        ("a.xlsx", b"no archive", "a.xlsx"),
    ],
)
def test_what_is_no_table_of_questions_leaves_nothing(
    library: Fathom, client: Callable[[str], httpx.Client], name: str, content: bytes, said: str
) -> None:
    refused = client("anna").post("/v1/batches/file", files={"file": (name, content)})
    assert refused.status_code == 422
    assert refused.json()["error"]["type"] == "TableError"
    assert said in refused.text
    assert str(library.settings.home) not in refused.text
    assert list((library.settings.home / "batches").iterdir()) == []


def test_a_server_that_ends_goes_on_and_asks_no_row_twice(
    settings: Settings, tiny_engine: LocalEngine, handbook: Path
) -> None:
    rows = "".join(f"{json.dumps({'question': f'What is fee {n}?'})}\n" for n in range(12))
    first = Fathom(settings, embedder=HashEmbedder(), engine=tiny_engine)
    first.ingest(handbook)
    batch = first.batches.create("q.jsonl", rows.encode())
    first.batches.start(batch.id)
    while first.batches.told(batch)["answered"] < 2:
        time.sleep(0.01)
    first.batch_runs.close()
    left = first.batches.find(batch.id)
    assert left.state is State.RUNNING
    assert 2 <= left.num_answered < 12

    (settings.home / "batches" / ".new-killed").mkdir()
    second = Fathom(settings, embedder=HashEmbedder(), engine=tiny_engine)
    second.ingest(handbook.rename(handbook.with_name("another.md")))  # known: asked of no more
    second.batch_runs.go_on()
    while second.batches.find(batch.id).state is not State.DONE:
        time.sleep(0.01)
    second.batch_runs.close()
    assert [path.name for path in (settings.home / "batches").iterdir()] == [batch.id]
    table, questions, outcomes = second.batches.outcomes(second.batches.find(batch.id))
    assert len(table.rows) == len(questions) == len(outcomes) == 12
    with second.database.read() as connection:
        asked = [row.question for row in connection.exec_driver_sql("SELECT question FROM answer")]
    assert sorted(set(asked)) == sorted(question.text for question in questions)
    assert len(asked) <= 13  # the row that was being answered may have been half


# A server that answers two rows of the batch that it finds, and then hangs until it is killed.
HANGS = """
import sys, threading
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[2]]
from conftest import HashEmbedder, make_tiny_engine
from rag.settings import Settings
from ui.assembly import Fathom
engine = make_tiny_engine()
fathom = Fathom(Settings(home=Path(sys.argv[3]), max_new_tokens=16, kv_reserve_bytes=0),
                embedder=HashEmbedder(), engine=engine)
(batch,) = fathom.batches.all()
def count(*_):
    if fathom.batches.told(batch)["answered"] == 2:
        print("hangs", flush=True)
        threading.Event().wait()
engine._model.register_forward_pre_hook(count)
fathom.batches.start(batch.id)
threading.Event().wait()
"""


def test_of_two_servers_one_answers_and_the_other_goes_on_when_it_is_killed(
    settings: Settings,
    tiny_engine: LocalEngine,
    handbook: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = "".join(f"{json.dumps({'question': f'What is fee {n}?'})}\n" for n in range(6))
    here = Fathom(settings, embedder=HashEmbedder(), engine=tiny_engine)
    here.ingest(handbook)
    batch = here.batches.create("q.jsonl", rows.encode())
    monkeypatch.setattr("ui.batch_runs._CLAIM_SECONDS", 0.05)
    looks: list[bool] = []
    claimed = here.batch_runs.folders.claimed

    @contextmanager
    def counted(batch: Batch) -> Iterator[bool]:
        with claimed(batch) as is_ours:
            looks.append(is_ours)
            yield is_ours

    monkeypatch.setattr(here.batch_runs.folders, "claimed", counted)
    arguments = [str(ROOT), str(ROOT / "tests"), str(settings.home)]
    there = subprocess.Popen(
        [sys.executable, "-c", HANGS, *arguments], stdout=subprocess.PIPE, text=True
    )
    try:
        assert there.stdout is not None
        assert there.stdout.readline() == "hangs\n"
        here.batch_runs.go_on()
        while len(looks) < 3:
            time.sleep(0.01)
        assert not any(looks)
        held = here.batches.find(batch.id)
        assert (held.state, held.problem) == (State.RUNNING, None)
        assert len(here.batches.outcomes(held)[2]) == 2  # it can be looked at
        assert here.batch_runs.run_of(batch) is None
    finally:
        there.kill()
        there.communicate()
    while here.batches.find(batch.id).state is not State.DONE:
        time.sleep(0.01)
    here.batch_runs.close()
    assert len(here.batches.outcomes(here.batches.find(batch.id))[2]) == 6
    with here.database.read() as connection:
        asked = [row.question for row in connection.exec_driver_sql("SELECT question FROM answer")]
    assert sorted(asked) == sorted(f"What is fee {n}?" for n in range(6))


def test_what_another_server_stops_or_deletes_ends_after_the_row(
    settings: Settings, tiny_engine: LocalEngine, handbook: Path
) -> None:
    rows = "".join(f"{json.dumps({'question': f'What is fee {n}?'})}\n" for n in range(400))
    one, other = (Fathom(settings, embedder=HashEmbedder(), engine=tiny_engine) for _ in "12")
    one.ingest(handbook)
    batch = one.batches.create("q.jsonl", rows.encode())
    for end in (other.batches.stop, other.batches.delete):
        one.batches.start(batch.id)
        while (run := one.batch_runs.run_of(batch)) is None or not run.num_done:
            time.sleep(0.01)
        end(batch.id)
        while one.batch_runs.run_of(batch) is not None:
            time.sleep(0.01)
        assert run.num_left > 0
        left = one.batches.all()
        assert [one.state for one in left] == ([State.STOPPED] if left else [])
    assert left == []
    assert list((settings.home / "batches").iterdir()) == []
    one.batch_runs.close()
    with one.database.read() as connection:
        assert list(connection.exec_driver_sql("SELECT question FROM answer")) == []


def test_a_question_waits_for_one_row_and_not_for_the_batch(
    library: Fathom, client: Callable[[str], httpx.Client]
) -> None:
    anna, ben = client("anna"), client("ben")
    for http in (anna, ben):
        give_handbook(http)
    rows = [{"question": f"What is fee {number}?"} for number in range(60)]
    batch = anna.post("/v1/batches", json={"rows": rows}).json()["id"]
    second = anna.post("/v1/batches", json={"rows": rows[:1]}).json()["id"]
    while not (before := anna.get(f"/v1/batches/{batch}").json()["answered"]):
        time.sleep(0.02)
    assert ben.post("/v1/questions", json={"question": "What is the fee?"}).status_code == 200
    told = anna.get(f"/v1/batches/{batch}").json()
    assert told["state"] == "running"
    assert told["answered"] - before <= 5
    assert told["seconds_left"] > 0
    assert anna.get(f"/v1/batches/{second}").json()["state"] == "waiting"
    assert anna.post(f"/v1/batches/{batch}/stop").status_code == 200
    assert until_ended(anna, batch)["state"] == "stopped"
    assert until_ended(anna, second)["state"] == "done"


def test_what_a_deleted_document_said_leaves_the_batches(
    library: Fathom, client: Callable[[str], httpx.Client]
) -> None:
    anna = client("anna")
    number = give_handbook(anna)
    asked = {"rows": [{"question": "What is the harbour fee?", "route": "retrieval"}]}
    batch = anna.post("/v1/batches", json=asked).json()["id"]
    assert until_ended(anna, batch)["state"] == "done"
    assert anna.delete(f"/v1/documents/{number}").status_code == 204
    (row,) = map(json.loads, anna.get(f"/v1/batches/{batch}/result").text.splitlines())
    assert row["answer"] == REDACTED
    kept = b"".join(
        path.read_bytes()
        for path in (library.settings.home / "batches").rglob("*")
        if path.is_file()
    )
    assert b"handbook.md" not in kept
    anna.post(f"/v1/batches/{batch}/start")  # it has its answer, and is not asked again
    assert until_ended(anna, batch)["answered"] == 1
    library.remove_account("anna")
    assert list((library.settings.home / "batches").iterdir()) == []


def test_words_that_must_go_leave_an_open_journal_and_it_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    answers = {name: an_answer(f"The {name} fee.", quote=f"{name}!") for name in ("old", "kept")}
    with Journal(path) as journal:
        for name, answer in answers.items():
            journal.add(name, "key", answer)
        journal.rewrite(lambda answer: an_answer("-") if "old" in answer.answer else answer)
        journal.add("new", "key", answers["kept"])
        with pytest.raises(TableError, match="another process"):
            Journal(path)
    assert b"old!" not in path.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["a.journal"]
    with Journal(path) as journal:
        latest = [journal.latest(name) for name in ("old", "kept", "new")]
        assert latest == [an_answer("-"), answers["kept"], answers["kept"]]


def test_hostile_words_in_a_batch_are_shown_and_do_nothing(
    settings: Settings, tiny_engine: LocalEngine, handbook: Path
) -> None:
    hostile = "<img src=http://evil.example/x.png onerror=alert(1)>"
    fathom = Fathom(settings, embedder=HashEmbedder(), engine=tiny_engine)
    fathom.ingest(handbook)
    rows = [{"question": hostile, "id": hostile}, {"question": "?", "id": "2", "route": hostile}]
    content = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    batch = fathom.batches.create(f"{hostile}.jsonl", content)
    told = fathom.batches.told(batch) | {"now": hostile, "answered": 1}
    _, questions, outcomes = fathom.batches.outcomes(batch)
    running = replace(batch, state=State.RUNNING)
    shown = (
        head_html(batch, told),
        progress_html(running, told),
        rows_html(batch, questions, outcomes),
        batches_html([batch], batch.id),
    )
    for html in shown:
        assert "evil" in html
        assert "<img" not in html
        assert "://" not in html
