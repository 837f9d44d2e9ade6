"""Taking files, folders and addresses into the library, with progress that a person can follow."""

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr

from ingest.pipeline import IngestFailure, IngestResult
from ingest.sources import SourceToRead, find_sources
from rag.errors import FathomError, ReadError
from rag.types import IngestProgress
from ui.formatting import error_html, plain_html, plural, progress_words
from ui.library import Library
from ui.tabs.parts import LibraryOf, html_view, unexpected

_SECONDS_BETWEEN = 0.25  # of two pictures of the progress
_KINDS = "PDF, office documents, web pages, e-mail, tables, notebooks, text"
_NO_SOURCE = '<p class="none">Nothing was given to add.</p>'

Source = SourceToRead | ReadError


def build_upload(library_of: LibraryOf, *, label: str, elem_id: str) -> Any:  # noqa: ANN401 - what Gradio chains on
    """Make a place to drop files on, and below it how they fare; return what follows an upload."""
    files = gr.File(label=label, file_count="multiple", height=112, elem_id=elem_id)
    note = html_view(elem_classes="ingest-note", value=f'<p class="none">{_KINDS}</p>')
    return upload_into(library_of, files, note, files.upload)


def _path_of(file: Any) -> str:  # noqa: ANN401 - Gradio's FileData
    return str(file.path)


def upload_into(
    library_of: LibraryOf,
    files: gr.Component,
    note: gr.HTML,
    trigger: Any,  # noqa: ANN401 - an event of a component
    collection: gr.Textbox | None = None,
) -> Any:  # noqa: ANN401 - what Gradio chains on
    """Wire a trigger so that the files given are read into the library; return what follows."""
    # Gradio's own makes an empty file beside each upload, and leaves it. It is emptied by the page:
    # as an output it would be made anew by the server, and forget this.
    files._process_single_file = _path_of  # type: ignore[attr-defined]

    def add(given: list[str] | str | None, request: gr.Request, into: str = "") -> Iterator[str]:
        paths = [Path(file) for file in ([given] if isinstance(given, str) else given or [])]
        sources = [
            SourceToRead(path, f"upload:{path.name}", path.name, into.strip() or None)
            for path in paths
        ]
        try:
            yield from ingest_steps(library_of(request), sources)
        finally:
            for path in paths:
                path.unlink(missing_ok=True)  # the uploads live in our store only

    return trigger(
        add,
        [files, *([collection] if collection else [])],
        [note],
        concurrency_id="ingest",
        concurrency_limit=1,
        show_progress="hidden",
        api_visibility="private",
    ).then(None, None, [files], js="() => null", api_visibility="private")


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


def ingest_steps(library: Library, sources: Sequence[Source]) -> Iterator[str]:
    """Read sources into the library; yield how far that is, and at last what became of each.

    The reading goes on in a thread of its own, so a page that is closed does not end it.
    """
    if not sources:
        yield _NO_SOURCE
        return
    events: queue.Queue[Any] = queue.Queue()

    def read() -> None:
        try:
            for outcome in library.ingest_files(sources, on_progress=events.put):
                events.put(outcome)
            events.put(None)
        except Exception as error:
            events.put(error)

    reader = threading.Thread(target=read, name="ingest")
    reader.start()
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
    reader.join()
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
