"""Taking files, folders and addresses into the library, with progress that a person can follow.

The page sends what it is given to `POST /uploads` and draws the lines of HTML that come back; what
is given while others are read waits its turn there. Gradio's own way would skip it: a component
whose event is still being answered drops the next one.
"""

import json
import queue
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import gradio as gr
from fastapi import APIRouter, Depends, Form, Request, UploadFile
from starlette.responses import StreamingResponse

from ingest.pipeline import IngestFailure, IngestResult
from ingest.sources import SourceToRead, find_sources
from rag.errors import FathomError, ReadError
from rag.types import IngestProgress
from ui.assembly import Fathom
from ui.formatting import error_html, plain_html, plural, progress_words
from ui.library import Library
from ui.tabs.parts import unexpected
from ui.uploads import keep_uploads

_SECONDS_BETWEEN = 0.25  # of two pictures of the progress
_KINDS = "PDF, office documents, web pages, e-mail, tables, notebooks, text"
_NO_SOURCE = '<p class="none">Nothing was given to add.</p>'
_FRAME = """<p class="label-of">{label}</p>
<label class="drop"><input type="file" name="files" multiple aria-label="{label}"
 class="unseen"><span>Drop files or folders here, or <u>choose files</u></span></label>
<label class="quiet folder"><input type="file" name="folder" webkitdirectory class="unseen"
 aria-label="Add a folder">Add a folder</label>
<div class="note"><p class="none">{kinds}</p></div>"""

Source = SourceToRead | ReadError


# ---- on the page ---------------------------------------------------------------------------------


def build_upload(*, label: str, elem_id: str, into: str = "") -> gr.HTML:
    """Return a place to drop files on, and below it how they fare; `upload` tells of each lot.

    Args:
        label: what it is called.
        elem_id: its id.
        into: a selector of the field that names the collection.
    """
    return gr.HTML(
        html_template=_FRAME.format(label=label, kinds=_KINDS),
        apply_default_css=False,
        js_on_load=f'fathom.drop(element, () => trigger("upload"), {json.dumps(into)})',
        elem_id=elem_id,
        elem_classes=["adds", "ingest-note"],
    )


def uploads_router(fathom: Fathom) -> APIRouter:
    """Return the route that the page sends files to; programs use `POST /v1/documents`."""
    router = APIRouter()

    def library(request: Request) -> Library:
        return fathom.for_user(request)

    @router.post("/uploads", include_in_schema=False)
    def upload(
        own: Annotated[Library, Depends(library)],
        files: list[UploadFile],
        collection: Annotated[str, Form()] = "",
    ) -> StreamingResponse:
        folder, sources = keep_uploads(own.settings, files, collection)
        steps = ingest_steps(own, sources, after=lambda: shutil.rmtree(folder))
        return StreamingResponse(
            (f"{json.dumps(step)}\n" for step in steps), media_type="application/x-ndjson"
        )

    return router


# ---- reading -------------------------------------------------------------------------------------


def fetch_steps(library: Library, address: str, collection: str) -> Iterator[str]:
    """Fetch one web address that a person typed, and read it; yield pictures of the progress."""
    if not address.strip():
        yield _NO_SOURCE
        return
    scratch = library.settings.home / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=scratch) as downloads:
        if "://" not in address:
            address = f"https://{address.strip()}"
        yield f'<p role="status">Fetching {plain_html(address.strip())} …</p>'
        found = find_sources(
            [address.strip()],
            settings=library.settings,
            downloads=Path(downloads),
            allow_network=True,
        )
        sources = [
            replace(source, collection=collection.strip() or None)
            if isinstance(source, SourceToRead)
            else source
            for source in found
        ]
        yield from ingest_steps(library, sources)


def ingest_steps(
    library: Library, sources: Sequence[Source], *, after: Callable[[], None] = lambda: None
) -> Iterator[str]:
    """Read sources into the library; return how far that is, and at last what became of each.

    The reading goes on in a thread of its own, so a page that is closed does not end it; `after` is
    called when it has ended.
    """
    events: queue.Queue[Any] = queue.Queue()

    def read() -> None:
        try:
            for outcome in library.ingest_files(sources, on_progress=events.put):
                events.put(outcome)
            events.put(None)
        except Exception as error:
            events.put(error)
        finally:
            after()

    threading.Thread(target=read, name="ingest").start()
    return _pictures(sources, events)


def _pictures(sources: Sequence[Source], events: "queue.Queue[Any]") -> Iterator[str]:
    """Yield a picture of the progress whenever it has changed, not too often."""
    outcomes: list[IngestResult | IngestFailure] = []
    latest: IngestProgress | None = None
    yield _progress_html(sources, outcomes, latest)
    while True:
        event = events.get()
        while not (event is None or isinstance(event, Exception)):
            if isinstance(event, IngestProgress):
                latest = event
            else:
                outcomes.append(event)
            try:
                event = events.get(timeout=_SECONDS_BETWEEN)
            except queue.Empty:
                break
        else:
            break
        yield _progress_html(sources, outcomes, latest)
    yield _ended_html(event, outcomes)


def _ended_html(error: Exception | None, outcomes: Sequence[IngestResult | IngestFailure]) -> str:
    num_failed = sum(isinstance(outcome, IngestFailure) for outcome in outcomes)
    words = f"{plural(len(outcomes) - num_failed, 'document')} read"
    if num_failed:
        words += f", {num_failed} not"
    shown = f'<p role="status">{words}.</p>{_outcomes_html(outcomes)}'
    if isinstance(error, FathomError):
        shown += error_html(error.message, error.hint)
    elif error is not None:
        try:
            raise error
        except Exception:
            shown += unexpected()
    return shown


def _progress_html(
    sources: Sequence[Source],
    outcomes: Sequence[IngestResult | IngestFailure],
    latest: IngestProgress | None,
) -> str:
    fraction = latest.fraction if latest else 0.0
    now = f"{latest.stage} {latest.title}" if latest else "preparing"
    words = progress_words(latest) if latest else plural(len(sources), "file")
    return (
        f'<div class="ingest" role="progressbar" aria-label="Reading files" aria-valuemin="0"'
        f' aria-valuemax="100" aria-valuenow="{100 * fraction:.0f}">'
        f'<span class="now">{plain_html(now)}</span>'
        f'<span class="bar" aria-hidden="true"><i data-width="{100 * fraction:.1f}"></i></span>'
        f'<span class="words">{plain_html(words)}</span></div>{_outcomes_html(outcomes)}'
    )


def _outcomes_html(outcomes: Sequence[IngestResult | IngestFailure]) -> str:
    """Return what became of each, the latest first."""
    items = []
    for outcome in reversed(outcomes):
        if isinstance(outcome, IngestFailure):
            items.append(f"<li>{error_html(outcome.error.message, outcome.error.hint)}</li>")
            continue
        warnings = "".join(f"<li>{plain_html(w)}</li>" for w in outcome.document.warnings)
        inner = f'<ul class="warnings">{warnings}</ul>' if warnings else ""
        items.append(f"<li>{plain_html(outcome.message)}{inner}</li>")
    return f'<ul class="outcomes">{"".join(items)}</ul>' if items else ""
