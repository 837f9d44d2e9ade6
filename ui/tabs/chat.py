"""The chat: a question, the answer as it is written, its quotations and its receipt."""

import threading
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from rag.answering.asked import MAX_QUESTION_CHARS
from rag.answering.conversation import Turn
from rag.answering.service import AnswerEvent, AnswerReady
from rag.errors import DocumentNotFoundError, FathomError
from rag.store.receipts import REDACTED
from rag.types import Conversation, Exchange, Route
from ui.answer_html import ROUTE_NAMES, answer_card
from ui.fair_queue import Waiting
from ui.formatting import amount, error_html, plain_html, plural
from ui.library import Library
from ui.tabs.conversations import (
    LIST_EVENTS,
    TOOL_EVENTS,
    View,
    conversation_view,
    document_lengths,
    exported,
    list_html,
    tools_html,
)
from ui.tabs.evidence import build_evidence
from ui.tabs.parts import (
    LibraryOf,
    download_view,
    html_view,
    offered,
    say_stopping,
    stop_shown,
    thrift_slider,
    unexpected,
)
from ui.tabs.upload import build_upload
from ui.tabs.writing import paced, status_html

_ROUTES = {"Auto": None} | {name: route for route, name in ROUTE_NAMES.items()}
_EVERYTHING = ("all documents", "")  # label and value; a collection's name is never empty
_EMPTY = (
    '<div class="empty"><h2>Ask your documents</h2><p>Every answer shows the sentences it stands'
    " on, and a receipt of how the documents were read.</p></div>"
)
_NO_DOCUMENT = (
    '<div class="empty"><h2>No document yet</h2><p>Drop one under Add documents, or add some in'
    " the Library or with <code>fathom ingest PATH</code>.</p></div>"
)


@dataclass(frozen=True, slots=True)
class Asked:
    """One question on its way: of which documents (None: all), by which route (None: chosen).

    `again` is the receipt of an answer to it that is there already; `thrift` weighs the routes
    where none was chosen; `number` names it to Stop.
    """

    question: str
    document_ids: tuple[int, ...] | None
    route: Route | None
    again: str | None
    thrift: float
    number: str


def build_chat(
    library_of: LibraryOf, blocks: gr.Blocks, tab: gr.Tab, thrift_by_default: float
) -> gr.Slider:
    """Lay out the tab inside the running Blocks and wire it; return its dial of thrift."""
    stops: dict[str, threading.Event] = {}
    conversation = gr.State(None)  # its id, None until its first answer
    asked = gr.State(None)
    with gr.Row(elem_id="chat"):
        with gr.Column(elem_id="side", min_width=0):
            collection = gr.Dropdown(
                [_EVERYTHING], value="", label="Collection", visible=False, elem_id="collection"
            )
            picker = gr.CheckboxGroup(
                [], label="Documents", info="None checked: all of them", elem_id="documents"
            )
            held = html_view()
            uploaded = build_upload(label="Add documents", elem_id="upload")
            route = gr.Radio(
                list(_ROUTES), value="Auto", label="Route", info="Auto weighs what fits"
            )
            thrift = thrift_slider(thrift_by_default, "thrift")
            with gr.Column(elem_id="past", min_width=0):
                new = gr.Button("New conversation", size="sm", elem_id="new")
                search = gr.Textbox(
                    label="Past conversations", placeholder="Search them", elem_id="search"
                )
                past = html_view(LIST_EVENTS, elem_classes="past")
        with gr.Column(elem_id="talk", min_width=0):
            tools = html_view(TOOL_EVENTS, elem_classes="tools", value=tools_html(None))
            view = html_view(
                ("cite", "again"),
                kind="conversation",
                elem_id="conversation",
                value={"turns": [], "busy": False, "empty": _EMPTY},
            )
            with gr.Row(elem_id="composer"):
                box = gr.Textbox(
                    placeholder="Ask a question",
                    label="Question",
                    show_label=False,
                    container=False,
                    autofocus=True,
                    max_lines=6,
                    max_length=MAX_QUESTION_CHARS,
                    elem_id="question",
                )
                ask = gr.Button("Ask", variant="primary", min_width=88, elem_id="ask")
                stop = gr.Button("Stop", min_width=88, visible=False, elem_id="stop")
        with gr.Column(elem_id="beside", min_width=0):
            build_evidence(library_of, view)
    saving = download_view()

    # ---- asking ---------------------------------------------------------------------------------

    def ask_question(
        question: str,
        running: Asked | None,
        current: str | None,
        checked: list[int],
        within: str,
        route_name: str,
        thrifty: float,
        request: gr.Request,
    ) -> tuple[Any, ...]:
        if not question.strip():
            raise gr.Error("The question is empty; type one first.", print_exception=False)
        library = library_of(request)
        ids = [d.id for d in library.documents(within)] if within and not checked else checked
        now = Asked(
            question.strip(),
            tuple(ids) if ids or within else None,
            _ROUTES[route_name],
            None,
            thrifty,
            uuid.uuid4().hex,
        )
        return "", *start(now, running, library, current)

    def ask_again(
        running: Asked | None,
        current: str | None,
        thrifty: float,
        event: gr.EventData,
        request: gr.Request,
    ) -> tuple[Any, ...]:
        library = library_of(request)
        try:
            question, ids = library.receipts.asked(str(event.receipt))
        except DocumentNotFoundError as error:
            raise gr.Error(f"{error.message}; {error.hint}", print_exception=False) from error
        if question == REDACTED:
            raise gr.Error("The question is gone with a document.", print_exception=False)
        route = Route(str(event.route))
        now = Asked(question, tuple(ids), route, str(event.receipt), thrifty, uuid.uuid4().hex)
        return start(now, running, library, current)

    def start(
        now: Asked, running: Asked | None, library: Library, current: str | None
    ) -> tuple[Any, ...]:
        if running and running.number in stops:
            raise gr.Error("An answer is being written; stop it first.", print_exception=False)
        stops[now.number] = threading.Event()
        exchanges = _exchanges(library, current)
        past_view = conversation_view(library, exchanges, busy=True)
        waiting = _with_card(
            past_view, now, _turn_of(exchanges, now), status_html("Waiting for the model")
        )
        return now, waiting, gr.update(visible=False), stop_shown(True)

    def answer(
        now: Asked, current: str | None, request: gr.Request
    ) -> Iterator[tuple[View, str | None]]:
        try:
            library = library_of(request)
            exchanges = _exchanges(library, current)
            past_view = conversation_view(library, exchanges, busy=True)
            turn = _turn_of(exchanges, now)

            def shown(card: str, *, busy: bool = True) -> View:
                return {**_with_card(past_view, now, turn, card), "busy": busy}

            yield shown(status_html("Preparing the model")), current
            try:
                earlier = exchanges if turn is None else exchanges[:turn]
                for event in paced(_stream(library, now, earlier, stops[now.number])):
                    if not isinstance(event, AnswerReady):
                        yield shown(event), current
                        continue
                    given = event.answer
                    current = library.conversations.add(given.receipt.id, current, again=now.again)
                    card = answer_card(given, num_chars=document_lengths(library, [given]))
                    yield shown(card, busy=False), current
            except FathomError as error:
                yield shown(error_html(error.message, error.hint), busy=False), current
            except Exception:
                yield shown(unexpected(), busy=False), current
        finally:
            halt(now)  # a page that was closed stops the model too

    def finish(
        now: Asked, current: str | None, searched: str, request: gr.Request
    ) -> tuple[Any, ...]:
        stops.pop(now.number, None)
        library = library_of(request)
        return (
            *listed(library, current, searched),
            _held_html(library),
            gr.update(visible=True),
            stop_shown(False),
        )

    def halt(now: Asked | None) -> None:
        if now and (stop_event := stops.get(now.number)):
            stop_event.set()

    # ---- documents and conversations ------------------------------------------------------------

    def documents(
        checked: list[int],
        chosen: str,
        running: Asked | None,
        current: str | None,
        request: gr.Request,
    ) -> tuple[Any, Any, Any]:
        library = library_of(request)
        names = [found.name for found in library.store.collections()]
        within = chosen if chosen in names else ""
        known = library.documents(within or None)
        choices = [(_document_label(d.title, d.num_pages), d.id) for d in known]
        shown: Any = gr.skip()
        if not (running and running.number in stops):
            # what a document said may have gone with it
            said = _exchanges(library, current)
            shown = conversation_view(library, said, empty=_EMPTY if known else _NO_DOCUMENT)
        taken_back: dict[str, Any] = {} if within == chosen else {"value": within}
        return (
            gr.update(
                choices=[_EVERYTHING, *((name, name) for name in names)],
                visible=bool(names),
                **taken_back,
            ),
            offered(choices, checked),
            shown,
        )

    def listed(library: Library, current: str | None, searched: str) -> tuple[str, str]:
        found = library.conversations.all(searched)
        return list_html(found, current, searched), tools_html(_find(library, current))

    def find(current: str | None, searched: str, request: gr.Request) -> tuple[str, str]:
        return listed(library_of(request), current, searched)

    def open_one(
        running: Asked | None, searched: str, event: gr.EventData, request: gr.Request
    ) -> tuple[Any, ...]:
        _refuse_while(running, stops)
        library = library_of(request)
        current: str | None = str(event.conversation)
        opened = conversation_view(library, _exchanges(library, current), empty=_EMPTY)
        return current, opened, *listed(library, current, searched)

    def begin_new(running: Asked | None, searched: str, request: gr.Request) -> tuple[Any, ...]:
        _refuse_while(running, stops)
        empty = {"turns": [], "busy": False, "empty": _EMPTY}
        return None, empty, *listed(library_of(request), None, searched)

    def rename(
        current: str | None, searched: str, event: gr.EventData, request: gr.Request
    ) -> tuple[str, str]:
        library = library_of(request)
        if current:
            library.conversations.rename(current, str(event.title))
        return listed(library, current, searched)

    def export(current: str | None, event: gr.EventData, request: gr.Request) -> str:
        library = library_of(request)
        known = _find(library, current)
        if known is None:
            raise gr.Error("There is no conversation to save.", print_exception=False)
        return exported(known, _exchanges(library, current), str(event.kind))

    def remove(
        running: Asked | None, current: str | None, searched: str, request: gr.Request
    ) -> tuple[Any, ...]:
        _refuse_while(running, stops)
        if current:
            library_of(request).conversations.delete(current)
        return begin_new(None, searched, request)

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    waits = [asked, view, ask, stop]
    for started in (
        gr.on(
            [box.submit, ask.click],
            ask_question,
            [box, asked, conversation, picker, collection, route, thrift],
            [box, *waits],
            **quiet,
        ),
        view.again(ask_again, [asked, conversation, thrift], waits, **quiet),
    ):
        started.success(
            answer,
            [asked, conversation],
            [view, conversation],
            concurrency_id="model",
            concurrency_limit=None,  # whose turn it is, `Library.stream` says
            **quiet,
        ).then(finish, [asked, conversation, search], [past, tools, held, ask, stop], **quiet)
    say_stopping(stop)
    stop.click(halt, [asked], None, queue=False, api_visibility="private")

    whole = [conversation, view, past, tools]
    past.open(open_one, [asked, search], whole, **quiet)
    new.click(begin_new, [asked, search], whole, **quiet)
    tools.rename(rename, [conversation, search], [past, tools], **quiet)
    tools.export(export, [conversation], [saving], **quiet)
    tools.remove(remove, [asked, conversation, search], whole, **quiet)
    gr.on(
        [blocks.load, search.change],  # pasting is no input
        find,
        [conversation, search],
        [past, tools],
        trigger_mode="always_last",
        **quiet,
    )
    # documents also come and go on the other tabs
    shelf = {"fn": documents, "inputs": [picker, collection, asked, conversation]} | quiet
    gr.on(
        [blocks.load, tab.select, collection.input, uploaded.upload],
        outputs=[collection, picker, view],
        trigger_mode="always_last",
        **shelf,
    )
    return thrift


def _stream(
    library: Library, now: Asked, earlier: Sequence[Exchange], stop: threading.Event
) -> Iterator[Waiting | AnswerEvent]:
    """Ask, with what was said before; what went with a document is not there any more."""
    history = [
        Turn(given.receipt.standalone_question or exchange.question, given.answer)
        for exchange in earlier
        for given in exchange.answers[-1:]
        if exchange.question != REDACTED
    ]
    return library.stream(
        now.question,
        document_ids=now.document_ids,
        route=now.route,
        history=history,
        thrift=now.thrift,
        stop=stop,
    )


def _with_card(past_view: View, now: Asked, turn: int | None, card: str) -> View:
    """Return the view with one more card: in the turn it repeats, or in a new one."""
    turns = list(past_view["turns"])
    if turn is None:
        turns.append({"question": plain_html(now.question), "answers": [card]})
    else:
        turns[turn] = {**turns[turn], "answers": [*turns[turn]["answers"], card]}
    return {**past_view, "turns": turns}


def _turn_of(exchanges: Sequence[Exchange], now: Asked) -> int | None:
    """Return the number of the exchange whose answer is asked for again, None for a new one."""
    for number, exchange in enumerate(exchanges):
        if any(given.receipt.id == now.again for given in exchange.answers):
            return number
    return None


def _exchanges(library: Library, current: str | None) -> list[Exchange]:
    return library.conversations.exchanges(current) if current else []


def _find(library: Library, current: str | None) -> Conversation | None:
    return next((c for c in library.conversations.all() if c.id == current), None)


def _held_html(library: Library) -> str:
    """Return what the caches of documents that were read whole take now."""
    held = library.document_kv_held_bytes
    words = f"Document KV held for the next question: {amount(held, 'bytes')}" if held else ""
    return f'<p class="none">{words}</p>'


def _refuse_while(running: Asked | None, stops: dict[str, threading.Event]) -> None:
    if running and running.number in stops:
        raise gr.Error("An answer is being written; stop it first.", print_exception=False)


def _document_label(title: str, num_pages: int) -> str:
    return f"{title} ({plural(num_pages, 'page')})" if num_pages else title
