"""The chat: a question, the answer as it is written, its quotations and its receipt."""

import logging
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from ingest.pipeline import IngestFailure
from ingest.sources import SourceToRead
from rag.answering.service import AnswerReady, RouteChosen
from rag.errors import FathomError
from rag.lm.engine import PrefillProgress, TextPiece
from rag.types import Answer, Citation, IngestProgress, Route
from ui.fair_queue import Waiting
from ui.formatting import (
    SHOWN_QUOTATIONS,
    answer_html,
    citations_html,
    error_html,
    evidence_html,
    place,
    plain_html,
    progress_words,
    receipt_html,
)
from ui.library import Library

logger = logging.getLogger(__name__)

_ROUTES = {"Auto": None, "Full": Route.FULL, "Retrieval": Route.RETRIEVAL, "Scan": Route.SCAN}
_EVIDENCE_CHARS = 500
_EMPTY = (
    "### Ask your documents\nEvery answer shows the sentences it stands on, and a receipt of how"
    " the documents were read."
)
_NO_DOCUMENT = "### No document yet\nAdd one under Documents, or with `fathom ingest PATH`."
_NO_NOTE = "PDF, office documents, web pages, e-mail, tables, notebooks, text"
_EVERYTHING = ("all documents", "")  # label and value; a collection's name is never empty

Turn = dict[str, str]
LibraryOf = Callable[[gr.Request], Library]


def build_chat(library_of: LibraryOf, blocks: gr.Blocks, tab: gr.Tab) -> None:
    """Lay out the tab inside the running Blocks and wire it."""
    stops: dict[str, threading.Event] = {}
    last_answer = gr.State(None)
    request_id = gr.State("")
    with gr.Row(elem_id="chat"):
        with gr.Column(scale=1, min_width=240, elem_id="side"):
            collection = gr.Dropdown(
                [_EVERYTHING],
                value=_EVERYTHING[1],
                label="Collection",
                visible=False,
                elem_id="collection",
            )
            picker = gr.CheckboxGroup(
                [], label="Documents", info="None checked: all of them", elem_id="documents"
            )
            route = gr.Radio(
                list(_ROUTES),
                value="Auto",
                label="Route",
                info="Auto reads everything where that fits",
            )
            upload = gr.File(
                label="Add documents", show_label=False, file_count="multiple", height=120
            )
            upload_note = gr.HTML(_NO_NOTE, elem_id="upload-note")
        with gr.Column(scale=3, min_width=320):
            chat = gr.Chatbot(
                height="56vh",
                placeholder=_EMPTY,
                label="Conversation",
                show_label=False,
                buttons=[],  # copying would give the HTML
                latex_delimiters=[],
                sanitize_html=True,
                elem_id="conversation",
            )
            with gr.Row():
                box = gr.Textbox(
                    placeholder="Ask a question",
                    label="Question",
                    show_label=False,
                    scale=5,
                    container=False,
                    autofocus=True,
                    elem_id="question",
                )
                ask = gr.Button("Ask", variant="primary", scale=1, min_width=80)
                stop = gr.Button("Stop", scale=1, min_width=80, visible=False)
            chosen = gr.Radio([], label="Show the place of", visible=False, elem_id="places")
            evidence = gr.HTML(label="Place", elem_id="evidence")

    def documents(
        checked: list[int], chosen_collection: str, request: gr.Request
    ) -> tuple[Any, Any, Any]:
        fathom = library_of(request)
        names = [found.name for found in fathom.store.collections()]
        within = chosen_collection if chosen_collection in names else ""
        known = fathom.documents(within or None)
        choices = [(_document_label(d.title, d.num_pages), d.id) for d in known]
        still_there = [d.id for d in known if d.id in checked]
        return (
            gr.update(
                choices=[_EVERYTHING, *((name, name) for name in names)],
                value=within,
                visible=bool(names),
            ),
            gr.update(choices=choices, value=still_there),
            gr.update(placeholder=_EMPTY if known else _NO_DOCUMENT),
        )

    def add(
        files: list[str] | None,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - Gradio finds it by this default
    ) -> tuple[str, None]:
        paths = [Path(file) for file in files or []]
        sources = [SourceToRead(path, f"upload:{path.name}", path.name) for path in paths]

        def on_progress(event: IngestProgress) -> None:
            progress(event.fraction, desc=f"{event.stage} {event.title}: {progress_words(event)}")

        notes = []
        try:
            for outcome in library_of(request).ingest_files(sources, on_progress=on_progress):
                if isinstance(outcome, IngestFailure):
                    notes.append(error_html(outcome.error.message, outcome.error.hint))
                else:
                    said = (outcome.message, *outcome.document.warnings)
                    notes.append(plain_html("; ".join(said)))
        except FathomError as error:
            notes.append(error_html(error.message, error.hint))
        except Exception:
            notes.append(_unexpected())
        finally:
            for path in paths:
                path.unlink(missing_ok=True)  # the uploads live in our store only
        return "<br>".join(notes) or _NO_NOTE, None

    def begin(question: str, turns: list[Turn], running: str) -> tuple[Any, ...]:
        if not question.strip():
            raise gr.Error("The question is empty; type one first.", print_exception=False)
        if running in stops:
            raise gr.Error("An answer is being written; stop it first.", print_exception=False)
        number = uuid.uuid4().hex
        stops[number] = threading.Event()
        asked = {"role": "user", "content": plain_html(question.strip())}
        waiting = {"role": "assistant", "content": "<i>Waiting for the model …</i>"}
        return (
            *("", [*turns, asked, waiting], number, question.strip(), None),
            *(gr.update(choices=[], visible=False), ""),
            *(gr.update(visible=False), gr.update(visible=True)),
        )

    def answer(
        question: str,
        turns: list[Turn],
        ids: list[int],
        within: str,
        route_name: str,
        number: str,
        request: gr.Request,
    ) -> Iterator[tuple[list[Turn], Answer | None]]:
        turns = turns[:-1]  # the one that waits
        written: list[str] = []
        reply: Turn = {"role": "assistant", "content": "<i>Preparing the model …</i>"}
        yield [*turns, reply], None
        try:
            fathom = library_of(request)
            if within and not ids:
                ids = [document.id for document in fathom.documents(within)]
            events = fathom.stream(
                question,
                document_ids=ids if ids or within else None,
                route=_ROUTES[route_name],
                stop=stops[number],
            )
            for event in events:
                if isinstance(event, AnswerReady):
                    yield [*turns, {**reply, "content": _reply(event.answer)}], event.answer
                    return
                if isinstance(event, Waiting):
                    status = f"Waiting for the model, place {event.place}"
                    reply = {**reply, "content": f"<i>{status} …</i>"}
                elif isinstance(event, RouteChosen):
                    written.clear()
                    status = f"{event.decision.route}: reading {event.read}"
                    reply = {**reply, "content": f"<i>{status} …</i>"}
                elif isinstance(event, PrefillProgress):
                    status = f"Reading: {event.done:,} of {event.total:,} tokens"
                    reply = {**reply, "content": f"<i>{status}</i>"}
                elif isinstance(event, TextPiece):
                    written.append(event.text)
                    reply = {**reply, "content": plain_html("".join(written))}
                yield [*turns, reply], None
            yield [*turns, {**reply, "content": "<i>Stopped before it was its turn.</i>"}], None
        except FathomError as error:
            yield [*turns, {**reply, "content": error_html(error.message, error.hint)}], None
        except Exception:
            yield [*turns, {**reply, "content": _unexpected()}], None
        finally:
            halt(number)  # a page that was closed stops the model too

    def finish(given: Answer | None, number: str) -> tuple[Any, Any, Any]:
        stops.pop(number, None)
        citations = given.citations[:SHOWN_QUOTATIONS] if given else ()
        choices = [(f"[{c.marker}] {place(c)}", c.marker) for c in citations]
        shown = gr.update(choices=choices, value=None, visible=bool(choices))
        return shown, gr.update(visible=True), gr.update(visible=False)

    def show(marker: int | None, given: Answer | None, request: gr.Request) -> str:
        for c in given.citations if given else ():
            if c.marker == marker:
                return _evidence(library_of(request), c)
        return ""

    def clear() -> tuple[None, Any, str]:
        return None, gr.update(choices=[], visible=False), ""

    def halt(number: str) -> None:
        if stop_event := stops.get(number):
            stop_event.set()

    pending = gr.State("")
    for trigger in (box.submit, ask.click):
        trigger(
            begin,
            [box, chat, request_id],
            [box, chat, request_id, pending, last_answer, chosen, evidence, ask, stop],
            show_progress="hidden",
            api_visibility="private",
        ).success(
            answer,
            [pending, chat, picker, collection, route, request_id],
            [chat, last_answer],
            concurrency_id="model",
            concurrency_limit=None,  # whose turn it is, `Library.stream` says
            show_progress="hidden",
            api_visibility="private",
        ).then(
            finish,
            [last_answer, request_id],
            [chosen, ask, stop],
            show_progress="hidden",
            api_visibility="private",
        )
    chosen.input(show, [chosen, last_answer], [evidence], api_visibility="private")
    chat.clear(clear, None, [last_answer, chosen, evidence], api_visibility="private")
    stop.click(halt, [request_id], None, queue=False, api_visibility="private")
    upload.upload(
        add,
        [upload],
        [upload_note, upload],
        concurrency_id="ingest",
        concurrency_limit=1,
        api_visibility="private",
    ).then(
        documents,
        [picker, collection],
        [collection, picker, chat],
        show_progress="hidden",
        api_visibility="private",
    )
    gr.on(
        # documents also come and go on the other tab
        [blocks.load, tab.select, collection.input],
        documents,
        [picker, collection],
        [collection, picker, chat],
        show_progress="hidden",
        api_visibility="private",
    )


def _reply(answer: Answer) -> str:
    return answer_html(answer) + citations_html(answer) + receipt_html(answer.receipt)


def _evidence(library: Library, citation: Citation) -> str:
    """Return a quotation in the text around it, with an ellipsis where that text goes on."""
    if library.text(citation.document, citation.start, citation.end) != citation.quote:
        return error_html(
            f"document {citation.document} is no longer in the library",
            "add it again and repeat the question",
        )
    first = max(0, citation.start - _EVIDENCE_CHARS)
    before = library.text(citation.document, first, citation.start)
    after = library.text(citation.document, citation.end, citation.end + _EVIDENCE_CHARS)
    return evidence_html(
        place(citation),
        f"… {before}" if first else before,
        citation.quote,
        f"{after} …" if len(after) == _EVIDENCE_CHARS else after,
    )


def _document_label(title: str, num_pages: int) -> str:
    return f"{title} ({num_pages} pages)" if num_pages else title


def _unexpected() -> str:
    """Log the traceback under an id, and return what a person is told."""
    number = uuid.uuid4().hex[:8]
    logger.exception("unexpected error %s", number)
    return error_html(
        f"something unexpected went wrong (error {number})",
        "the log of `fathom serve` has the details under this number; fathom doctor checks the"
        " library",
    )
