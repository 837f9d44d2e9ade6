"""One document of the library: facts, warnings, versions, outline, a look into its text."""

from collections.abc import Sequence

from rag.types import Document, Section
from ui.formatting import plain_html, plural
from ui.library import Library

PANEL_EVENTS = ("open", "peek", "remove")
_PEEK_CHARS = 1_600
_MOST_HEADINGS = 400


def panel_html(library: Library, number: int, start: int = 0) -> str:
    """Return the panel of a document, with its text from `start` on.

    Raises:
        DocumentNotFoundError: if it is gone.
    """
    document = library.store.find(str(number))
    versions = [
        d for d in library.store.all(include_superseded=True) if d.source == document.source
    ]
    return (
        '<figure class="evidence document"><figcaption>'
        f"<h2>{plain_html(document.title)}</h2>"
        '<button type="button" class="quiet" data-close>Close</button></figcaption>'
        f'<div class="inside">{_facts(document)}{_warnings(document)}'
        f"{_versions(versions, document)}{_peek(library, document, start)}"
        f"{_outline(library.store.sections(number), document)}{_deletion(document)}</div></figure>"
    )


def _facts(document: Document) -> str:
    facts = [
        plural(document.num_pages, "page") if document.num_pages else "no pages",
        plural(document.num_chunks, "chunk"),
        plural(document.num_chars, "character"),
        f"{document.num_bytes / 2**20:,.1f} MiB",
        document.media_type,
        f"added {document.created_at[:10]}",
        *(f"in {name}" for name in document.collections),
    ]
    return f'<p class="facts">{plain_html("; ".join(facts))}</p>'


def _warnings(document: Document) -> str:
    items = "".join(f"<li>{plain_html(warning)}</li>" for warning in document.warnings)
    return f'<ul class="warnings" aria-label="Warnings">{items}</ul>' if items else ""


def _versions(versions: Sequence[Document], shown: Document) -> str:
    if len(versions) < 2:
        return ""
    items = "".join(
        f'<li><button type="button" class="place" data-event="open" data-document="{d.id}"'
        f"{' aria-current=true' if d.id == shown.id else ''}>version {d.version}, document {d.id},"
        f" {d.created_at[:10]}{', the latest' if d.is_latest else ''}</button></li>"
        for d in versions
    )
    return f'<h3>Versions</h3><ul class="versions">{items}</ul>'


def _peek(library: Library, document: Document, start: int) -> str:
    """Return a stretch of the text, with the way before and behind it."""
    start = min(max(0, start), max(0, document.num_chars - 1))
    end = min(document.num_chars, start + _PEEK_CHARS)
    text = library.text(document.id, start, end)
    steps = "".join(
        f'<button type="button" class="quiet" data-event="peek" data-document="{document.id}"'
        f' data-start="{place}">{name}</button>'
        for name, place, possible in (
            ("Earlier", max(0, start - _PEEK_CHARS), start > 0),
            ("Later", end, end < document.num_chars),
        )
        if possible
    )
    return (
        f'<h3>Text as it was read <span class="when">characters {start:,} to {end:,} of'
        f' {document.num_chars:,}</span></h3><div class="frame text" tabindex="0" role="region"'
        f' aria-label="Text"><p>{plain_html(text)}</p></div><div class="again">{steps}</div>'
    )


def _outline(sections: Sequence[Section], document: Document) -> str:
    if not sections:
        return ""
    items = "".join(
        f'<li class="level-{min(s.level, 6)}"><button type="button" class="place"'
        f' data-event="peek" data-document="{document.id}" data-start="{s.start}">'
        f"{plain_html(s.title)}</button></li>"
        for s in sections[:_MOST_HEADINGS]
    )
    more = len(sections) - _MOST_HEADINGS
    rest = f'<p class="none">and {more:,} more</p>' if more > 0 else ""
    return (
        f'<details class="more"><summary>Outline: {plural(len(sections), "heading")}</summary>'
        f'<ul class="outline">{items}</ul>{rest}</details>'
    )


def _deletion(document: Document) -> str:
    return (
        '<details class="more"><summary>Delete</summary><p>Its text, vectors, file, and its words'
        ' in past answers and conversations go for good.</p><button type="button"'
        f' class="quiet danger" data-event="remove" data-document="{document.id}">'
        f"Delete document {document.id} for good</button></details>"
    )
