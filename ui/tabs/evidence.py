"""The place of a citation: the picture of its page, or its section, with the quotation marked."""

from collections.abc import Sequence

import gradio as gr

from rag.errors import FathomError
from rag.types import Citation
from ui.formatting import error_html, one_line, place, plain_html
from ui.library import Library
from ui.tabs.parts import LibraryOf, html_view, unexpected

_SCALE = 2.0  # pixels of the picture to the point
_EVIDENCE_CHARS = 1_500  # at most, on either side of the quotation

Box = tuple[float, float, float, float]  # left, top, right, bottom


def build_evidence(library_of: LibraryOf, *views: gr.HTML) -> gr.HTML:
    """Make the panel that opens what is cited in the views; return it, empty."""
    panel = html_view(kind="evidence", elem_classes="evidence-panel")

    def show(event: gr.EventData, request: gr.Request) -> str:
        try:
            library = library_of(request)
            given = library.receipts.load(str(event.receipt))
            (citation,) = (c for c in given.citations if c.marker == int(event.marker))
            if boxes := _boxes(library, citation):
                return page_html(citation, boxes)
            return evidence_html(citation, *_surroundings(library, citation))
        except FathomError as error:
            return _panel("Not found", error_html(error.message, error.hint))
        except Exception:
            return _panel("Not found", unexpected())

    for view in views:
        view.cite(show, None, [panel], show_progress="hidden", api_visibility="private")
    return panel


def evidence_html(citation: Citation, before: str, quote: str, after: str) -> str:
    """Return a quotation marked in the text around it, under the name of its place."""
    shown = plain_html(before) + f"<mark>{plain_html(quote)}</mark>" + plain_html(after)
    return _panel(place(citation), f'<div class="frame text" tabindex="0"><p>{shown}</p></div>')


def page_html(citation: Citation, boxes: Sequence[Box]) -> str:
    """Return the picture of the page that a quotation begins on, with its lines marked.

    Args:
        citation: its place.
        boxes: left, top, right, bottom of each line, as fractions of the picture.
    """
    marks = "".join(
        f'<span class="box" data-left="{100 * left:.2f}" data-top="{100 * top:.2f}"'
        f' data-width="{100 * (right - left):.2f}" data-height="{100 * (bottom - top):.2f}"></span>'
        for left, top, right, bottom in boxes
    )
    said = plain_html(f"Page {citation.page} of {citation.title}")
    return _panel(
        place(citation),
        '<div class="frame" tabindex="0" role="region" aria-label="Page"><div class="page">'
        f'<img src="/documents/{citation.document}/pages/{citation.page}.png?scale={_SCALE}"'
        f' alt="{said}">{marks}</div></div>'
        f'<blockquote class="words">{plain_html(one_line(citation.quote))}</blockquote>',
    )


def _boxes(library: Library, citation: Citation) -> list[Box]:
    """Return where a quotation stands on the picture of its page; none where there is none."""
    if citation.page is None:
        return []
    try:
        return library.page_boxes(citation.document, citation.page, citation.start, citation.end)
    except FathomError:  # not a PDF, or one that cannot be drawn: its text is shown
        return []


def _panel(title: str, inside: str) -> str:
    """Return the panel; its button to close it is worked by `page.js`."""
    return (
        '<figure class="evidence"><figcaption><span>'
        f'{plain_html(title)}</span><button type="button" class="quiet" data-close>Close</button>'
        f"</figcaption>{inside}</figure>"
    )


def _surroundings(library: Library, citation: Citation) -> tuple[str, str, str]:
    """Return the text before, in and after a quotation, of its section where that is near.

    An ellipsis stands where the section goes on.

    Raises:
        DocumentNotFoundError: if the document is gone.
    """
    document = library.store.find(str(citation.document))
    starts = [section.start for section in library.store.sections(document.id)]
    first = max((start for start in starts if start <= citation.start), default=0)
    last = min((start for start in starts if start > citation.end), default=document.num_chars)
    begin = max(first, citation.start - _EVIDENCE_CHARS)
    end = min(last, citation.end + _EVIDENCE_CHARS)
    before = library.text(document.id, begin, citation.start)
    after = library.text(document.id, citation.end, end)
    return (
        f"… {before}" if begin > first else before,
        library.text(document.id, citation.start, citation.end),
        f"{after} …" if end < last else after,
    )
