"""One question through every route, side by side; a table of them is in `compare_table`."""

import threading
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from rag.answering.asked import MAX_QUESTION_CHARS
from rag.answering.service import AnswerReady
from rag.errors import FathomError
from rag.types import Route
from ui.answer_html import ROUTE_NAMES, answer_card, gates_html
from ui.formatting import error_html, plain_html, sentence
from ui.given_tables import GivenTables
from ui.library import Library
from ui.tabs.compare_table import build_compare_table
from ui.tabs.conversations import View, document_lengths
from ui.tabs.evidence import build_evidence
from ui.tabs.parts import LibraryOf, html_view, offered, say_stopping, stop_shown, unexpected
from ui.tabs.writing import paced, status_html

_EMPTY = (
    '<div class="empty"><h2>One question, every route</h2><p>The same question is answered from the'
    " whole text, from what is retrieved, and by a scan, so that you can see what each read, what"
    " it cost, and whether they agree. A route whose gates fail says which.</p></div>"
)


def build_compare(library_of: LibraryOf, given_tables: GivenTables, tab: gr.Tab) -> None:
    """Lay out the tab inside the running Blocks and wire it."""
    stops: dict[str, threading.Event] = {}
    running = gr.State("")
    with gr.Tabs(elem_id="compare-kinds"):
        with gr.Tab("One question"), gr.Row(elem_id="compare"):
            with gr.Column(elem_id="compared", min_width=0):
                with gr.Row(elem_id="compare-form"):
                    question = gr.Textbox(
                        label="Question",
                        max_lines=4,
                        max_length=MAX_QUESTION_CHARS,
                        elem_id="compare-question",
                    )
                    documents = gr.Dropdown(
                        [], label="Documents", info="None chosen: all", multiselect=True, value=[]
                    )
                    go = gr.Button("Compare", variant="primary", min_width=110, elem_id="go")
                    stop = gr.Button("Stop", min_width=110, visible=False, elem_id="compare-stop")
                view = html_view(
                    ("cite",),
                    kind="conversation",
                    elem_id="comparison",
                    value={"turns": [], "busy": False, "empty": _EMPTY},
                )
            with gr.Column(elem_id="compare-beside", min_width=0):
                build_evidence(library_of, view)
        with gr.Tab("A table of questions", elem_id="of-tables") as inner:
            build_compare_table(library_of, given_tables, tab, inner)

    def known(chosen: list[int], request: gr.Request) -> Any:  # noqa: ANN401 - a Gradio update
        return offered([(d.title, d.id) for d in library_of(request).documents()], chosen)

    def begin(asked: str) -> tuple[str, Any, Any]:
        if not asked.strip():
            raise gr.Error("The question is empty; type one first.", print_exception=False)
        number = uuid.uuid4().hex
        stops[number] = threading.Event()
        return number, gr.update(visible=False), stop_shown(True)

    def compare(asked: str, chosen: list[int], number: str, request: gr.Request) -> Iterator[View]:
        library, stopped = library_of(request), stops[number]
        cards = [_card(route, status_html("Waiting for its turn")) for route in ROUTE_NAMES]

        def view_of(*, busy: bool) -> View:
            turn = {"question": plain_html(asked.strip()), "answers": list(cards)}
            return {"turns": [turn], "busy": busy, "empty": ""}

        try:
            for place, route in enumerate(ROUTE_NAMES):
                for inside in _answer(library, asked.strip(), chosen, route, stopped):
                    cards[place] = _card(route, inside)
                    yield view_of(busy=True)
            yield view_of(busy=False)
        finally:
            stopped.set()  # a page that was closed stops the model too

    def finish(number: str) -> tuple[Any, Any]:
        stops.pop(number, None)
        return gr.update(visible=True), stop_shown(False)

    def halt(number: str) -> None:
        if stopped := stops.get(number):
            stopped.set()

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    tab.select(known, [documents], [documents], **quiet)
    gr.on([go.click, question.submit], begin, [question], [running, go, stop], **quiet).success(
        compare,
        [question, documents, running],
        [view],
        concurrency_id="model",
        concurrency_limit=None,  # whose turn it is, `Library.stream` says
        **quiet,
    ).then(finish, [running], [go, stop], **quiet)
    say_stopping(stop)
    stop.click(halt, [running], None, queue=False, api_visibility="private")


def _answer(
    library: Library,
    question: str,
    chosen: Sequence[int],
    route: Route,
    stop: threading.Event,
) -> Iterator[str]:
    """Yield the card of one route as it is written; one that cannot be taken says why."""
    if stop.is_set():
        yield '<p class="none">Stopped before its turn.</p>'
        return
    ids = list(chosen) or None
    try:
        service = library.service()
        decision = service.plan(
            question, service.documents(ids), route=route, calibrate=True
        ).decision
        if decision.route is not route:
            yield (
                f"<p>{plain_html(sentence(decision.reason))}</p>"
                + gates_html([gate for gate in decision.gates if gate.route == route])
            )
            return
        events = library.stream(question, document_ids=ids, route=route, stop=stop)
        for event in paced(events):
            if isinstance(event, AnswerReady):
                given = event.answer
                lengths = document_lengths(library, [given])
                yield answer_card(given, num_chars=lengths, can_ask_again=False)
            else:
                yield event
    except FathomError as error:
        yield error_html(error.message, error.hint)
    except Exception:
        yield unexpected()


def _card(route: Route, inside: str) -> str:
    return f'<h3 class="route">{ROUTE_NAMES[route]}</h3>{inside}'
