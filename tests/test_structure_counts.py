"""Counts that the text itself proves: what is counted, what is not, and what is left to a model."""

import csv
import io
import json
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import INGEST_DOCS, HashEmbedder, make_tiny_engine
from documents import docx_parts, pdf_line, write_pdf
from ingest.readers.chat import chat_sections
from ingest.readers.data import read_json
from ingest.readers.text import markdown_headings
from rag.answering.counting import MOST_CITATIONS, count_question
from rag.answering.structures.finder import find_structures
from rag.answering.structures.item import Structure, singulars
from rag.answering.structures.labelled import number_value, numbering_words
from rag.types import Answer, QuestionClass, Route, Section
from ui.assembly import Fathom

NUM_RECORDS = 102
CITIES = ("Oslo", "Rome", "Lima")


def _records() -> str:
    """Return 102 records, with mentions of others in their prose."""
    return "\n\n".join(
        f"Record {n}\nName: Person {n}\nCity: {CITIES[n % 3]}\n"
        f"This person was seen twice; see also what was written about\nRecord {n - 1} was read."
        for n in range(1, NUM_RECORDS + 1)
    )


def _meant(noun: str, structures: list[Structure]) -> Structure | None:
    """Return the structure of a noun as `counting` chooses it."""
    from rag.answering.counting import _meant as choose

    found = choose(noun, structures)
    return found[0] if found else None


def _counts(
    noun: str, text: str, media_type: str = "text/plain", title: str = "a", **kwargs: object
) -> int | None:
    structures = find_structures(text, media_type, title, **kwargs)  # type: ignore[arg-type]
    found = _meant(noun, structures)
    return len(found.items) if found else None


def _ask(library: Fathom, path: Path, question: str) -> Answer:
    document = library.ingest(path).document
    return library.service().answer(question, document_ids=[document.id])


def test_102_records_are_102_with_a_quotation_each_whatever_the_model(
    library: Fathom, tmp_path: Path
) -> None:
    path = tmp_path / "people.txt"
    path.write_text(_records())
    answer = _ask(library, path, "How many records are in this file?")
    assert answer.answer.startswith("102 records.")
    assert "numbered 1 to 102" in answer.answer
    assert len(answer.citations) == NUM_RECORDS
    assert all(citation.verified for citation in answer.citations)
    assert [c.quote for c in answer.citations] == [f"Record {n}" for n in range(1, 103)]
    assert [c.marker for c in answer.citations] == list(range(1, 103))
    receipt = answer.receipt
    assert receipt.route is Route.SCAN
    assert receipt.reason == "counted from the text itself: 102 records"
    assert receipt.question_class is QuestionClass.AGGREGATE
    assert receipt.read.tokens == receipt.read.of_tokens > 0
    assert receipt.prompt_tokens == receipt.new_tokens == 0
    assert receipt.scan is not None
    assert receipt.scan.items == NUM_RECORDS
    assert library.receipts.load(receipt.id) == answer


def test_a_route_that_a_person_chose_is_taken(library: Fathom, tmp_path: Path) -> None:
    path = tmp_path / "people.txt"
    path.write_text(_records())
    library.ingest(path)
    question = "How many records are in this file?"
    answer = library.service().answer(question, route=Route.RETRIEVAL)
    assert answer.receipt.route is Route.RETRIEVAL
    assert answer.receipt.new_tokens > 0


@pytest.mark.parametrize(
    ("question", "number"),
    [
        ("How many records mention Oslo?", 34),
        ("How many records have the city Rome?", 34),
        ("How many Lima records are there?", 34),
        ("list all records", 102),
        ("how many entries does this file have?", 102),
    ],
)
def test_a_literal_filter_is_applied(
    library: Fathom, tmp_path: Path, question: str, number: int
) -> None:
    path = tmp_path / "people.txt"
    path.write_text(_records())
    answer = _ask(library, path, question)
    assert answer.answer.startswith(f"{number} ")
    assert len(answer.citations) == number
    assert answer.receipt.new_tokens == 0


@pytest.mark.parametrize(
    "question",
    [
        "How many people live in Oslo?",
        "How many unhappy records are there?",
        "How many records are in the second part?",
        "How many records have the colour red?",
        "Why are there so many records?",
    ],
)
def test_what_the_text_does_not_prove_goes_to_the_model(
    library: Fathom, tmp_path: Path, question: str
) -> None:
    path = tmp_path / "people.txt"
    path.write_text(_records())
    document = library.ingest(path).document
    plan = library.service().plan(question, [document])
    assert plan.counted is None


def _csv() -> str:
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(["id", "city", "remark"])
    writer.writerows([n, CITIES[n % 3], f'of "record {n}",\nin two lines'] for n in range(102))
    return stream.getvalue().replace("\r\n", "\n")


FORMS = {
    "blocks of fields": (
        "text/plain",
        "\n\n".join(f"Name: Person {n}\nCity: Oslo\nRemark: record {n}" for n in range(102)),
    ),
    "headings": ("text/markdown", "\n".join(f"## Record {n}\n\nWords.\n" for n in range(102))),
    "numbered list": ("text/plain", "\n".join(f"{n}. A thing" for n in range(1, 103))),
    "nested numbering": (
        "text/plain",
        "\n".join(f"{n}. A thing\n   1. one\n   2. two" for n in range(1, 103)),
    ),
    "bullets": ("text/plain", "\n".join(f"- thing {n}\n  - part of it" for n in range(102))),
    "CSV": ("text/csv", _csv()),
    "CSV without a header": ("text/csv", "\n".join(f"{n},Oslo,{n * 7}" for n in range(102))),
    "TSV": ("text/tab-separated-values", "a\tb\n" + "\n".join(f"{n}\tx" for n in range(102))),
    "JSON lines": ("application/jsonl", "\n".join(json.dumps({"n": n}) for n in range(102))),
    "JSON": ("application/json", json.dumps([{"n": n, "parts": [1, 2]} for n in range(102)])),
    "JSON inside": ("application/json", json.dumps({"of": "x", "rows": [[n] for n in range(102)]})),
    "piped table": ("text/plain", "name | city\n" + "\n".join(f"P{n} | Oslo" for n in range(102))),
    "Markdown table": (
        "text/markdown",
        "| name | city |\n|---|---|\n" + "\n".join(f"| P{n} | Oslo |" for n in range(102)),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_102_records_in_any_form(form: str) -> None:
    media_type, text = FORMS[form]
    sections = markdown_headings(text) if media_type == "text/markdown" else ()
    structures = find_structures(text, media_type, "a.txt", sections=sections)
    found = _meant("records", structures)
    assert found is not None
    assert len(found.items) == 102
    assert all(text[item.start : item.end].strip() for item in found.items)
    assert len({item.start for item in found.items}) == 102


def test_rows_of_office_tables(library: Fathom, tmp_path: Path) -> None:
    path = tmp_path / "orders.docx"
    _write_docx_table(path, [["order", "city"], *([f"A{n}", CITIES[n % 3]] for n in range(102))])
    answer = _ask(library, path, "How many orders are in this table?")
    assert answer.answer.startswith("102 orders.")
    assert "below the header “order | city”" in answer.answer
    assert all(citation.verified for citation in answer.citations)


def test_long_json_on_one_line_is_counted_as_it_was_broken(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"customers": [{"id": n, "at": {"x": [n]}} for n in range(300)]}))
    text = read_json(path, "application/json").text
    assert "\n" in text
    assert _counts("customers", text, "application/json") == 300


def test_a_table_of_contents_and_running_heads_do_not_count_twice() -> None:
    contents = "\n".join(f"Chapter {n}: Title {n} ....... {n * 10}" for n in range(1, 13))
    body = "\n\n".join(f"Chapter {n}: Title {n}\n\n{'Words of it. ' * 60}" for n in range(1, 13))
    assert _counts("chapters", f"Contents\n\n{contents}\n\n{body}") == 12
    pages = "\n\n".join(
        f"Chapter {n}: Title {n}\n\n{'Words of it. ' * 60}" for n in range(1, 13) for _ in range(4)
    )
    structures = find_structures(pages, "text/plain", "a")
    found = _meant("chapters", structures)
    assert found is not None
    assert len(found.items) == 12
    assert "36 repeats" in found.notes[0]


def test_gaps_and_repeats_of_the_numbering_are_said() -> None:
    numbers = [n for n in range(1, 104) if n != 57] + [103]
    text = "\n\n".join(f"Record {n}\nWords {k}." for k, n in enumerate(numbers))
    found = _meant("records", find_structures(text, "text/plain", "a"))
    assert found is not None
    assert len(found.items) == 103
    assert "numbered 1 to 103; 57 is missing; 103 stands more than once" in found.description


def test_prose_that_speaks_of_records_has_none() -> None:
    text = "\n".join(f"As said in\nRecord {n} was lost in the year of the fire." for n in range(20))
    assert _counts("records", text) is None
    initials = "\n\n".join(f"Todd {c}. Cravens\nis a director." for c in "ABCDEF")
    assert _counts("todds", initials) is None


def test_articles_in_roman_and_steps_that_start_again() -> None:
    romans = ["I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X"]
    treaty = "\n\n".join(
        f"ARTICLE {r}\n\nThe Parties shall meet, as Article I says." for r in romans
    )
    assert _counts("articles", treaty) == 10
    steps = "\n\n".join(f"Step {n}: Do it.\n\nWords." for _ in range(3) for n in range(1, 5))
    found = _meant("steps", find_structures(steps, "text/plain", "a"))
    assert found is not None
    assert len(found.items) == 12
    assert "starts again 2 times" in found.description
    lettered = "\n\n".join(f"Appendix {c}\n\nWords." for c in "ABCD")
    assert _counts("appendices", lettered) == 4


def test_examples_inside_a_long_text_are_not_its_records() -> None:
    examples = "\n\n".join(f"Package: p{n}\nVersion: {n}" for n in range(5))
    assert _counts("records", f"{'Words and words. ' * 400}\n\n{examples}\n\n") is None


def test_two_tables_are_ambiguous() -> None:
    table = "a | b\n" + "\n".join(f"{n} | x" for n in range(5))
    assert _counts("rows", f"{table}\n\nWords between.\n\n{table}") is None


def test_chapters_of_a_numbered_outline_and_levels_of_another() -> None:
    text = "# T\n\n" + "".join(f"## {n}. Part\n\n### {n}.1 Sub\n\nWords.\n\n" for n in range(1, 6))
    sections = markdown_headings(text)
    assert _counts("chapters", text, sections=sections) == 5
    assert _counts("sections", text, sections=sections) == 5
    assert _counts("headings", text, sections=sections) == 11
    again = text + text.replace("# T", "# Appendices")
    assert _counts("chapters", again, sections=markdown_headings(again)) is None


def test_messages_by_speaker(library: Fathom, tmp_path: Path) -> None:
    path = tmp_path / "talk.txt"
    names = ("Alice", "Bob", "Cy Dee")
    path.write_text("\n".join(f"[22:{n:02d}] {names[n % 3]}: well, {n}" for n in range(40)))
    assert chat_sections(path.read_text())
    answer = _ask(library, path, "How many messages did Alice send?")
    assert answer.answer.startswith("14 messages.")
    assert all(": well" in c.quote and "Alice" in c.quote for c in answer.citations)


def test_mentions_are_whole_words(library: Fathom, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("The fee. Fees are due.\nA FEE\nis a fee; coffee is none. " + "x " * 200)
    answer = _ask(library, path, "How many times is the word fee mentioned?")
    assert answer.answer.startswith("3 mentions.")
    assert all("fee" in c.quote.lower() and c.verified for c in answer.citations)


def test_a_count_over_several_documents_adds_up(library: Fathom, tmp_path: Path) -> None:
    for name, number in (("a.txt", 4), ("b.txt", 5)):
        (tmp_path / name).write_text("\n\n".join(f"Record {n}\nWords." for n in range(number)))
        library.ingest(tmp_path / name)
    answer = library.service().answer("How many records are there?")
    assert answer.answer.startswith("9 records.")
    assert "in a.txt: 4" in answer.answer
    assert "in b.txt: 5" in answer.answer
    assert [c.marker for c in answer.citations] == list(range(1, 10))


def test_more_items_than_citations_is_said(library: Fathom, tmp_path: Path) -> None:
    path = tmp_path / "many.csv"
    path.write_text("n,word\n" + "\n".join(f"{n},x" for n in range(MOST_CITATIONS + 500)))
    answer = _ask(library, path, "How many rows are there?")
    assert answer.answer.startswith("1,500 rows.")
    assert "The first 1,000 are quoted." in answer.answer
    assert len(answer.citations) == MOST_CITATIONS


def test_plan_shows_a_count_without_a_model(library: Fathom, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("n,word\n1,x\n2,y\n3,z")
    document = library.ingest(path).document
    fathom = Fathom(library.settings, embedder=HashEmbedder(), engine=make_tiny_engine())
    plan = fathom.service().plan("How many rows are there?", [document])
    assert plan.decision.route is Route.SCAN
    assert plan.decision.reason.endswith("3 rows")


@pytest.mark.parametrize(
    ("question", "noun", "rest"),
    [
        ("How many records are in this file?", "records", {"scope": "this file"}),
        ("How many articles does the treaty have?", "articles", {"scope": "the treaty"}),
        ("How many open tickets are there?", "open tickets", {}),
        ("how many tickets have status open?", "tickets", {"field": "status", "value": "open"}),
        ("How many mails from Ann are there?", "mails", {"speaker": "Ann"}),
        ("List all chapters of the book.", "chapters", {"wants_list": True, "scope": "the book"}),
        ('How often does the word "sea" occur?', "mention", {"mention": "sea"}),
    ],
)
def test_a_question_is_taken_apart(question: str, noun: str, rest: dict[str, object]) -> None:
    asked = count_question(question)
    assert asked is not None
    assert asked.noun == noun
    assert {name: getattr(asked, name) for name in rest} == rest


@pytest.mark.parametrize("question", ["What is the fee?", "How many?", "", "How many " * 200])
def test_what_asks_for_no_count_is_left(question: str) -> None:
    assert count_question(question) is None


def test_words_and_numbers() -> None:
    assert "entry" in singulars("entries")
    assert "appendix" in singulars("appendices")
    assert singulars("class") == {"class"}
    assert [number_value(w) for w in ("17", "17a", "XIV", "Q", "seven")] == [17, 17, 14, 17, 7]
    assert numbering_words([1, 2, 5]) == "numbered 1 to 5; 3 and 4 are missing"


def test_a_page_without_text_is_counted_and_not_quoted(library: Fathom, tmp_path: Path) -> None:
    path = write_pdf(tmp_path / "a.pdf", [pdf_line("First page."), "", pdf_line("Third page.")])
    answer = _ask(library, path, "How many pages does the document have?")
    assert answer.answer.startswith("3 pages.")
    assert "without text among them: 1" in answer.answer
    assert "2 of them are quoted" in answer.answer
    assert [c.page for c in answer.citations] == [1, 3]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), number=st.integers(3, 60))
def test_n_items_of_any_shape_count_n_and_are_quoted(data: st.DataObject, number: int) -> None:
    label = data.draw(st.sampled_from(["Record", "Invoice", "CASE", "Test case", "Step"]))
    mark = data.draw(st.sampled_from(["", "## ", "**"]))
    after = data.draw(st.sampled_from(["", ":", ".", " - A title", ": A title", " | cell"]))
    first = data.draw(st.integers(0, 1))
    prose = st.text(alphabet="abc def,\n", max_size=80).map(lambda s: s.replace("\n\n", " "))
    end = "**" if mark == "**" else ""
    parts = []
    for n in range(first, first + number):
        body = data.draw(prose)
        distractor = data.draw(
            st.sampled_from(["", f" as {label} {n} says", f"\n{label} {n} was found there"])
        )
        parts.append(f"{mark}{label} {n}{end}{after}\n{body}{distractor}\nend.")
    text = data.draw(st.sampled_from(["", "Some preface.\n\n"])) + "\n\n".join(parts)
    sections: tuple[Section, ...] = markdown_headings(text) if mark == "## " else ()
    found = _meant(f"{label}s", find_structures(text, "text/plain", "a", sections=sections))
    assert found is not None
    assert len(found.items) == number
    quotes = [text[item.start : item.end] for item in found.items]
    assert all(f"{label} {n}" in q for n, q in enumerate(quotes, first))


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.lists(st.text(max_size=12), min_size=2, max_size=2), min_size=1))
def test_rows_of_any_csv_count_as_python_reads_them(rows: list[list[str]]) -> None:
    rows = [[cell.replace("\r", "").replace("\0", "") for cell in row] for row in rows]
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([["n", "a", "b"]])
    csv.writer(stream, lineterminator="\n").writerows([[n, *row] for n, row in enumerate(rows)])
    assert _counts("rows", stream.getvalue(), "text/csv") == len(rows)


@pytest.mark.skipif(not INGEST_DOCS.exists(), reason="no shared data beside the project")
@pytest.mark.parametrize(
    ("name", "noun", "number"),
    [("book-war-and-peace-1225p.txt", "chapters", 365)],
)
def test_real_books(name: str, noun: str, number: int) -> None:
    from ingest.readers.text import read_text

    content = read_text(INGEST_DOCS / name)
    found = _counts(noun, content.text, title=name, sections=content.sections)
    assert found == number


def _write_docx_table(path: Path, rows: list[list[str]]) -> None:
    cells = "".join(
        "<w:tr>"
        + "".join(f"<w:tc><w:p><w:r><w:t>{cell}</w:t></w:r></w:p></w:tc>" for cell in row)
        + "</w:tr>"
        for row in rows
    )
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in docx_parts(f"<w:tbl>{cells}</w:tbl>").items():
            archive.writestr(name, content)
