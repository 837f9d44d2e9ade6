"""Comparisons in the server: begun, ended, gone on with, listed, gone with a document."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from eval.arms import Arm
from eval.examples import EvalExample
from eval.journal import read_journals
from rag.errors import DocumentNotFoundError, ReadError, SettingsError
from served import serving
from ui.assembly import Fathom
from ui.comparing import Comparisons, comparisons_dir, folder_name
from ui.given_tables import GivenTable, GivenTables, read_questions
from ui.tabs.compare_table import faults_html, list_html, template_csv

EXAMPLES = tuple(
    EvalExample(f"q{n}", question, "handbook.md", answers, answerable=bool(answers))
    for n, (question, answers) in enumerate(
        [
            ("What is the harbour fee?", ("35 crowns",)),
            ("Who pays nothing?", ("Children under ten",)),
            ("What colour is the south beacon?", ("green",)),
            ("Where does the pilot boat lie?", ("berth three",)),
            ("How many berths has the quay?", ("Twelve",)),
            ("What is the fee for an elephant?", ()),
        ]
    )
)
ARMS = (Arm.CLOSED, Arm.HYBRID)


def until(condition: Callable[[], object]) -> None:
    """Wait for a condition."""
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come")


def ended(comparisons: Comparisons) -> None:
    until(lambda: comparisons.running() is None)


def test_a_table_is_compared_and_its_report_opens(small_fathom: Fathom) -> None:
    comparisons = small_fathom.comparisons
    assert comparisons.all() == []
    name = comparisons.begin("My Questions.csv", EXAMPLES, ARMS)
    assert name.startswith("my-questions-")
    ended(comparisons)
    (one,) = comparisons.all()
    assert (one.state, one.num_rows, one.of_rows, one.problem) == ("done", 12, 12, "")
    assert (one.title, one.arms) == ("My Questions.csv", ARMS)
    body = comparisons.report(name)
    assert "Paired differences" in body
    assert "hybrid - closed" in body or "closed - hybrid" in body
    assert "<body" not in body
    picture = f"/comparisons/{name}/cost.png"
    assert f'src="{picture}"' in body
    assert comparisons.picture(name, "cost.png").startswith(b"\x89PNG")
    assert json.loads(comparisons.numbers(name))["num_examples"] == 6
    for wrong in ("../cost.png", "rows.jsonl", "report.json", "no.png"):
        with pytest.raises(DocumentNotFoundError):
            comparisons.picture(name, wrong)
    assert "questions that some arms answered rightly" in comparisons.failures(name)
    assert "<body" not in comparisons.failures(name)
    comparisons.delete(name)
    assert comparisons.all() == []
    for wrong in (name, "..", "../library", ""):
        with pytest.raises(DocumentNotFoundError):
            comparisons.report(wrong)
        with pytest.raises(DocumentNotFoundError):
            comparisons.failures(wrong)


def test_it_stops_and_goes_on_without_asking_twice(small_fathom: Fathom) -> None:
    comparisons = small_fathom.comparisons
    folder = comparisons_dir(small_fathom.settings, "")
    held = small_fathom.queue.join("somebody else")
    with held:
        list(held.wait(threading.Event()))  # has the model
        name = comparisons.begin("questions.csv", EXAMPLES, ARMS)
        until(lambda: (one := comparisons.running()) and one.waiting)
        with pytest.raises(SettingsError, match="is running"):
            comparisons.begin("more.csv", EXAMPLES, ARMS)
        comparisons.stop()
        ended(comparisons)
    (one,) = comparisons.all()
    assert (one.state, one.num_rows, one.has_report) == ("stopped", 0, False)
    with pytest.raises(ReadError, match="no report yet"):
        comparisons.report(name)

    again = Fathom(
        small_fathom.settings, embedder=small_fathom.embedder, engine=small_fathom.engine
    )
    again.comparisons.go_on(name)  # the server was started anew
    ended(again.comparisons)
    assert again.comparisons.all()[0].state == "done"
    written = (folder / name / "rows.jsonl").read_bytes()
    again.comparisons.go_on(name)
    ended(again.comparisons)
    rows = read_journals(folder / name).rows
    assert len({(row.example_id, row.arm) for row in rows}) == len(rows) == 12
    assert (folder / name / "rows.jsonl").read_bytes().startswith(written)


def test_others_have_the_model_between_the_parts(small_fathom: Fathom) -> None:
    """A question that comes while a long table is asked waits for one part of it."""
    order: list[str] = []
    turn = small_fathom.queue.join

    def noted(owner: str) -> object:
        order.append(owner)
        return turn(owner)

    small_fathom.queue.join = noted  # type: ignore[method-assign,assignment]
    small_fathom.comparisons.begin("questions.csv", EXAMPLES, ARMS)
    until(lambda: order)
    other = small_fathom.for_owner("ben")
    with small_fathom.queue.join("ben") as ticket:
        list(ticket.wait(threading.Event()))
        assert small_fathom.comparisons.running() is not None
    assert other.comparisons.all() == []
    ended(small_fathom.comparisons)
    assert order.count("") == 4  # six questions, four at once, by two arms


def test_each_owner_sees_his_own_alone(small_fathom: Fathom) -> None:
    name = small_fathom.comparisons.begin("questions.csv", EXAMPLES[:1], ARMS[:1])
    ended(small_fathom.comparisons)
    ben = small_fathom.for_owner("ben")
    assert ben.comparisons.all() == []
    for reach in (ben.comparisons.report, ben.comparisons.delete, ben.comparisons.go_on):
        with pytest.raises(DocumentNotFoundError):
            reach(name)
    with pytest.raises(DocumentNotFoundError, match=r"handbook\.md"):
        ben.comparisons.begin("questions.csv", EXAMPLES, ARMS)
    ben.delete_everything()
    assert len(small_fathom.comparisons.all()) == 1


def test_a_comparison_goes_with_a_document_it_asked_about(
    small_fathom: Fathom, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("The ferry leaves at noon.\n" * 20)
    small_fathom.ingest(other)
    about_other = EvalExample("f", "When does the ferry leave?", "other.txt", ("noon",), True)
    for title, examples in (("a.csv", EXAMPLES[:1]), ("b.csv", [about_other])):
        small_fathom.comparisons.begin(title, examples, [Arm.HYBRID])
        ended(small_fathom.comparisons)
    small_fathom.delete(small_fathom.store.find("handbook.md").id)
    assert [one.title for one in small_fathom.comparisons.all()] == ["b.csv"]
    words = b"".join(p.read_bytes() for p in small_fathom.settings.home.glob("comparisons/**/*.*"))
    assert b"harbour" not in words
    small_fathom.delete_everything()
    assert not comparisons_dir(small_fathom.settings, "").exists()


def test_what_fathom_compare_left_is_listed(small_fathom: Fathom) -> None:
    folder = comparisons_dir(small_fathom.settings, "") / folder_name("Their set.jsonl")
    small_fathom.comparisons.begin("x.csv", EXAMPLES[:2], [Arm.HYBRID])
    ended(small_fathom.comparisons)
    (made,) = small_fathom.comparisons.all()
    (folder.parent / made.name).rename(folder)
    (folder / "comparison.json").unlink()
    (one,) = small_fathom.comparisons.all()
    assert (one.name, one.title, one.state, one.num_rows) == ("their-set", "their-set", "done", 2)
    assert "Paired differences" in small_fathom.comparisons.report("their-set")
    with pytest.raises(DocumentNotFoundError, match="not begun in the page"):
        small_fathom.comparisons.go_on("their-set")


def test_a_part_that_fails_says_why_and_can_be_gone_on_with(small_fathom: Fathom) -> None:
    comparisons = small_fathom.comparisons
    name = comparisons.begin("questions.csv", EXAMPLES[:1], [Arm.HYBRID])
    ended(comparisons)
    rows = comparisons_dir(small_fathom.settings, "") / name / "rows.jsonl"
    rows.write_text("{damaged\n")
    with pytest.raises(ReadError, match="no row of a comparison"):
        comparisons.go_on(name)
    rows.unlink()
    comparisons.go_on(name)
    ended(comparisons)
    assert comparisons.all()[0].state == "done"


def test_every_faulty_row_of_an_upload_is_named_and_a_template_has_none(tmp_path: Path) -> None:
    table = tmp_path / "questions.csv"
    table.write_text("id,question,document\na,,x\na,Who?,\n")
    with pytest.raises(ReadError) as caught:
        read_questions(table)
    shown = faults_html(table.name, caught.value)
    assert shown.count("<li>") == len(caught.value.message.split("\n")) > 2
    picture = tmp_path / "x.png"
    picture.write_bytes(b"\x89PNG")
    with pytest.raises(ReadError, match="no table of questions"):
        read_questions(picture)
    table.write_text(template_csv(["a.pdf", "b, with a comma.txt"]))
    read = read_questions(table)
    assert [example.document for example in read.examples[::2]] == ["a.pdf", "b, with a comma.txt"]
    assert "Which way of reading" in list_html([])


def test_a_given_table_is_its_owner_s_and_the_latest_are_held() -> None:
    tables = GivenTables()
    names = [tables.hold("anna", GivenTable(f"{n}.csv", EXAMPLES)) for n in range(5)]
    assert [tables.find("ben", name) for name in names] == [None] * 5
    found = [tables.find("anna", name) for name in names]
    assert [table and table.title for table in found] == [None, "1.csv", "2.csv", "3.csv", "4.csv"]


def test_what_is_wrong_with_an_upload_is_told_and_not_where_it_lay(small_fathom: Fathom) -> None:
    with serving(small_fathom) as url, httpx.Client(base_url=url, timeout=60) as page:

        def give(name: str, words: str) -> dict[str, str]:
            sent = page.post("/uploads/questions", files={"file": (name, words)})
            assert sent.status_code == 200, sent.text
            told: dict[str, str] = sent.json()
            return told

        for name, words in (("a.png", "x"), ("a.jsonl", ""), ("../../b.csv", "id\n1\n")):
            told = give(name, words)
            assert told["made"] == ""
            assert 'role="alert"' in told["html"]
            assert str(small_fathom.settings.home) not in told["html"]
        read = small_fathom.given_tables.find("", give("c.csv", template_csv(["x"]))["made"])
        assert read is not None
        assert read.title == "c.csv"
    assert list((small_fathom.settings.home / "tmp").glob("*")) == []
