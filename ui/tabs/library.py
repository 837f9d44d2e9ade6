"""The library: adding documents, what is there, one of them in detail, and whether all agrees."""

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from rag.errors import FathomError
from rag.types import Document
from ui.assembly import Fathom
from ui.doctor import Check, examine
from ui.formatting import error_html, plain_html
from ui.tabs.document_panel import PANEL_EVENTS, panel_html
from ui.tabs.parts import MOST_ROWS, LibraryOf, html_view, unexpected
from ui.tabs.upload import build_upload, fetch_steps

_NO_DOCUMENT = (
    '<div class="empty"><h2>No document yet</h2><p>Drop files, choose a folder or give an address.'
    " Known content is known; changed content becomes a new version.</p></div>"
)


def build_library(library_of: LibraryOf, tab: gr.Tab) -> None:
    """Lay out the tab inside the running Blocks and wire it."""
    with gr.Row(elem_id="library"):
        with gr.Column(elem_id="adding", min_width=0):
            collection = gr.Textbox(
                label="Collection",
                info="Of what is added now; empty: none",
                max_length=200,
                elem_id="into",
            )
            files = build_upload(
                label="Add documents", elem_id="library-files", into="#into textarea, #into input"
            )
            address = gr.Textbox(
                label="Web address", info="Fetched now, from this machine", type="text"
            )
            fetch = gr.Button("Fetch", size="sm")
            note = html_view(elem_classes="ingest-note")
            doctor = gr.Button("Check the library", size="sm", elem_id="doctor")
            checks = html_view(elem_classes="checks")
        with gr.Column(elem_id="shelf", min_width=0):
            search = gr.Textbox(
                label="Documents", placeholder="Search titles and collections", elem_id="find"
            )
            table = html_view(("open",), elem_classes="shelf")
        with gr.Column(elem_id="document", min_width=0):
            panel = html_view(PANEL_EVENTS, kind="evidence", elem_classes="evidence-panel")

    def listing(wanted: str, request: gr.Request) -> str:
        return documents_html(library_of(request).documents(), wanted)

    def look(event: gr.EventData, request: gr.Request) -> str:
        try:
            return panel_html(library_of(request), int(event.document))
        except FathomError as error:
            return _failed(error_html(error.message, error.hint))
        except Exception:
            return _failed(unexpected())

    def peek(event: gr.EventData, request: gr.Request) -> str:
        try:
            return panel_html(library_of(request), int(event.document), int(event.start))
        except FathomError as error:
            return _failed(error_html(error.message, error.hint))
        except Exception:
            return _failed(unexpected())

    def remove(event: gr.EventData, wanted: str, request: gr.Request) -> tuple[str, str, str]:
        library, number = library_of(request), int(event.document)
        try:
            library.delete(number)
        except FathomError as error:
            said = error_html(error.message, error.hint)
        except Exception:
            said = unexpected()
        else:
            said = f'<p role="status">Document {number} is deleted.</p>'
        return "", documents_html(library.documents(), wanted), said

    def fetch_address(given: str, into: str, request: gr.Request) -> Iterator[str]:
        yield from fetch_steps(library_of(request), given, into)

    def check(request: gr.Request) -> Iterator[str]:
        library = library_of(request)
        if not isinstance(library, Fathom):  # it names the documents of all owners
            yield error_html("only who runs the machine can check it", "run fathom doctor there")
            return
        done: list[Check] = []
        try:
            for found in examine(library):
                done.append(found)
                yield checks_html(done, ended=False)
            yield checks_html(done, ended=True)
        except Exception:
            yield unexpected()

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    shelf: dict[str, Any] = {"fn": listing, "inputs": [search], "outputs": [table]} | quiet
    shelf |= {"concurrency_id": "shelf", "concurrency_limit": 1}  # the last asked is the last shown
    gr.on(
        [fetch.click, address.submit],
        fetch_address,
        [address, collection],
        [note],
        concurrency_id="ingest",
        **quiet,
    ).then(**shelf)
    # one event of all three: two could overtake each other, and the older list would stay
    gr.on([tab.select, search.change, files.upload], trigger_mode="always_last", **shelf)
    table.open(look, None, [panel], **quiet)
    panel.open(look, None, [panel], **quiet)
    panel.peek(peek, None, [panel], **quiet)
    panel.remove(remove, [search], [panel, table, note], **quiet)
    doctor.click(check, None, [checks], concurrency_id="doctor", concurrency_limit=1, **quiet)


def documents_html(documents: Sequence[Document], wanted: str = "") -> str:
    """Return the documents as a table, the latest first; `wanted` is searched in their names."""
    if not documents:
        return _NO_DOCUMENT
    words = wanted.casefold().split()
    found = [
        d
        for d in reversed(documents)
        if all(w in " ".join((d.title, *d.collections)).casefold() for w in words)
    ]
    if not found:
        return f'<p class="none">None of {len(documents):,} documents is called that.</p>'
    rows = "".join(
        f'<tr><td class="first"><button type="button" data-event="open" data-document="{d.id}">'
        f"{plain_html(d.title)}</button>"
        f"{_labels(d)}</td><td>{d.num_pages or '-'}</td><td>{d.num_chunks:,}</td>"
        f"<td>{d.num_chars:,}</td><td>{d.version}</td><td>{d.created_at[:10]}</td></tr>"
        for d in found[:MOST_ROWS]
    )
    more = len(found) - MOST_ROWS
    rest = f'<p class="none">and {more:,} more: search for them</p>' if more > 0 else ""
    return (
        '<table class="documents"><thead><tr><th scope="col">Title</th><th scope="col">Pages</th>'
        '<th scope="col">Chunks</th><th scope="col">Characters</th><th scope="col">Version</th>'
        f'<th scope="col">Added</th></tr></thead><tbody>{rows}</tbody></table>{rest}'
    )


def checks_html(done: Sequence[Check], *, ended: bool) -> str:
    """Return the checks made so far, those that failed first."""
    ordered = sorted(done, key=lambda found: found.passed)
    items = "".join(
        f'<li class="{"passed" if found.passed else "failed"}"><b>{plain_html(found.name)}</b>'
        f" {'' if found.passed else 'failed: '}{plain_html(found.detail)}</li>"
        for found in ordered
    )
    num_failed = sum(not found.passed for found in done)
    said = "Checking …"
    if ended:
        said = f"{num_failed} of {len(done)} checks failed." if num_failed else "All agrees."
        if any(found.repairable for found in done):
            said += " fathom doctor --repair mends what can be mended."
    return f'<p role="status">{said}</p><ul>{items}</ul>'


def _labels(document: Document) -> str:
    labels = [f'<span class="label">{plain_html(name)}</span>' for name in document.collections]
    if document.warnings:
        number = len(document.warnings)
        labels.append(f'<span class="label warn">{number} warning{"s" * (number > 1)}</span>')
    return "".join(labels)


def _failed(said: str) -> str:
    return (
        '<figure class="evidence document"><figcaption><h2>Not found</h2><button type="button"'
        f' class="quiet" data-close>Close</button></figcaption>{said}</figure>'
    )
