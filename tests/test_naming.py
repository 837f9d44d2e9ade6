"""A document that a question names in words is asked alone, and nothing is left out unsaid."""

from dataclasses import replace
from pathlib import Path

import pytest

from rag.answering.naming import named_documents
from rag.types import AnswerMode, Document, Route
from ui.assembly import Fathom
from ui.formatting import receipt_text

TITLES = (
    "Staff handbook.docx",
    "contract_2018.pdf",
    "contract_2019.pdf",
    "Normans",
    "The Treaty of Lisbon",
    "Annual Report 2020.pdf",
)


def library(*titles: str) -> list[Document]:
    return [
        Document(n, title, f"/papers/{title}", 1, True, "0", "text/plain", 1, 1, 1, 1, (), "")
        for n, title in enumerate(titles)
    ]


DOCUMENTS = library(*TITLES)


@pytest.mark.parametrize(
    ("question", "titles"),
    [
        ("In the handbook, who approves a journey?", ["Staff handbook.docx"]),
        ("According to the staff handbook who approves a journey?", ["Staff handbook.docx"]),
        ("What does our handbook say about journeys?", ["Staff handbook.docx"]),
        ("When does it end according to contract_2019.pdf?", ["contract_2019.pdf"]),
        ("Who signed contract_2018?", ["contract_2018.pdf"]),
        ("What are the fees in the 2019 contract?", ["contract_2019.pdf"]),
        ("How do contract_2018.pdf and contract_2019.pdf differ?", [TITLES[1], TITLES[2]]),
        ("What was the profit in ANNUAL REPORT 2020.PDF?", ["Annual Report 2020.pdf"]),
        ("How many people does the report name?", ["Annual Report 2020.pdf"]),
        ("According to Normans, who was Rollo?", ["Normans"]),
        ("What does Article 50 of the Treaty of Lisbon say?", ["The Treaty of Lisbon"]),
    ],
)
def test_a_name_that_fits_one_document_asks_that_one(question: str, titles: list[str]) -> None:
    named = named_documents(question, DOCUMENTS)
    assert [document.title for document in named.documents] == titles
    assert "asked alone" in named.words
    assert "left out" in named.words


@pytest.mark.parametrize(
    "question",
    [
        "Who approves a journey?",
        "In the Normans, who was Rollo?",  # a people, or a document
        "In France, who was king?",
        "What does the Treaty of Rome say?",  # another treaty
        "Who signed the employment contract?",
        "What happened in contract 2017?",
        "What does the report of 2019 say?",
        "Which acts did the handbag maker report?",
        "",
    ],
)
def test_what_names_no_document_for_sure_asks_all_in_silence(question: str) -> None:
    named = named_documents(question, DOCUMENTS)
    assert (len(named.documents), named.words) == (len(TITLES), "")


def test_what_may_mean_several_or_none_asks_all_and_says_so() -> None:
    several = named_documents("What are the fees in the contract?", DOCUMENTS)
    assert len(several.documents) == len(TITLES)
    assert several.words == (
        "“contract” may mean contract_2018.pdf or contract_2019.pdf: all 6 documents were asked"
    )
    other = named_documents("Who approves it, other than in the handbook?", DOCUMENTS)
    assert len(other.documents) == len(TITLES)
    assert "what is not meant" in other.words
    twice = [*library("a.txt", "b.txt"), replace(library("a.txt")[0], id=9, source="/old/a.txt")]
    assert len(named_documents("What does a.txt say?", twice).documents) == 3


def test_one_document_is_never_narrowed() -> None:
    assert named_documents("In the handbook, who?", DOCUMENTS[:1]).words == ""


# ---- through the one door ------------------------------------------------------------------------


@pytest.fixture
def papers(library: Fathom, tmp_path: Path) -> Fathom:
    for name, town, entries in (("handbook", "Lyon", 3), ("minutes", "Turin", 5)):
        records = "".join(
            f"Record {n}\n\nEntry number {n} is here.\n\n" for n in range(1, entries + 1)
        )
        path = tmp_path / f"{name}.md"
        path.write_text(f"# Office\n\nThe head office stands in {town}.\n\n{records}")
        library.ingest(path)
    return library


def test_the_receipt_says_what_was_asked_and_what_was_left_out(papers: Fathom) -> None:
    question = "In the minutes, where does the head office stand?"
    answer = papers.service().answer(question, mode=AnswerMode.QUOTED)
    assert "Turin" in answer.answer
    assert {citation.title for citation in answer.citations} == {"minutes.md"}
    receipt = answer.receipt
    assert receipt.named == (
        "the question names “minutes”: minutes.md was asked alone, handbook.md was left out"
    )
    minutes = next(d for d in papers.documents() if d.title == "minutes.md")
    assert receipt.read.of_chunks == minutes.num_chunks
    assert f"asked of: {receipt.named}" in receipt_text(answer)
    assert papers.receipts.load(receipt.id).receipt.named == receipt.named
    again = papers.service().again(question, receipt, [d.id for d in papers.documents()])
    assert (again.answer, again.receipt.named) == (answer.answer, receipt.named)


def test_a_count_is_of_the_document_named(papers: Fathom) -> None:
    counts = {
        name: papers.service().answer(f"How many records are in the {name}?")
        for name in ("handbook", "minutes")
    }
    assert counts["handbook"].answer.startswith("3")
    assert counts["minutes"].answer.startswith("5")
    assert all(answer.receipt.named for answer in counts.values())


def test_a_table_asks_each_row_of_what_it_names(papers: Fathom) -> None:
    questions = [f"In the {name}, where is the office?" for name in ("handbook", "minutes")]
    found = dict(papers.service().answer_many([*questions, "Where?"], route=Route.FULL))
    extents = []
    for number in range(3):
        answer = found[number]
        assert not isinstance(answer, Exception)
        extents.append(answer.receipt.read.of_chunks)
    by_title = {document.title: document.num_chunks for document in papers.documents()}
    both = sum(by_title.values())
    assert extents == [by_title["handbook.md"], by_title["minutes.md"], both]
