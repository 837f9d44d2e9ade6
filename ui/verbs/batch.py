"""fathom batch: a table of questions in, a table of cited answers out."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn

from rag.errors import EmptyLibraryError, FathomError, TableError
from rag.settings import load_settings
from ui.console import (
    CollectionOption,
    Documents,
    Home,
    Json,
    Model,
    RouteOption,
    document_ids,
    err,
    open_fathom,
    out,
    print_json,
    show_error,
)
from ui.formatting import plural

if TYPE_CHECKING:
    from eval.batch import Outcome
    from eval.batch_journal import Journal
    from rag.types import Document

app = typer.Typer()


@app.command(
    epilog="Examples: fathom batch questions.xlsx -o answers.xlsx"
    "  |  fathom batch questions.csv -o answers.parquet -c deals --json"
)
def batch(
    questions: Annotated[
        Path,
        typer.Argument(
            metavar="IN",
            help="CSV, TSV, XLSX (its first sheet), JSON Lines or Parquet, by its suffix.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File for the answers, in any of these formats.")
    ],
    documents: Documents = None,
    collection: CollectionOption = None,
    route: RouteOption = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Requests on their way to a server at once (FATHOM_REMOTE_PARALLEL). A model in"
            " this process needs none: it writes up to 32 rows side by side with all cores.",
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Ask every row anew, and overwrite what lies there.")
    ] = False,
    model: Model = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Answer a table of questions, document by document; run it again to go on after a stop.

    IN has a column question and, if wanted, id, document (number or title; several with ; between)
    and route; other columns are carried through. -d, -c and --route hold for rows that name none.
    What is answered stands in OUT.journal and is not asked again, however the run ended; rows with
    an error are. Exit code 1 if a row has one: its column error says what to do.
    """
    # 1. what is wrong with the table as a whole is said before any model is loaded
    from eval.batch import answer_questions, begin_run, place_questions, read_questions
    from eval.batch_journal import Journal, journal_path
    from eval.batch_output import ANSWERS, CITATIONS, answer_row, answer_tables, check_columns
    from eval.tables import as_json as json_cell
    from eval.tables import check_writable, holds_lists, read_table, write_table

    table = read_table(questions)
    for warning in table.warnings:
        err.print(f"{questions.name}: {warning}", markup=False)
    asked = read_questions(table)
    check_columns(table)
    check_writable(output)
    _check_output(questions, output, journal_path(output), fresh=fresh)
    settings = load_settings(home=home, model=model)
    if workers is not None and settings.remote_url is None:
        raise typer.BadParameter("--workers is for a server: set FATHOM_REMOTE_URL")
    fathom = open_fathom(settings)
    default = _default_documents(fathom, documents, collection)

    started = time.monotonic()
    with Journal(journal_path(output), fresh=fresh) as journal, _stopped_by_signal(journal) as stop:
        # 2. find each row's documents, and the answers that are there already
        name = fathom.engine.name
        placed, faults = place_questions(
            asked, fathom.store, default=default, route=route, model=name
        )
        begin_run(placed, journal, fathom.receipts, model=name)
        outcomes: dict[int, Outcome] = dict(faults)
        for question in placed:
            if answer := journal.answer(question.id, question.key):
                outcomes[question.number] = answer
        left = [question for question in placed if question.number not in outcomes]
        num_before = len(placed) - len(left)
        changed = len(journal.ids & {question.id for question in left})
        if num_before:
            err.print(f"{num_before} of {plural(len(asked), 'row')} answered before", markup=False)
        if changed:
            err.print(
                f"{plural(changed, 'row')} asked again: the question, its documents or the model"
                " are others than before",
                markup=False,
                soft_wrap=True,
            )

        def show(number: int) -> None:
            row = table.rows[number]
            if as_json:
                shown = answer_row(row, asked[number], outcomes[number], table.columns)
                print_json({column: json_cell(cell) for column, cell in shown.items()})

        for number in sorted(outcomes):
            show(number)

        # 3. answer the others
        problem: FathomError | None = None
        if left:
            with err.status("loading the model"):
                fathom.warm_up()
            if settings.remote_url is not None:
                workers = workers or settings.remote_parallel
            with _rows_bar(len(left)) as on_row:
                try:
                    for question, outcome in answer_questions(
                        placed, fathom.service(), journal, workers=workers, stop=stop
                    ):
                        outcomes[question.number] = outcome
                        show(question.number)
                        on_row()
                except FathomError as error:
                    problem = error

        # 4. write the table for people
        answers, citations = answer_tables(
            table,
            asked,
            outcomes,
            holds_lists=holds_lists(output),
            source_of=_source_of(fathom),
        )
        write_table(output, answers, sheet=ANSWERS, further={CITATIONS: citations})

    summary = _summary(outcomes, len(asked), time.monotonic() - started, output)
    (err if as_json else out).print(summary, markup=False, soft_wrap=True)
    if problem is not None:
        show_error(problem)
    if len(outcomes) < len(asked):
        words = "stopped; what is answered is kept, and the same command goes on from there"
        err.print(words, soft_wrap=True)
        raise typer.Exit(1 if problem is not None else 130)
    if any(isinstance(outcome, FathomError) for outcome in outcomes.values()):
        raise typer.Exit(1)


def _check_output(questions: Path, output: Path, journal: Path, *, fresh: bool) -> None:
    """Raise TableError if the output would take something away that no batch wrote."""
    if output.exists() and output.samefile(questions):
        raise TableError(
            f"{output} is the table of the questions", hint="give another file with -o"
        )
    if output.exists() and not journal.exists() and not fresh:
        raise TableError(
            f"{output} is there already, and without {journal.name} it is no unfinished batch",
            hint="give another file with -o, or overwrite it with --fresh",
        )


def _default_documents(
    fathom: Any,  # noqa: ANN401
    references: list[str] | None,
    collection: str | None,
) -> "list[Document]":
    """Return the documents of the rows that name none."""
    ids = document_ids(fathom, references, collection)
    chosen = fathom.documents() if ids is None else fathom.store.with_ids(ids)
    if not chosen:
        where = "the library" if ids is None else f"the collection {collection!r}"
        raise EmptyLibraryError(
            f"{where} holds no document to ask about",
            hint="add one first: fathom ingest PATH; fathom list shows what is there",
        )
    return list(chosen)


def _source_of(fathom: Any) -> Callable[[int], str | None]:  # noqa: ANN401
    """Return a function from a document's number to its source, where it is still there."""
    sources = {document.id: document.source for document in fathom.documents()}
    return sources.get


@contextmanager
def _stopped_by_signal(journal: "Journal") -> Iterator[Event]:
    """Yield an event that Ctrl-C sets, or a kind kill; the second one ends the process at once."""
    stop = Event()

    def on_signal(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        journal.stop()
        stop.set()
        err.print("stopping; once more ends at once")

    before = {sign: signal.signal(sign, on_signal) for sign in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)


@contextmanager
def _rows_bar(total: int) -> Iterator[Callable[[], None]]:
    """Show a bar of rows with the time left at the rate so far; call what is yielded for each."""
    columns = (TextColumn("answering"), BarColumn(), TextColumn("{task.fields[figures]}"))
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("", total=total, figures=f"0 of {plural(total, 'row')}")
        started, done = time.monotonic(), 0

        def on_row() -> None:
            nonlocal done
            done += 1
            left = round((time.monotonic() - started) / done * (total - done))
            words = f"{done} of {plural(total, 'row')}; {timedelta(seconds=left)} left"
            progress.update(task, completed=done, figures=words)

        yield on_row


def _summary(outcomes: "dict[int, Outcome]", total: int, seconds: float, output: Path) -> str:
    """Return what came of the rows, in one line."""
    answers = [o for o in outcomes.values() if not isinstance(o, FathomError)]
    not_found = sum(answer.abstained for answer in answers)
    routes = [str(answer.receipt.route) for answer in answers]
    by_route = ", ".join(f"{routes.count(route)} by {route}" for route in sorted(set(routes)))
    errors = len(outcomes) - len(answers)
    return (
        f"{len(answers)} of {plural(total, 'row')} answered"
        + (f" ({by_route})" if by_route else "")
        + (f", {not_found} of them with 'not found'" if not_found else "")
        + (f"; {errors} with an error, see its column" if errors else "")
        + f"; {timedelta(seconds=round(seconds))}; {output}"
    )
