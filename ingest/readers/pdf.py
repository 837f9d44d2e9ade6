"""PDF to canonical text with pages, printed page labels and the outline's sections."""

import io
import re
from collections import defaultdict
from pathlib import Path

import pikepdf
import pypdfium2
import pypdfium2.raw as pdfium

from ingest.readers.hidden_text import OCR_LAYER, OFF_PAGE, hidden_text_kinds
from rag.errors import EncryptedDocumentError, ReaderFailedError
from rag.types import CanonicalText, Page, Section

PAGE_SEPARATOR = "\n\n"
_SHOWN_PAGES = 10
_BETWEEN_WORDS = r"[\W_]{1,6}(?:\([^()\n]{1,20}\)\s{1,3})?"


def read_pdf(path: Path, media_type: str = "application/pdf") -> CanonicalText:
    """Read a PDF with pdfium; one that it cannot open is repaired first.

    Raises:
        EncryptedDocumentError: if it needs a password.
        ReaderFailedError: if it is no PDF or beyond repair.
    """
    pdf, warnings = open_pdf(path)
    try:
        texts: list[str] = []
        hidden: dict[str, list[int]] = defaultdict(list)
        for index in range(len(pdf)):
            text, kinds = _read_page(pdf, index)
            texts.append(text)
            for kind in kinds:
                hidden[kind].append(index + 1)
        pages, start = [], 0
        for index, text in enumerate(texts):
            label = pdf.get_page_label(index) or None
            pages.append(Page(index + 1, label, start, start + len(text)))
            start += len(text) + len(PAGE_SEPARATOR)
        canonical = PAGE_SEPARATOR.join(texts)
        sections = _sections(pdf, canonical, pages)
    finally:
        pdf.close()
    empty = [page.number for page in pages if not canonical[page.start : page.end].strip()]
    if empty:
        warnings.append(f"{_on_pages(empty)} without text, in need of OCR: {_listed(empty)}")
    warnings += [_hidden_warning(kind, numbers) for kind, numbers in sorted(hidden.items())]
    return CanonicalText(canonical, media_type, tuple(pages), sections, tuple(warnings))


def open_pdf(path: Path) -> tuple[pypdfium2.PdfDocument, list[str]]:
    """Open a PDF, repairing it if need be; return it and what has to be said about that.

    Raises:
        EncryptedDocumentError: if it needs a password.
        ReaderFailedError: if it is no PDF or beyond repair.
    """
    try:
        return pypdfium2.PdfDocument(path), []
    except pypdfium2.PdfiumError as error:
        if "password" in str(error).lower():
            raise EncryptedDocumentError(
                f"{path.name} is encrypted and needs a password",
                hint="save a copy without a password and ingest that",
            ) from error
        reason = error
    # qpdf finds the objects without the cross-reference table and writes a new one
    repaired = io.BytesIO()
    try:
        # qpdf passes over an object that ends with the file
        with pikepdf.open(io.BytesIO(path.read_bytes() + b"\n%%EOF\n")) as broken:
            broken.save(repaired)
        pdf = pypdfium2.PdfDocument(repaired)
        num_pages = len(pdf)
    except (pikepdf.PdfError, pypdfium2.PdfiumError) as error:
        raise _not_readable(path, reason) from error
    if num_pages == 0:
        raise _not_readable(path, reason)
    warning = (
        f"the file is damaged and was repaired before reading: {num_pages} pages were found,"
        " others may be lost"
    )
    return pdf, [warning]


def _not_readable(path: Path, reason: Exception) -> ReaderFailedError:
    return ReaderFailedError(
        f"{path.name} is not a readable PDF: {reason}",
        hint="open it in a PDF viewer and save it anew, then ingest that",
    )


def _read_page(pdf: pypdfium2.PdfDocument, index: int) -> tuple[str, set[str]]:
    """Return a page's text, and the ways in which some of it is hidden."""
    try:
        page = pdf[index]
    except pypdfium2.PdfiumError:
        return "", set()  # a page that cannot be loaded is named among those without text
    text_page = page.get_textpage()
    text = page_text(text_page)
    kinds = hidden_text_kinds(page, text_page)
    text_page.close()
    page.close()
    return text, kinds


def page_text(text_page: pypdfium2.PdfTextPage) -> str:
    """Return a page's stretch of the canonical text."""
    text = text_page.get_text_bounded()
    # pdfium marks a hyphen that it removed at a line end with U+0002
    return re.sub(r"\r\n?", "\n", text).replace("\x02", "").replace("\x00", "�")


def _sections(pdf: pypdfium2.PdfDocument, text: str, pages: list[Page]) -> tuple[Section, ...]:
    """Place each outline entry where its title stands on its page, else at the height it names."""
    sections: list[Section] = []
    for bookmark in pdf.get_toc():
        destination = bookmark.get_dest()
        index = destination.get_index() if destination else None
        title = " ".join(bookmark.get_title().split())
        if index is None or not 0 <= index < len(pages) or not title:
            continue
        page = pages[index]
        # a title found before the entry above it is a mention, not the heading
        after = max(page.start, sections[-1].start + 1 if sections else 0)
        start = _find_title(title, text, min(after, page.end), page.end)
        if start is None:
            line = _line_at(pdf[index], destination)
            start = max(text.find(line, page.start, page.end), page.start)
        sections.append(Section(bookmark.level + 1, title, start))
    return tuple(sorted(sections, key=lambda section: section.start))


def _find_title(title: str, text: str, start: int, end: int) -> int | None:
    """Return where a title stands, best on a line of its own; letter case does not matter."""
    words = r"\s+".join(re.escape(word) for word in title.split())
    # its words alone, with line breaks and perhaps a date in brackets between them
    loose = _BETWEEN_WORDS.join(re.findall(r"\w+", title))
    for pattern in (
        rf"^[ \t]*({words})[ \t]*$",
        rf"^[ \t]*({words})",
        rf"({words})",
        rf"({loose})",
    ):
        if match := re.compile(pattern, re.M | re.I).search(text, start, end):
            return match.start(1)
    return None


def _line_at(page: pypdfium2.PdfPage, destination: pypdfium2.PdfDest) -> str:
    """Return the first line of text at or below the height that a destination names, or ""."""
    mode, values = destination.get_view()
    if mode != pdfium.PDFDEST_VIEW_XYZ or len(values) < 2 or not values[1]:
        return ""
    text_page = page.get_textpage()
    left, bottom, right, _ = page.get_bbox()
    below = text_page.get_text_bounded(left, bottom, right, values[1] + 1)
    text_page.close()
    return next((line for line in below.splitlines() if line.strip()), "")


def _hidden_warning(kind: str, numbers: list[int]) -> str:
    where = f"{_on_pages(numbers)}: {_listed(numbers)}"
    if kind == OCR_LAYER:
        return f"{kind} (from OCR) is what is read on {where}"
    fate = "is not read" if kind == OFF_PAGE else "is read with the rest"
    return f"hidden text, {kind}, {fate} on {where}"


def _on_pages(numbers: list[int]) -> str:
    return f"{len(numbers)} page{'s' if len(numbers) > 1 else ''}"


def _listed(numbers: list[int]) -> str:
    more = ", …" if len(numbers) > _SHOWN_PAGES else ""
    return ", ".join(map(str, numbers[:_SHOWN_PAGES])) + more
