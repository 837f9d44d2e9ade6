"""A table of questions in, a table of answers out: whole-table faults, bad rows, kills, links."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from openpyxl import load_workbook

from conftest import HANDBOOK
from eval.batch import read_questions
from eval.batch_journal import Journal, journal_path
from eval.batch_output import ANSWER_COLUMNS, CITATION_COLUMNS, answer_row, answer_tables
from eval.bench.batch import bench_batch, card, documents_that_fit
from eval.evidence_sets import EvidenceQuestion
from eval.tables import Table, read_table, write_table
from rag.errors import ReadError
from rag.types import Answer, AnswerMode, Citation, Document, Route
from test_cli import ROOT, needs_models
from ui.assembly import Fathom
from ui.cli import main

FERRIES = """# Ferries

The ferry to the island leaves at nine. A ticket costs 12 crowns.
The last ferry returns at six in the evening.
"""

Run = Callable[..., tuple[int, list[dict[str, Any]], str]]


@pytest.fixture
def two_documents(small_fathom: Fathom, tmp_path: Path) -> Fathom:
    (tmp_path / "ferries.md").write_text(FERRIES)
    small_fathom.ingest(tmp_path / "ferries.md")
    return small_fathom


@pytest.fixture
def run(
    two_documents: Fathom, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Return the command itself over the tiny models: exit code, rows told, stderr."""
    monkeypatch.setattr("ui.verbs.batch.open_fathom", lambda _: two_documents)

    def call(*arguments: object) -> tuple[int, list[dict[str, Any]], str]:
        monkeypatch.setattr(sys, "argv", ["fathom", "batch", *map(str, arguments), "--json"])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        told = capsys.readouterr()
        return code, [json.loads(line) for line in told.out.splitlines()], told.err

    return call


def rows_of(*questions: Any, **columns: Sequence[Any]) -> list[dict[str, Any]]:  # noqa: ANN401
    return [
        {"question": question, **{name: cells[n] for name, cells in columns.items()}}
        for n, question in enumerate(questions)
    ]


def save(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    write_table(path, Table(tuple(dict.fromkeys(n for row in rows for n in row)), tuple(rows)))
    return path


# ---- the table as a whole ------------------------------------------------------------------------


def test_faults_of_the_whole_table_are_said_before_the_library_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(_: object) -> None:
        raise AssertionError("the library was opened")

    monkeypatch.setattr("ui.verbs.batch.open_fathom", never)
    good = save(tmp_path / "good.csv", rows_of("Who?", "What?"))
    (tmp_path / "theirs.csv").write_text("something else")
    (tmp_path / "empty.csv").write_text("question\n")
    (tmp_path / "damaged.xlsx").write_bytes(b"no zip")
    twice = save(tmp_path / "twice.csv", rows_of("Who?", "What?", id=["a", "a"]))
    without = save(tmp_path / "without.csv", rows_of("Who?", "What?", id=["a", ""]))
    other = save(tmp_path / "other.csv", [{"frage": "Wer?"}])
    two = save(tmp_path / "two.csv", [{"question": "Who?", "Question": "What?"}])
    again = save(tmp_path / "again.csv", [{"question": "?", "answer": "", "answer (in)": ""}])
    out = tmp_path / "out.csv"
    for source, output, words in (
        (tmp_path / "none.csv", out, "there is no file"),
        (tmp_path / "damaged.xlsx", out, "cannot be read as a table"),
        (other, out, "there is no column 'question'; found are: frage"),
        (two, out, "may both be meant by 'question'"),
        (tmp_path / "empty.csv", out, "has no row"),
        (twice, out, "rows 1 and 2 below the header have the same id 'a'"),
        (without, out, "the first is row 2 below the header"),
        (again, out, "two columns would be called 'answer (in)'"),
        (good, good, "is the table of the questions"),
        (good, tmp_path / "theirs.csv", "is there already"),
        (good, tmp_path / "none" / "out.csv", "nothing can be written"),
        (good, tmp_path / "out.doc", "no table that can be read or written"),
    ):
        monkeypatch.setattr(sys, "argv", ["fathom", "batch", str(source), "-o", str(output)])
        with pytest.raises(SystemExit) as end:
            main()
        told = capsys.readouterr()
        assert end.value.code == 1, words
        assert words in told.err
        assert "hint: " in told.err
        assert told.out == ""
    assert not out.exists()
    assert (tmp_path / "theirs.csv").read_text() == "something else"


# ---- rows ----------------------------------------------------------------------------------------


def test_rows_are_answered_and_bad_ones_say_what_to_do(run: Run, tmp_path: Path) -> None:
    rows = rows_of(
        "What is the harbour fee?",
        "",
        "When does the ferry leave?",
        "What does a ticket cost?",
        "How many berths has the quay?",
        "Which ferry is the last?",
        "Is there a beacon?",
        id=[10, 20, 30, 40, 50, 60, 70],
        document=["handbook.md", None, 2.0, "nowhere.md", "1; 2", None, "ferries.md"],
        route=["full", None, "Retrieval", None, "", "by boat", "auto"],
        answer=["35 crowns", "", "nine", "12 crowns", "twelve", "six", "=no"],
    )
    source = save(tmp_path / "in.xlsx", rows)
    code, told, words = run(source, "-o", tmp_path / "out.jsonl")
    assert code == 1
    found = read_table(tmp_path / "out.jsonl")
    carried = ("question", "id", "document", "route (in)", "answer (in)")
    assert found.columns == (*carried, *ANSWER_COLUMNS)
    assert [row["id"] for row in found.rows] == [10, 20, 30, 40, 50, 60, 70]
    assert [row["answer (in)"] for row in found.rows][-1] == "=no"
    by_id = {row["id"]: row for row in found.rows}
    for number, problem in (
        (20, "the question is empty; write one"),
        (40, "no document 'nowhere.md'; there are 2: 1 'handbook.md', 2 'ferries.md'; fathom list"),
        (60, "there is no route 'by boat'; give full, retrieval, scan"),
    ):
        assert problem in by_id[number]["error"]
        assert by_id[number]["answer"] is by_id[number]["receipt"] is None
    for number, route in ((10, "full"), (30, "retrieval"), (50, None), (70, None)):
        row = by_id[number]
        assert row["error"] is None
        assert row["answer"]
        assert len(row["receipt"]) == 12
        assert row["tokens"] > 0
        assert row["seconds"] > 0
        assert route in (None, row["route"])
    # What was told row by row is what stands in the table; the summary is for people.
    assert {row["id"]: row for row in told} == by_id
    assert "4 of 7 rows answered" in words
    assert "3 with an error" in words


def test_two_documents_of_one_title_are_told_apart_by_number(
    run: Run, two_documents: Fathom, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "ferries.md").write_text("Another company's ferries leave at ten.")
    two_documents.ingest(tmp_path / "other" / "ferries.md")
    rows = rows_of("When?", "When?", document=["ferries.md", 3])
    code, _, _ = run(save(tmp_path / "in.jsonl", rows), "-o", tmp_path / "out.jsonl")
    first, second = read_table(tmp_path / "out.jsonl").rows
    assert code == 1
    assert "2 documents are titled 'ferries.md': numbers 2, 3; give the number" in first["error"]
    assert second["error"] is None


def test_each_document_is_prefilled_once(run: Run, tmp_path: Path) -> None:
    """Rows about two documents lie mixed; all but the first of each find it read already."""
    questions = [f"What is said about {word}?" for word in "fees berths lights ferries".split()]
    rows = rows_of(*questions, *questions, document=[1, 2] * 4)
    code, _, _ = run(save(tmp_path / "in.csv", rows), "-o", tmp_path / "o.jsonl", "--route", "full")
    assert code == 0
    found = read_table(tmp_path / "o.jsonl").rows
    assert [row["route"] for row in found] == ["full"] * 8
    for document in "12":
        cached = [row["cached_tokens"] for row in found if row["document"] == document]
        assert sorted(map(bool, cached)) == [False, True, True, True]


def test_a_table_without_ids_counts_and_names_default_documents(run: Run, tmp_path: Path) -> None:
    source = save(tmp_path / "in.csv", rows_of("When?", "Who?"))
    code, told, _ = run(source, "-o", tmp_path / "o.csv", "-d", "ferries.md", "--route", "full")
    assert code == 0
    assert [row["id"] for row in told] == ["1", "2"]
    assert list(read_table(tmp_path / "o.csv").columns)[:3] == ["id", "question", "answer"]
    cited = [c["title"] for row in told for c in row["citations"] or ()]
    assert set(cited) <= {"ferries.md"}


# ---- going on ------------------------------------------------------------------------------------


def num_receipts(fathom: Fathom) -> int:
    return len(fathom.receipts.since(""))


def test_the_same_command_asks_only_what_has_no_answer(
    run: Run, two_documents: Fathom, tmp_path: Path
) -> None:
    source, output = tmp_path / "in.csv", tmp_path / "out.csv"
    save(source, rows_of("When?", "Who?", "What?", document=["1", "2", "gone.md"]))
    assert run(source, "-o", output)[0] == 1
    assert num_receipts(two_documents) == 2
    # Nothing has changed: the row with an error is tried again, no answer is asked for.
    code, told, words = run(source, "-o", output)
    assert (code, num_receipts(two_documents)) == (1, 2)
    assert "2 of 3 rows answered before" in words
    assert len(told) == 3
    # What was wrong is mended.
    (tmp_path / "gone.md").write_text("Here is what was missing.")
    two_documents.ingest(tmp_path / "gone.md")
    assert run(source, "-o", output)[0] == 0
    assert num_receipts(two_documents) == 3
    # A question that reads otherwise, and a document of other content, are asked again.
    save(source, rows_of("When?", "Who, then?", "What?", document=["1", "2", "gone.md"]))
    (tmp_path / "gone.md").write_text("Here is something else.")
    two_documents.ingest(tmp_path / "gone.md")
    code, _, words = run(source, "-o", output)
    assert (code, num_receipts(two_documents)) == (0, 5)
    assert "2 rows asked again: the question, its documents or the model are others" in words
    # --fresh asks all.
    assert run(source, "-o", output, "--fresh")[0] == 0
    assert num_receipts(two_documents) == 8


def test_a_second_process_and_a_strange_journal_are_refused(run: Run, tmp_path: Path) -> None:
    source, output = save(tmp_path / "in.csv", rows_of("When?")), tmp_path / "out.csv"
    with Journal(journal_path(output)):
        code, _, words = run(source, "-o", output)
    assert (code, "another process is answering" in words) == (1, True)
    for content, expected in (
        ("my own diary\n", "is no journal of a batch"),
        ('{"format": "fathom batch 1", "began": ""}\n{"id": "1"}\n', "line 2 is damaged"),
    ):
        journal_path(output).write_text(content)
        code, _, words = run(source, "-o", output)
        assert (code, expected in words) == (1, True), words
        assert journal_path(output).read_text() == content
    assert not output.exists()


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(
    run: Run, two_documents: Fathom, tmp_path: Path
) -> None:
    questions = [f"What is said about number {n}?" for n in range(80)]
    source = save(tmp_path / "in.csv", rows_of(*questions, document=["1", "2"] * 40))
    output = tmp_path / "out.csv"

    def interrupt() -> None:
        while num_lines(journal_path(output)) < 5:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = Thread(target=interrupt, daemon=True)
    thread.start()
    code, told, words = run(source, "-o", output)
    thread.join()
    assert code == 130
    assert "the same command goes on from there" in words
    rows = read_table(output).rows
    answered = [row for row in rows if row["receipt"]]
    assert 3 <= len(answered) == len(told) < 80
    assert {row["error"].split(":")[0] for row in rows if not row["receipt"]} == {"not asked yet"}
    assert run(source, "-o", output)[0] == 0
    rows_after = {row["question"]: row for row in read_table(output).rows}
    assert all(row["receipt"] for row in rows_after.values())
    for row in answered:
        assert rows_after[row["question"]]["receipt"] == row["receipt"]
    for question, row in list(rows_after.items())[::4]:  # none is the half of an answer
        alone = two_documents.service().answer(question, document_ids=[int(row["document"])])
        assert row["answer"] == alone.answer


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_batch_killed_while_it_writes_down_an_answer_asks_no_row_twice(tmp_path: Path) -> None:
    questions = [f"What is said about number {n}?" for n in range(6)]
    save(tmp_path / "questions.jsonl", rows_of(*questions))
    (tmp_path / "handbook.md").write_text(HANDBOOK)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("batch_lab.py")), str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    deaths = [json.loads(line) for line in done.stdout.splitlines()]
    assert [death["place"] for death in deaths] == ["before", "within", "after"]
    for death in deaths:
        assert death["killed"], death
        assert death["written_down"] == (3 if death["place"] == "after" else 2), death
        assert death["again"] == 0, (death, done.stderr)
        assert death["asked"] == questions, death
        rows = read_table(tmp_path / f"{death['place']}.jsonl").rows
        assert sorted(row["receipt"] for row in rows) == death["receipts"]


@needs_models
@pytest.mark.model
def test_fifty_rows_with_a_real_model_killed_and_gone_on_with(tmp_path: Path) -> None:
    """A spreadsheet in, a spreadsheet out, through the command line, with kill -9 in between."""
    for name, text in (("handbook.md", HANDBOOK), ("ferries.md", FERRIES)):
        (tmp_path / name).write_text(text)
    environment = {
        "FATHOM_HOME": str(tmp_path / "home"),
        "FATHOM_MODEL": "smollm2-135m",
        "FATHOM_MAX_NEW_TOKENS": "6",
        "FATHOM_ANSWER_MODE": "free",
        "FATHOM_PREFILL_DEADLINE_SECONDS": "100000",
    }
    asked = [f"What does the text say about {word}?" for word in WORDS]
    rows = rows_of(
        *asked,
        id=[f"q{n}" for n in range(50)],
        document=["handbook.md", "ferries.md"] * 25,
        owner=["=HYPERLINK(1)", "007"] * 25,
    )
    rows[7]["question"], rows[30]["document"] = "  ", "lost.md"
    source, output = save(tmp_path / "in.xlsx", rows), tmp_path / "out.xlsx"

    def command(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "ui.cli", *arguments],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    ingest = command("ingest", str(tmp_path / "handbook.md"), str(tmp_path / "ferries.md"))
    assert ingest.communicate()[1] is not None
    assert ingest.returncode == 0
    first = command("batch", str(source), "-o", str(output), "--json")
    while num_lines(journal_path(output)) < 7 and first.poll() is None:
        time.sleep(0.01)
    first.kill()
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    assert not output.exists()
    before = num_lines(journal_path(output)) - 2  # its form, and when the run began
    assert 5 <= before < 48

    second = command("batch", str(source), "-o", str(output))
    told, words = second.communicate()
    assert second.returncode == 1, words
    assert "48 of 50 rows answered" in told
    assert "2 with an error" in told
    book = load_workbook(output)
    assert book.sheetnames == ["answers", "citations"]
    header, *cells = book["answers"].iter_rows(values_only=True)
    found = [dict(zip(header, row, strict=True)) for row in cells]
    assert [row["id"] for row in found] == [f"q{n}" for n in range(50)]
    assert "the question is empty" in found[7]["error"]
    assert "no document 'lost.md'" in found[30]["error"]
    assert sum(row["error"] is None for row in found) == 48
    # No question has a second receipt.
    fathom = Fathom(_settings(tmp_path / "home"))
    receipts = Counter(question for _, question, _ in fathom.receipts.since(""))
    assert receipts == Counter(a for n, a in enumerate(asked) if n not in (7, 30))
    for row in found:
        if row["receipt"]:
            assert fathom.receipts.load(row["receipt"]).answer == row["answer"]
    # All but the first row of each document and run found its document read already.
    assert sum(row["cached_tokens"] == 0 for row in found if row["receipt"]) <= 4
    _links_lead_there_and_back(book)
    owners = [book["answers"].cell(n, header.index("owner") + 1) for n in range(2, 52)]
    assert {cell.data_type for cell in owners} == {"s"}


WORDS = """
    ships harbour office arrival berths quay pilot boat radio channel fees night children ten lights
    beacon north south green red ferry island nine ticket crowns last returns six evening booked
    kept free twelve seven fourteen flashes seconds four under pay nothing report market rope anchor
    storm fog bell tide whale
""".split()


def _settings(home: Path) -> Any:  # noqa: ANN401
    from rag.settings import Settings

    return Settings(home=home)


def _links_lead_there_and_back(book: Any) -> None:  # noqa: ANN401 - a workbook
    answers, citations = book["answers"], book["citations"]
    column = [cell.value for cell in answers[1]].index("citations") + 1
    names = [cell.value for cell in citations[1]]
    assert tuple(names) == CITATION_COLUMNS
    linked = [
        cell
        for (cell,) in answers.iter_rows(min_row=2, min_col=column, max_col=column)
        if cell.hyperlink
    ]
    assert linked
    for cell in linked:
        sheet, target = cell.hyperlink.location.split("!")
        assert sheet == "'citations'"
        first = citations[target]
        assert citations.cell(first.row, names.index("quote") + 1).value[:20] in cell.value
        back = first.hyperlink.location.split("!")
        assert back == ["'answers'", f"A{cell.row}"]
        assert first.value == answers.cell(cell.row, 2).value
        document = citations.cell(first.row, names.index("document") + 1)
        assert document.hyperlink.target.startswith("file:///")
        assert document.hyperlink.target.endswith(document.value)


# ---- the answers as a table ----------------------------------------------------------------------


@pytest.fixture
def answer(small_fathom: Fathom) -> Answer:
    return small_fathom.service().answer("What is the harbour fee?", route=Route.FULL)


@pytest.mark.parametrize(
    ("text", "mode", "route", "abstained", "confidence"),
    [
        ("It is 35 crowns. [1] It is blue. [unverified]", "written", "full", False, 0.5),
        ("It is blue. [unverified] It is 35 crowns. [1]", "written", "full", False, 0.5),
        ("It is 35 crowns, says Mr. Bell. [1]", "written", "full", False, 1.0),
        ("It is 35 crowns. [1] So it is. [2]", "written", "retrieval", False, 1.0),
        (
            "It is blue. [unverified] The nearest sentence found: [1]",
            "written", "full", False, 0.0,
        ),
        ("Not found. The nearest sentence found: [1]", "written", "full", True, None),
        ("35 crowns: “The fee is 35 crowns.” [1]", "quoted", "retrieval", False, None),
        ("There are 12 rows. [1]", "counted", "scan", False, 1.0),
        ("- one [1] - two [2]", "written", "scan", False, None),
        ("35", "written", "full", False, None),
    ],
)  # fmt: skip
def test_confidence_is_the_share_of_supported_statements_or_nothing(
    answer: Answer, text: str, mode: str, route: str, abstained: bool, confidence: float | None
) -> None:
    receipt = replace(answer.receipt, mode=AnswerMode(mode), route=Route(route))
    given = replace(answer, answer=text, abstained=abstained, receipt=receipt)
    (question,) = read_questions(Table(("question",), ({"question": "?"},)))
    row = answer_row({"question": "?"}, question, given, ("question",))
    assert row["confidence"] == confidence


def test_citations_are_words_lists_or_a_sheet(answer: Answer) -> None:
    citation = Citation(
        1, 7, "a.pdf", 2, 12, "Fees", 30, 51, "The fee\nis 35 crowns.", verified=True
    )
    second = replace(citation, marker=2, page=3, version=1, section=None)
    given = replace(answer, citations=(citation, second))
    table = Table(("question",), ({"question": "?"}, {"question": "!"}))
    questions = read_questions(table)
    for source, url in (
        (str(Path(__file__).resolve()), Path(__file__).resolve().as_uri() + "#page=12"),
        ("https://example.com/a.pdf", "https://example.com/a.pdf"),
        ("upload:a.pdf", None),
        (None, None),
    ):
        answers, cited = answer_tables(
            table, questions, {1: given}, holds_lists=False, source_of={7: source}.get
        )
        link = cited.rows[0]["document"]
        assert (link if url is None else (link.value, link.target)) == (
            "a.pdf" if url is None else ("a.pdf", url)
        )
    first, row = answers.rows
    assert "not asked yet" in first["error"]
    assert row["pages"] == "3, 12"
    assert row["citations"].value == (
        "[1] “The fee is 35 crowns.” a.pdf, version 2, page 12, Fees, characters 30-51\n"
        "[2] “The fee is 35 crowns.” a.pdf, page 3, characters 30-51"
    )
    assert row["citations"].target == "#'citations'!A2"
    assert cited.rows[1]["id"].target == "#'answers'!A3"
    answers, _ = answer_tables(table, questions, {1: given}, holds_lists=True)
    assert answers.rows[1]["citations"][1]["page"] == 3


# ---- fathom bench batch --------------------------------------------------------------------------


def test_the_bench_reckons_what_it_says(two_documents: Fathom, tmp_path: Path) -> None:
    import torch

    asked = {
        document.id: [
            EvidenceQuestion(str(n), f"What is said about number {n}?", str(document.id), ())
            for n in range(5)
        ]
        for document in two_documents.documents()
    }
    service = two_documents.service()

    def chosen(num_documents: int) -> list[tuple[Document, list[str]]]:
        return documents_that_fit(
            two_documents.documents(),
            asked,
            service,
            num_documents=num_documents,
            num_questions=num_documents * 4,
        )

    with pytest.raises(ReadError, match="2 documents with 4 questions each fit"):
        chosen(3)
    said: list[str] = []
    with Journal(tmp_path / "a.journal") as journal:
        bench = bench_batch(
            chosen(2),
            service,
            service,
            journal,
            model="tiny-llama",
            spec=two_documents.engine.spec,
            device=torch.device("cpu"),
            max_new_tokens=16,
            num_alone=2,
            on_progress=said.append,
        )
        assert len(journal) == 8
    assert said == [
        f"document {n} of 2: {words}"
        for n in (1, 2)
        for words in ("2 questions alone", "4 questions as a batch")
    ]
    assert (bench.num_questions, bench.num_alone) == (8, 4)
    for row in bench.rows:
        assert (row.num_prefills, row.num_alone, row.same_answers) == (1, 2, 2)
        assert row.promised_bytes is not None
        assert row.resident_bytes >= 0
    assert bench.batch_seconds == pytest.approx(sum(row.batch_seconds for row in bench.rows))
    assert bench.alone_seconds == pytest.approx(sum(2 * row.alone_seconds for row in bench.rows))
    assert bench.ratio == pytest.approx(bench.alone_seconds / bench.batch_seconds)
    assert "reckoned from 4 questions really asked so" in card(bench)
    json.dumps(bench.to_json())
