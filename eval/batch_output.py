"""The answers of a batch as a table for people, and their citations as another.

In an XLSX they are two sheets that link to each other; the formats that hold lists carry an
answer's citations in its row, and a CSV in words.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval.batch import ID, NOT_ASKED, Outcome, Question
from eval.tables import Link, Table, row_of
from rag.answering.citations import UNVERIFIED, split_sentences
from rag.answering.outcome import NEAREST
from rag.errors import FathomError, TableError
from rag.types import Answer, AnswerMode, Citation, Route

ANSWER_COLUMNS = (
    "answer",
    "abstained",
    "citations",
    "pages",
    "route",
    "mode",
    "confidence",
    "tokens",
    "cached_tokens",
    "seconds",
    "receipt",
    "error",
)
CITATION_COLUMNS = (
    "id",
    "marker",
    "document",
    "version",
    "page",
    "section",
    "start",
    "end",
    "quote",
    "verified",
)
ANSWERS, CITATIONS = "answers", "citations"  # the sheets of an XLSX

_MARKER = re.compile(r"\[\d+\]")


def check_columns(table: Table) -> None:
    """Prove that each column carried through has a name of its own beside those of the answers.

    Raises:
        TableError: if two would have the same.
    """
    carried = [_carried(name) for name in table.columns]
    twice = sorted({name for name in carried if carried.count(name) > 1})
    if twice:
        raise TableError(
            f"two columns would be called {twice[0]!r} beside the answers",
            hint="rename or delete one of them: a column of an answer's name gets ' (in)' after it",
        )


def answer_row(
    row: Mapping[str, Any], question: Question, outcome: Outcome, columns: Sequence[str]
) -> dict[str, Any]:
    """Return a row of the answers: what was carried through, and ANSWER_COLUMNS.

    `confidence` is the share of the statements that stand on a verified quotation, and 1 for a
    count that the text proves. It is empty where nothing honest can be said: for quotations, which
    stand in the text whether they answer or not, for what a scan found, and without an answer.
    `seconds` run from planning to the answer; rows written side by side share them.

    Args:
        row: as it was read.
        question: the same, understood.
        outcome: what came of it.
        columns: of the table that was read.
    """
    carried = {_carried(name): row.get(name) for name in columns}
    if not any(name.casefold() == ID for name in columns):
        carried = {ID: question.id, **carried}
    if isinstance(outcome, FathomError):
        error = f"{outcome.message}; {outcome.hint}"
        return {**carried, **dict.fromkeys(ANSWER_COLUMNS), "error": error}
    receipt = outcome.receipt
    pages = sorted({citation.page for citation in outcome.citations if citation.page is not None})
    return {
        **carried,
        "answer": outcome.answer,
        "abstained": outcome.abstained,
        "citations": [asdict(citation) for citation in outcome.citations],
        "pages": ", ".join(map(str, pages)) or None,
        "route": str(receipt.route),
        "mode": str(receipt.mode),
        "confidence": _confidence(outcome),
        "tokens": receipt.prompt_tokens + receipt.new_tokens,
        "cached_tokens": receipt.cached_tokens,
        "seconds": receipt.seconds.total,
        "receipt": receipt.id,
        "error": None,
    }


def answer_tables(
    table: Table,
    questions: Sequence[Question],
    outcomes: Mapping[int, Outcome],
    *,
    holds_lists: bool,
    source_of: Callable[[int], str | None] = lambda _: None,
) -> tuple[Table, Table]:
    """Return the answers in the order of the questions, and their citations, one a row.

    Each answer with a citation links to the first of them, and each citation to its answer and,
    where its document lies in a file or on the web, to its page there.

    Args:
        table: as it was read.
        questions: of `read_questions`.
        outcomes: by the number of the row; a row without one was not asked yet.
        holds_lists: whether a cell may be a list; else citations are text.
        source_of: from a document's number to its source, None where that is not known.
    """
    answers: list[dict[str, Any]] = []
    citations: list[dict[str, Any]] = []
    for question in questions:
        outcome = outcomes.get(question.number, NOT_ASKED)
        row = answer_row(table.rows[question.number], question, outcome, table.columns)
        cited = outcome.citations if isinstance(outcome, Answer) else ()
        if cited and not holds_lists:
            row["citations"] = Link(_readable(cited), row_of(CITATIONS, len(citations)))
        elif not holds_lists:
            row["citations"] = None
        back = row_of(ANSWERS, question.number)
        citations += [_citation_row(c, Link(question.id, back), source_of) for c in cited]
        answers.append(row)
    carried = [_carried(name) for name in table.columns]
    if not any(name.casefold() == ID for name in carried):
        carried = [ID, *carried]
    return (
        Table((*carried, *ANSWER_COLUMNS), tuple(answers)),
        Table(CITATION_COLUMNS, tuple(citations)),
    )


def _carried(name: str) -> str:
    return f"{name} (in)" if name in ANSWER_COLUMNS else name


def _confidence(answer: Answer) -> float | None:
    """Return the share of an answer's statements that stand on a quotation; see `answer_row`."""
    mode, receipt = answer.receipt.mode, answer.receipt
    if mode is AnswerMode.COUNTED:
        return 1.0
    if answer.abstained or mode is AnswerMode.QUOTED or receipt.route is Route.SCAN:
        return None
    statements = split_sentences(answer.answer.split(NEAREST)[0])
    unsupported = sum(UNVERIFIED in statement for statement in statements)
    supported = sum(
        UNVERIFIED not in statement and bool(_MARKER.search(statement)) for statement in statements
    )
    total = supported + unsupported
    return round(supported / total, 3) if total else None


def _readable(citations: Sequence[Citation]) -> str:
    """Return the citations a line each: marker, quotation and place."""
    lines = []
    for c in citations:
        quote = " ".join(c.quote.split())
        version = f", version {c.version}" if c.version > 1 else ""
        page = f", page {c.page}" if c.page is not None else ""
        section = f", {c.section}" if c.section else ""
        doubt = "" if c.verified else " (not verified)"
        lines.append(
            f"[{c.marker}] \N{LEFT DOUBLE QUOTATION MARK}{quote}\N{RIGHT DOUBLE QUOTATION MARK}"
            f" {c.title}{version}{page}{section}, characters {c.start}-{c.end}{doubt}"
        )
    return "\n".join(lines)


def _citation_row(
    citation: Citation, back: Link, source_of: Callable[[int], str | None]
) -> dict[str, Any]:
    url = _url(source_of(citation.document), citation.page)
    return {
        "id": back,
        "marker": citation.marker,
        "document": Link(citation.title, url) if url else citation.title,
        "version": citation.version,
        "page": citation.page,
        "section": citation.section,
        "start": citation.start,
        "end": citation.end,
        "quote": citation.quote,
        "verified": citation.verified,
    }


def _url(source: str | None, page: int | None) -> str | None:
    """Return where a source can be opened, at a page of it; None if it is no file or address."""
    if source is None:
        return None
    if source.startswith(("http://", "https://")):
        return source
    path = Path(source)
    if not path.is_absolute() or not path.is_file():
        return None
    return path.as_uri() + (f"#page={page}" if page is not None else "")
