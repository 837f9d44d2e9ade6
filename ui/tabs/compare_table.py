"""A table of questions through every way to answer, and the reports of past ones."""

import csv
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import gradio as gr
from fastapi import APIRouter, Depends, Request, UploadFile

from eval.arms import DEFAULT_ARMS, Arm
from rag.errors import FathomError
from ui.assembly import Fathom
from ui.comparing import Comparison
from ui.formatting import amount, error_html, plain_html, plural
from ui.given_tables import KINDS, GivenTable, GivenTables, read_questions
from ui.library import Library
from ui.tabs.parts import (
    MOST_ROWS,
    LibraryOf,
    download_view,
    html_view,
    say_stopping,
    stop_shown,
    table_view,
    unexpected,
)
from ui.uploads import upload_name

_SECONDS_BETWEEN = 1.0  # of two looks at what runs
_COLUMNS = (
    '<p class="none columns">CSV, TSV, XLSX or JSON Lines, a question a row: <code>id</code>,'
    " <code>question</code>, <code>document</code> (title or number), <code>answers</code>,"
    " <code>answerable</code>; where it is known also <code>evidence</code>.</p>"
)
_EMPTY = (
    '<div class="empty"><h2>Which way of reading is right more often?</h2><p>A table of questions'
    " whose answers are known goes through each way to answer. The report pairs the answers, says"
    " whether a difference is shown, and what each way costs.</p></div>"
)
_ABOUT_ARMS = (
    "closed: what the model knows; hybrid: retrieval; full: everything; router: what Fathom chooses"
)


def build_compare_table(
    library_of: LibraryOf, given_tables: GivenTables, tab: gr.Tab, inner: gr.Tab
) -> None:
    """Lay out the part inside the running Blocks and wire it.

    Args:
        library_of: whose comparisons they are.
        given_tables: what was given of them and waits for its button.
        tab: Compare.
        inner: this part of it.
    """
    table = gr.State("")
    with gr.Row(elem_id="compare-table"):
        with gr.Column(elem_id="asking", min_width=0):
            file = table_view(
                "/uploads/questions",
                "table",
                label="Table of questions",
                kinds=KINDS,
                about=_COLUMNS,
                elem_id="questions",
            )
            template = gr.Button("Save a template", size="sm", elem_id="template")
            arms = gr.CheckboxGroup(
                [arm.value for arm in Arm],
                value=[arm.value for arm in DEFAULT_ARMS],
                label="Ways to answer",
                info=_ABOUT_ARMS,
                elem_id="arms",
            )
            go = gr.Button(
                "Compare them all", variant="primary", interactive=False, elem_id="table-go"
            )
            stop = gr.Button("Stop", visible=False, elem_id="table-stop")
        with gr.Column(elem_id="outcomes", min_width=0):
            note = html_view(elem_classes="compare-note")
            now = html_view(elem_classes="compare-now")
            report = html_view(
                ("save", "open", "failures"), kind="evidence", elem_classes="report-panel"
            )
            past = html_view(("open", "resume", "remove"), elem_classes="comparisons")
    saving = download_view()
    clock = gr.Timer(_SECONDS_BETWEEN, active=False)

    def take(event: gr.EventData, request: gr.Request) -> tuple[str, str, Any]:
        # What is said of a table, and that it can be asked, are true from the same moment on.
        name = str(event.table)
        read = given_tables.find(library_of(request).owner, name)
        return name, table_html(read) if read else "", gr.update(interactive=read is not None)

    def begin(given: str, chosen: list[str], request: gr.Request) -> tuple[Any, ...]:
        library = library_of(request)
        read = given_tables.find(library.owner, given)
        if read is None or not chosen:
            problem = error_html("nothing is to be compared", "give a table and choose a way")
            return problem, *shown(library)
        try:
            library.comparisons.begin(read.title, read.examples, [Arm(arm) for arm in chosen])
        except FathomError as error:
            return faults_html(read.title, error), *shown(library)
        except Exception:
            return unexpected(), *shown(library)
        return "", *shown(library)

    def resume(event: gr.EventData, request: gr.Request) -> tuple[Any, ...]:
        library = library_of(request)
        try:
            library.comparisons.go_on(str(event.comparison))
        except FathomError as error:
            return error_html(error.message, error.hint), *shown(library)
        return "", *shown(library)

    def remove(event: gr.EventData, request: gr.Request) -> tuple[Any, ...]:
        library = library_of(request)
        try:
            library.comparisons.delete(str(event.comparison))
        except FathomError as error:
            return error_html(error.message, error.hint), *shown(library)
        return '<p role="status">The comparison is deleted.</p>', *shown(library)

    def look(request: gr.Request) -> tuple[Any, ...]:
        return shown(library_of(request))

    def halt(request: gr.Request) -> None:
        library_of(request).comparisons.stop()

    def open_report(event: gr.EventData, request: gr.Request) -> str:
        comparisons = library_of(request).comparisons
        name = str(event.comparison)
        try:
            return report_html(
                name,
                comparisons.title(name),
                comparisons.report(name),
                has_failures=bool(comparisons.failures(name)),
            )
        except FathomError as error:
            return _panel("Not found", error_html(error.message, error.hint))
        except Exception:
            return _panel("Not found", unexpected())

    def open_failures(event: gr.EventData, request: gr.Request) -> str:
        comparisons = library_of(request).comparisons
        name = str(event.comparison)
        try:
            return failures_html(name, comparisons.title(name), comparisons.failures(name))
        except FathomError as error:
            return _panel("Not found", error_html(error.message, error.hint))
        except Exception:
            return _panel("Not found", unexpected())

    def save(event: gr.EventData, request: gr.Request) -> str:
        name = str(event.comparison)
        text = library_of(request).comparisons.numbers(name)
        return json.dumps({"name": f"{name}.json", "type": "application/json", "text": text})

    def save_template(request: gr.Request) -> str:
        text = template_csv([document.title for document in library_of(request).documents()])
        return json.dumps({"name": "questions.csv", "type": "text/csv", "text": text})

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    state = [now, past, go, stop, clock]
    file.table(take, None, [table, note, go], **quiet)
    past.open(open_report, None, [report], **quiet)
    report.open(open_report, None, [report], **quiet)
    report.failures(open_failures, None, [report], **quiet)
    report.save(save, None, [saving], **quiet)
    template.click(save_template, None, [saving], **quiet)
    # One after the other: a look asked for first must not be shown last, and stop the clock.
    quiet |= {"concurrency_id": "comparisons", "concurrency_limit": 1}
    go.click(begin, [table, arms], [note, *state], **quiet)
    past.resume(resume, None, [note, *state], **quiet)
    past.remove(remove, None, [note, *state], **quiet)
    gr.on([tab.select, inner.select, clock.tick], look, None, state, **quiet)
    say_stopping(stop)
    stop.click(halt, None, None, queue=False, api_visibility="private")


def questions_router(fathom: Fathom) -> APIRouter:
    """Return the route that the page sends a table to; programs use `fathom compare`."""
    router = APIRouter()

    def library(request: Request) -> Library:
        return fathom.for_user(request)

    @router.post("/uploads/questions", include_in_schema=False)
    def upload(own: Annotated[Library, Depends(library)], file: UploadFile) -> dict[str, str]:
        name = Path(upload_name(file.filename)).name
        scratch = own.settings.home / "tmp"
        scratch.mkdir(parents=True, exist_ok=True)
        try:
            with TemporaryDirectory(dir=scratch) as folder:
                path = Path(folder) / name
                with path.open("wb") as copy:
                    shutil.copyfileobj(file.file, copy)
                read = read_questions(path)
        except FathomError as error:
            return {"made": "", "html": faults_html(name, error)}
        except Exception:
            return {"made": "", "html": unexpected()}
        return {"made": fathom.given_tables.hold(own.owner, read), "html": ""}

    return router


def template_csv(titles: Sequence[str]) -> str:
    """Return a table to begin with: a row for each of the first documents."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["id", "question", "document", "answers", "answerable"])
    for number, title in enumerate(titles[:3] or ["a title"], start=1):
        asked = ["What does it say?", "What does it not say?"]
        writer.writerow([f"q{number}a", asked[0], title, "the words that answer it", "yes"])
        writer.writerow([f"q{number}b", asked[1], title, "", "no"])
    return out.getvalue()


# ---- drawing ------------------------------------------------------------------------------------


def table_html(read: GivenTable) -> str:
    """Return what a table holds, in a sentence."""
    names = {example.document for example in read.examples}
    without = sum(not example.answerable for example in read.examples)
    more = f", {without:,} of them without an answer there" if without else ""
    return (
        f'<p role="status"><b>{plain_html(read.title)}</b>:'
        f" {plural(len(read.examples), 'question')} about {plural(len(names), 'document')}{more}."
        " Choose the ways to answer and compare.</p>"
    )


def faults_html(title: str, error: FathomError) -> str:
    """Return every fault of a table, one a line, and what is expected."""
    faults = error.message.split("\n")
    if len(faults) == 1:
        return error_html(error.message, error.hint)
    items = "".join(f"<li>{plain_html(fault)}</li>" for fault in faults[:MOST_ROWS])
    more = len(faults) - MOST_ROWS
    rest = f'<p class="none">and {more:,} more</p>' if more > 0 else ""
    return (
        f'<div class="problem" role="alert"><b>{plain_html(title)} was not taken.</b><br>'
        f'{plain_html(error.hint or "")}</div><ul class="faults" tabindex="0"'
        f' aria-label="Faults">{items}</ul>{rest}'
    )


def shown(library: Library) -> tuple[Any, ...]:
    """Return what runs, the list, the two buttons and whether the clock goes on."""
    found = library.comparisons.all()
    running = next((one for one in found if one.state == "running"), None)
    return (
        now_html(running) if running else "",
        list_html(found),
        gr.update(visible=running is None),
        gr.skip() if running and running.is_stopping else stop_shown(running is not None),
        gr.update(active=running is not None),
    )


def now_html(running: Comparison) -> str:
    """Return how far the comparison that runs has come."""
    of_rows = running.of_rows or 1
    share = 100 * running.num_rows / of_rows
    parts = [f"{running.num_rows:,} of {plural(of_rows, 'answer')}"]
    if running.waiting:
        parts.append(f"waiting for the model, place {running.waiting}")
    elif running.arm:
        parts.append(f"now by {running.arm}")
    if running.seconds_left is not None:
        parts.append(f"about {_time(running.seconds_left)} left")
    return (
        '<div class="ingest" role="progressbar" aria-label="Comparing" aria-valuemin="0"'
        f' aria-valuemax="100" aria-valuenow="{share:.0f}">'
        f'<span class="now">{plain_html(running.title)}</span>'
        f'<span class="bar" aria-hidden="true"><i data-width="{share:.1f}"></i></span>'
        f'<span class="words">{plain_html("; ".join(parts))}</span></div>'
    )


def list_html(found: Sequence[Comparison]) -> str:
    """Return the comparisons that there are, each with what can be done with it."""
    if not found:
        return _EMPTY
    items = "".join(_item(one) for one in found[:MOST_ROWS])
    more = len(found) - MOST_ROWS
    rest = f'<p class="none">and {more:,} more</p>' if more > 0 else ""
    return f'<h2>Comparisons</h2><ul class="past-comparisons">{items}</ul>{rest}'


def _item(one: Comparison) -> str:
    answers = plural(one.num_rows, "answer") if one.num_rows else "report alone"
    if one.state == "stopped" and one.of_rows is not None:
        answers = f"stopped after {one.num_rows:,} of {plural(one.of_rows, 'answer')}"
    elif one.state == "running":
        answers = "running"
    words = " · ".join(filter(None, [one.started[:10], ", ".join(one.arms), answers]))
    name = f'data-comparison="{one.name}"'
    buttons = ""
    if one.has_report:
        buttons += _button("open", name, "Open", f"Open the report of {one.title}")
    if one.state == "stopped":
        buttons += _button("resume", name, "Go on", f"Go on with {one.title}")
    if one.state != "running":
        buttons += (
            f'<details class="sure"><summary aria-label="Delete {plain_html(one.title)}">Delete'
            f'</summary><button type="button" class="quiet danger" data-event="remove" {name}>'
            "Delete for good</button></details>"
        )
    problem = error_html(one.problem, "go on with it when that is mended") if one.problem else ""
    return (
        f'<li><span class="title">{plain_html(one.title)}</span>'
        f'<span class="what">{plain_html(words)}</span>'
        f'<span class="row">{buttons}</span>{problem}</li>'
    )


def _button(event: str, data: str, words: str, label: str) -> str:
    return (
        f'<button type="button" class="quiet" data-event="{event}" {data}'
        f' aria-label="{plain_html(label)}">{words}</button>'
    )


def report_html(name: str, title: str, body: str, *, has_failures: bool) -> str:
    """Return a report; `body` is what `eval.report` made of numbers and escaped names."""
    data = f'data-comparison="{name}"'
    buttons = ""
    if has_failures:
        label = "Where they disagree: questions that some answered rightly and others did not"
        buttons = _button("failures", data, "Where they disagree", label)
    return _panel(title, body, buttons + _button("save", data, "Save as JSON", "Save as JSON"))


def failures_html(name: str, title: str, body: str) -> str:
    """Return the questions that divide the ways to answer; `body` is of `eval.report`, escaped."""
    data = f'data-comparison="{name}"'
    back = _button("open", data, "Back to the report", "Back to the report")
    return _panel(f"{title}: where the ways to answer disagree", body, back)


def _panel(title: str, inside: str, buttons: str = "") -> str:
    """Return the panel; its button to close it is worked by `page.js`."""
    return (
        f'<article class="report"><div class="head"><h2>{plain_html(title)}</h2>'
        f'<span class="row">{buttons}'
        '<button type="button" class="quiet" data-close>Close</button></span></div>'
        f'<div class="inside">{inside}</div></article>'
    )


def _time(seconds: float) -> str:
    if seconds < 90:
        return amount(round(seconds), "seconds").replace(".0 s", " s")
    return f"{seconds / 60:,.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
