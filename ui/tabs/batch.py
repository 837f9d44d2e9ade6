"""A table of questions in, progress that outlives the page, a table of cited answers out."""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import gradio as gr
from fastapi import APIRouter, Depends, Request, UploadFile

from eval.batch import Outcome, Question
from rag.errors import BatchNotFoundError, FathomError
from rag.types import Answer
from ui.answer_html import ROUTE_NAMES
from ui.assembly import Fathom
from ui.batch_folder import UNFINISHED, Batch, State
from ui.formatting import error_html, plain_html, plural
from ui.library import Library
from ui.tabs.parts import MOST_ROWS, LibraryOf, html_view, offered, table_view, unexpected
from ui.uploads import upload_name

_KINDS = (".csv", ".tsv", ".xlsx", ".jsonl", ".parquet")
_ROUTES = {"Auto": None} | {name: route for route, name in ROUTE_NAMES.items()}
_SECONDS_BETWEEN = 1.0  # of two looks at a batch that runs
_SHOWN_CHARS = 400  # of an answer in the list of rows
_SAVED_AS = {"XLSX, with links": "xlsx", "CSV": "csv", "JSON Lines": "jsonl"}
_EMPTY = (
    '<div class="empty"><h2>A table of questions</h2><p>A column <code>question</code>; beside it,'
    " if you like, <code>id</code>, <code>document</code> and <code>route</code>. Each row is"
    " answered with its quotations and its receipt; you may close the page meanwhile.</p></div>"
)
_STATES = {
    State.READY: "Not started",
    State.WAITING: "Waits for another batch of yours",
    State.RUNNING: "Running",
    State.STOPPED: "Stopped",
    State.DONE: "Done",
    State.FAILED: "Ended early",
}
_STARTS = {
    State.READY: "Start",
    State.STOPPED: "Go on",
    State.FAILED: "Go on",
    State.DONE: "Ask the rows with a fault again",
}

Shown = tuple[Any, ...]  # current batch, its head, its progress, its rows, the list, the timer


def build_batch(library_of: LibraryOf, tab: gr.Tab) -> None:
    """Lay out the tab inside the running Blocks and wire it."""
    current = gr.State("")
    timer = gr.Timer(_SECONDS_BETWEEN, active=False)
    with gr.Row(elem_id="batch"):
        with gr.Column(elem_id="batch-side", min_width=0):
            table = table_view(
                "/uploads/table",
                "batch",
                label="Questions",
                kinds=_KINDS,
                about='<p class="none">CSV, XLSX, JSON Lines or Parquet</p>',
                elem_id="batch-table",
            )
            documents = gr.Dropdown(
                [],
                label="Documents",
                info="Of rows that name none; none chosen: all",
                multiselect=True,
                value=[],
            )
            route = gr.Radio(
                list(_ROUTES), value="Auto", label="Route", info="Of rows that name none"
            )
            past = html_view(("open",), elem_classes="past")
        with gr.Column(elem_id="batch-shown", min_width=0):
            head = html_view(("start", "stop", "remove"), elem_classes="batch-head", value=_EMPTY)
            progress = html_view(elem_classes="batch-progress")
            rows = html_view(elem_classes="batch-rows")

    def known(chosen: list[int], request: gr.Request) -> Any:  # noqa: ANN401 - a Gradio update
        return offered([(d.title, d.id) for d in library_of(request).documents()], chosen)

    def look(batch_id: str, request: gr.Request) -> Shown:
        return _shown(library_of(request), batch_id)

    def look_at_made(
        event: gr.EventData, chosen: list[int], route_name: str, request: gr.Request
    ) -> Shown:
        if not event.batch:  # nothing came of the table; what is open stays open
            return tuple(gr.skip() for _ in whole)
        return aim(str(event.batch), chosen, route_name, request)

    def look_at(event: gr.EventData, request: gr.Request) -> Shown:
        return _shown(library_of(request), str(event.batch))

    def aim(batch_id: str, chosen: list[int], route_name: str, request: gr.Request) -> Shown:
        library = library_of(request)
        try:
            if batch_id and library.batches.find(batch_id).state is State.READY:
                route = _ROUTES[route_name]
                library.batches.aim(batch_id, document_ids=chosen or None, route=route)
        except FathomError as error:
            return _shown(library, batch_id, error_html(error.message, error.hint))
        return _shown(library, batch_id)

    def act(name: str) -> Any:  # noqa: ANN401 - a handler
        def handler(batch_id: str, request: gr.Request) -> Shown:
            library = library_of(request)
            try:
                getattr(library.batches, name)(batch_id)
            except FathomError as error:
                return _shown(library, batch_id, error_html(error.message, error.hint))
            except Exception:
                return _shown(library, batch_id, unexpected())
            return _shown(library, batch_id)

        return handler

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    whole = [current, head, progress, rows, past, timer]
    tab.select(known, [documents], [documents], **quiet)
    # One after the other: a look asked for first must not be shown last, and stop the timer.
    quiet |= {"concurrency_id": "batch", "concurrency_limit": 1}
    tab.select(look, [current], whole, **quiet)
    timer.tick(look, [current], whole, **quiet)
    # Each table is looked at, one given in the moment in which another is refused, too.
    table.batch(look_at_made, [documents, route], whole, trigger_mode="multiple", **quiet)
    gr.on(
        [documents.input, route.input],
        aim,
        [current, documents, route],
        whole,
        trigger_mode="always_last",
        **quiet,
    )
    past.open(look_at, None, whole, **quiet)
    head.start(act("start"), [current], whole, **quiet)
    head.stop(act("stop"), [current], whole, **quiet)
    head.remove(act("delete"), [current], whole, **quiet)


def tables_router(fathom: Fathom) -> APIRouter:
    """Return the route that the page sends a table to; programs use `POST /v1/batches/file`."""
    router = APIRouter()

    def library(request: Request) -> Library:
        return fathom.for_user(request)

    @router.post("/uploads/table", include_in_schema=False)
    def upload(own: Annotated[Library, Depends(library)], file: UploadFile) -> dict[str, str]:
        try:
            name = Path(upload_name(file.filename)).name
            batch = own.batches.create(name, file.file.read())
        except FathomError as error:
            return {"made": "", "html": error_html(error.message, error.hint)}
        except Exception:
            return {"made": "", "html": unexpected()}
        return {"made": batch.id, "html": ""}

    return router


def _shown(library: Library, batch_id: str, problem: str = "") -> Shown:
    """Return everything that is shown of a batch, or of the one that runs if none is open."""
    batches = library.batches.all()
    ids = [batch.id for batch in batches]
    is_running = any(batch.state in UNFINISHED for batch in batches)
    if batch_id not in ids:
        batch_id = next((b.id for b in batches if b.state in UNFINISHED), "")
    listed, timer = batches_html(batches, batch_id), gr.Timer(active=is_running)
    try:
        batch = library.batches.find(batch_id)
        told = library.batches.told(batch)
        _, questions, outcomes = library.batches.outcomes(batch)
    except BatchNotFoundError:  # deleted in this moment, or none was ever made
        return "", _EMPTY + problem, "", "", listed, timer
    return (
        batch_id,
        head_html(batch, told) + problem,
        progress_html(batch, told),
        rows_html(batch, questions, outcomes),
        listed,
        timer,
    )


def head_html(batch: Batch, told: dict[str, Any]) -> str:
    """Return what a batch is called, how it stands, and what can be done with it."""
    words = [_STATES[batch.state], plural(batch.num_rows, "row")]
    if batch.faults and batch.state not in UNFINISHED:
        words.append(
            f"{len(batch.faults):,} cannot be asked"
            if batch.state is State.READY
            else f"{len(batch.faults):,} with a fault"
        )
    buttons = ""
    if batch.state in UNFINISHED:
        buttons += _button("stop", "Stop")
    elif batch.state is not State.DONE or batch.faults:
        buttons += _button("start", _STARTS[batch.state])
    if told["answered"]:
        buttons += "".join(
            f'<button type="button" class="quiet" data-save="/v1/batches/{batch.id}/result?format='
            f'{kind}">Save as {name}</button>'
            for name, kind in _SAVED_AS.items()
        )
    problem = error_html(batch.problem.message, batch.problem.hint) if batch.problem else ""
    return (
        f'<h2>{plain_html(batch.name)}</h2><p class="facts" role="status">{"; ".join(words)}</p>'
        f'{problem}<div class="row">{buttons}</div><details class="delete"><summary>Delete'
        f"</summary><p>The table, its answers and their receipts go.</p>"
        f'<button type="button" class="quiet danger" data-event="remove">Delete for good</button>'
        "</details>"
    )


def _button(event: str, words: str) -> str:
    return f'<button type="button" class="quiet" data-event="{event}">{words}</button>'


def progress_html(batch: Batch, told: dict[str, Any]) -> str:
    """Return how far a batch is: rows, time left, what is being read."""
    if batch.state is State.READY:
        return ""
    done = told["answered"]
    fraction = 100 * done / batch.num_rows
    words = f"{done:,} of {plural(batch.num_rows, 'row')} answered"
    if told["seconds_left"]:
        words += f"; {timedelta(seconds=round(told['seconds_left']))} left"
    now = f'<span class="now">{plain_html(told["now"][:200])}</span>' if told["now"] else ""
    return (
        '<div class="ingest" role="progressbar" aria-label="Rows answered" aria-valuemin="0"'
        f' aria-valuemax="100" aria-valuenow="{fraction:.0f}">{now}'
        f'<span class="bar" aria-hidden="true"><i data-width="{fraction:.1f}"></i></span>'
        f'<span class="words">{words}</span></div>'
    )


def rows_html(batch: Batch, questions: Sequence[Question], outcomes: dict[int, Outcome]) -> str:
    """Return the rows in their order, each with its answer or what is wrong with it."""
    shown = questions[:MOST_ROWS]
    body = "".join(_row_html(question, outcomes.get(question.number)) for question in shown)
    beyond = [number for number in batch.faults if number >= len(shown)]
    rest = ""
    if len(questions) > len(shown):
        rest = f"and {len(questions) - len(shown):,} more rows, which are in the saved table"
    if beyond:
        rest += f"; {len(beyond):,} of them have a fault, the first is row {min(beyond) + 1:,}"
    return (
        '<table class="documents questions"><thead><tr><th scope="col">Row</th><th scope="col">'
        'Question</th><th scope="col">Document</th><th scope="col">Answer</th></tr></thead>'
        f"<tbody>{body}</tbody></table>" + (f'<p class="none">{rest}</p>' if rest else "")
    )


def _row_html(question: Question, outcome: Outcome | None) -> str:
    match outcome:
        case None:
            said = '<span class="words">not yet</span>'
        case Answer():
            text = " ".join(outcome.answer.split())
            cut = f"{text[:_SHOWN_CHARS]} …" if len(text) > _SHOWN_CHARS else text
            route = ROUTE_NAMES.get(outcome.receipt.route, outcome.receipt.route)
            said = f'{plain_html(cut)}<span class="label">{route}</span>'
        case FathomError():
            said = error_html(outcome.message, outcome.hint).replace(' role="alert"', "")
    about = "" if question.document is None else str(question.document)
    if question.route:
        about += f" ({question.route})"
    return (
        f'<tr><td class="id">{plain_html(question.id)}</td><td>{plain_html(question.text)}</td>'
        f"<td>{plain_html(about.strip())}</td><td>{said}</td></tr>"
    )


def batches_html(batches: Sequence[Batch], current: str) -> str:
    """Return the batches as a list of buttons, the open one marked."""
    if not batches:
        return ""
    items = "".join(
        f'<li><button type="button" data-event="open" data-batch="{b.id}"'
        f"{' aria-current=true' if b.id == current else ''}>"
        f'<span class="title">{plain_html(b.name)}</span>'
        f'<span class="when">{b.state}, {b.created_at[:10]}</span>'
        "</button></li>"
        for b in batches
    )
    return f'<nav aria-label="Batches"><p class="label-of">Batches</p><ul>{items}</ul></nav>'
