"""A table of questions in, a table of cited answers out; what is answered is never asked again.

The way of a table: `read_questions` checks it as a whole, no model needed; `place_questions` finds
each row's documents and route, or what is wrong with it; `answer_questions` answers document by
document, each of which is read once, and writes every answer down in the journal before it tells of
it. `eval.batch_output` makes the table for people.
"""

import hashlib
import json
import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from threading import Event
from typing import Any, Protocol

from eval.batch_journal import Journal
from eval.tables import Table
from rag.answering.service import AnsweringService, AnswerReady
from rag.errors import DocumentNotFoundError, FathomError, ModelServerError, TableError
from rag.store.documents import DocumentStore
from rag.store.receipts import ReceiptStore
from rag.types import Answer, Document, Route, storable

logger = logging.getLogger(__name__)

QUESTION, ID, DOCUMENT, ROUTE = INPUT_COLUMNS = ("question", "id", "document", "route")

# A server that fails so many rows one after the other is taken for gone.
_SERVER_IS_GONE = 5


@dataclass(frozen=True, slots=True)
class Question:
    """A row of the table as it was read: `document` is None where its cell is empty."""

    number: int
    id: str
    text: str
    document: Any
    route: str


@dataclass(frozen=True, slots=True)
class PlacedQuestion:
    """A row that can be asked. `key` says what is asked of what: equal keys, equal answers."""

    number: int
    id: str
    text: str
    document_ids: tuple[int, ...]
    route: Route | None
    key: str


class OneByOne(Protocol):
    """Answers one question; each row may wait there for its turn among other people's questions."""

    def stream(
        self, question: str, *, document_ids: Sequence[int], route: Route | None, stop: Event
    ) -> Iterator[object]:
        """Yield the events of an answer, the `AnswerReady` among them."""


Outcome = Answer | FathomError

NOT_ASKED = TableError(
    "not asked yet: the run was stopped before", hint="the same command goes on from here"
)


# ---- the table as a whole ------------------------------------------------------------------------


def read_questions(table: Table) -> list[Question]:
    """Return the questions of a table in its order; their ids are its own or count from 1.

    Raises:
        TableError: if there is no column `question`, no row, or an id that is empty or not alone.
    """
    names = {wanted: _column(table, wanted) for wanted in INPUT_COLUMNS}
    if names[QUESTION] is None:
        raise TableError(
            f"there is no column 'question'; found are: {', '.join(table.columns) or 'none'}",
            hint="name the column of the questions 'question'; 'id', 'document' and 'route' may"
            " stand beside it",
        )
    if not table.rows:
        raise TableError("the table has no row", hint="write one question a row below the header")

    def cell(row: Mapping[str, Any], wanted: str) -> Any:  # noqa: ANN401
        return row.get(names[wanted] or "")

    ids = [str(number) for number in range(1, len(table.rows) + 1)]
    if names[ID] is not None:
        ids = [_words(cell(row, ID)) for row in table.rows]
    _check_ids(ids)
    return [
        Question(
            number,
            ids[number],
            _words(cell(row, QUESTION)),
            cell(row, DOCUMENT) if _words(cell(row, DOCUMENT)) else None,
            _words(cell(row, ROUTE)),
        )
        for number, row in enumerate(table.rows)
    ]


def _column(table: Table, wanted: str) -> str | None:
    """Return the name of a column as the table has it, whatever its capitals."""
    found = [name for name in table.columns if name.casefold() == wanted]
    if len(found) > 1:
        raise TableError(
            f"the columns {found[0]!r} and {found[1]!r} may both be meant by {wanted!r}",
            hint="rename one of them",
        )
    return found[0] if found else None


def _check_ids(ids: Sequence[str]) -> None:
    empty = [number for number, name in enumerate(ids, start=1) if not name]
    if empty:
        raise TableError(
            f"{len(empty)} rows have no id, the first is row {empty[0]} below the header",
            hint="give every row an id of its own, or leave the column out",
        )
    first: dict[str, int] = {}
    for number, name in enumerate(ids, start=1):
        if name in first:
            raise TableError(
                f"rows {first[name]} and {number} below the header have the same id {name!r}",
                hint="give every row an id of its own, or leave the column out",
            )
        first[name] = number


# ---- each row ------------------------------------------------------------------------------------


def place_questions(
    questions: Sequence[Question],
    store: DocumentStore,
    *,
    default: Sequence[Document],
    route: Route | None,
    model: str,
) -> tuple[list[PlacedQuestion], dict[int, FathomError]]:
    """Return the rows that can be asked, and by their numbers what is wrong with the others.

    Args:
        questions: of `read_questions`.
        store: knows the documents.
        default: the documents of a row that names none.
        route: the route of a row that names none.
        model: what receipts call the model that will answer.
    """
    found: dict[str, Sequence[Document] | FathomError] = {"null": default}
    placed: list[PlacedQuestion] = []
    faults: dict[int, FathomError] = {}
    for question in questions:
        reference = json.dumps(question.document, default=str)
        if reference not in found:
            try:
                found[reference] = _documents(question.document, store)
            except DocumentNotFoundError as error:
                found[reference] = error
        try:
            wanted = _route(question.route) or route
            documents = found[reference]
            if isinstance(documents, FathomError):
                raise documents
            if question.document == []:
                raise TableError(
                    "the list of documents is empty", hint="name some, or leave it out"
                )
            if not question.text:
                raise TableError("the question is empty", hint="write one, or delete the row")
        except FathomError as error:
            faults[question.number] = error
            continue
        placed.append(
            PlacedQuestion(
                question.number,
                question.id,
                question.text,
                tuple(document.id for document in documents),
                wanted,
                _key(question.text, documents, wanted, model),
            )
        )
    return placed, faults


def _documents(cell: Any, store: DocumentStore) -> list[Document]:  # noqa: ANN401
    """Return the documents that a cell names: one, or several in a list or between semicolons.

    Raises:
        DocumentNotFoundError: if one is unknown, or means several.
    """
    if isinstance(cell, list):
        return [store.find(_words(item)) for item in cell]
    whole = _words(cell)
    try:
        return [store.find(whole)]
    except DocumentNotFoundError:
        parts = [part.strip() for part in whole.split(";") if part.strip()]
        if len(parts) < 2:
            raise
        return [store.find(part) for part in parts]


def _route(name: str) -> Route | None:
    if name.casefold() in ("", "auto"):
        return None
    try:
        return Route(name.casefold())
    except ValueError:
        known = ", ".join(Route)
        raise TableError(
            f"there is no route {name!r}", hint=f"give {known}, or nothing to let Fathom choose"
        ) from None


def _key(text: str, documents: Sequence[Document], route: Route | None, model: str) -> str:
    asked = [text, [document.version_key for document in documents], route, model]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _words(cell: Any) -> str:  # noqa: ANN401
    """Return a cell as a person reads it: a spreadsheet may hold document 3 as 3.0."""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    return "" if cell is None else str(cell).strip()


# ---- answering -----------------------------------------------------------------------------------


def answer_questions(
    questions: Sequence[PlacedQuestion],
    service: AnsweringService | OneByOne,
    journal: Journal,
    *,
    workers: int | None = None,
    stop: Event,
) -> Iterator[tuple[PlacedQuestion, Outcome]]:
    """Answer what the journal does not hold; each answer is in it before it is yielded.

    Rows about the same documents follow each other, so that those are read once.

    Args:
        questions: of `place_questions`.
        service: answers them.
        journal: open; what it holds is left out.
        workers: how many rows a server is asked at once; None lets the engine answer the rows of a
            group side by side, as many as its memory holds.
        stop: set it to end, after `Journal.stop`; what is half written then is asked again.

    Raises:
        ModelServerError: if the server fails one row after the other; the rows that are left were
            not asked.
    """
    left = sorted(
        (question for question in questions if journal.answer(question.id, question.key) is None),
        key=lambda question: (question.document_ids, question.route or "", question.number),
    )
    failed_together = 0
    if workers is None and isinstance(service, AnsweringService):
        outcomes = _in_groups(left, service, stop)
    else:
        outcomes = _side_by_side(left, service, workers or 1, stop)
    server_is_gone: ModelServerError | None = None
    with closing(outcomes):
        for question, outcome in outcomes:
            if isinstance(outcome, Answer):
                if stop.is_set():  # it may be cut short, and half an answer is none
                    journal.drop(outcome.receipt.id)
                    continue
                journal.add(question.id, question.key, outcome)
            elif stop.is_set():
                continue
            failed_together = failed_together + 1 if isinstance(outcome, ModelServerError) else 0
            if isinstance(outcome, ModelServerError) and failed_together == _SERVER_IS_GONE:
                server_is_gone = outcome
                journal.stop()
                stop.set()
            else:
                yield question, outcome
    if server_is_gone is not None:
        raise server_is_gone


def begin_run(
    questions: Sequence[PlacedQuestion], journal: Journal, receipts: ReceiptStore, *, model: str
) -> None:
    """Begin a run, after writing down what the one before was killed before it could write down.

    An answer's receipt is committed a moment before its line in the journal. One that was committed
    while that run was answering, by the same model to the same question about the same documents,
    is the answer of a row that has none. What it committed once it was told to stop may be half.
    """
    asked: dict[tuple[str, tuple[int, ...]], list[PlacedQuestion]] = {}
    for question in questions:
        about = tuple(sorted(set(question.document_ids)))
        asked.setdefault((storable(question.text), about), []).append(question)
    given = receipts.since(journal.began, before=journal.stopped) if journal.began else []
    for receipt_id, text, document_ids in given:
        if receipt_id in journal.receipts or (text, document_ids) not in asked:
            continue
        rows = asked[text, document_ids]
        answer = receipts.load(receipt_id)
        only_one_route = len({row.route for row in rows}) == 1
        for row in rows:
            is_its_route = only_one_route or row.route is answer.receipt.route
            if (
                answer.receipt.model == model
                and is_its_route
                and journal.answer(row.id, row.key) is None
            ):
                journal.add(row.id, row.key, answer)
                break
    now = journal.begin()
    journal.drop(*(receipt_id for receipt_id, _, _ in receipts.since(now)))  # of this very second


def _in_groups(
    questions: Sequence[PlacedQuestion], service: AnsweringService, stop: Event
) -> Generator[tuple[PlacedQuestion, Outcome]]:
    groups: dict[tuple[tuple[int, ...], Route | None], list[PlacedQuestion]] = {}
    for question in questions:
        groups.setdefault((question.document_ids, question.route), []).append(question)
    for (document_ids, route), group in groups.items():
        if stop.is_set():
            return
        left = dict(enumerate(group))
        try:
            for number, outcome in service.answer_many(
                [question.text for question in group],
                document_ids=document_ids,
                route=route,
                stop=stop,
            ):
                yield left.pop(number), outcome
        except Exception as error:  # no row may end the run: which one it was is found out alone
            logger.warning("asked one by one after %s: %s", type(error).__name__, error)
            for question in left.values():
                if stop.is_set():
                    return
                yield question, _alone(question, service, stop)


def _side_by_side(
    questions: Sequence[PlacedQuestion], service: OneByOne, workers: int, stop: Event
) -> Generator[tuple[PlacedQuestion, Outcome]]:
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(_alone, question, service, stop): question for question in questions}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _alone(question: PlacedQuestion, service: OneByOne, stop: Event) -> Outcome:
    """Return the answer to one row, or what went wrong with it, foreseen or not."""
    if stop.is_set():
        return NOT_ASKED
    try:
        events = service.stream(
            question.text,
            document_ids=question.document_ids,
            route=question.route,
            stop=stop,
        )
        return next(event.answer for event in events if isinstance(event, AnswerReady))
    except FathomError as error:
        return error
    except Exception as error:
        logger.debug("row %s", question.id, exc_info=True)
        return FathomError(
            f"something unexpected went wrong: {type(error).__name__}: {error}",
            hint="this is a fault in Fathom; ask this question alone with fathom ask",
        )
