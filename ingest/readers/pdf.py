"""PDF to canonical text with pages, printed page labels and the outline's sections."""

import re
from pathlib import Path

import pypdfium2

from rag.errors import EncryptedDocumentError, ReaderFailedError
from rag.types import CanonicalText, Page, Section

PAGE_SEPARATOR = "\n\n"


def read_pdf(path: Path) -> CanonicalText:
    """Read a PDF with pdfium.

    Raises:
        EncryptedDocumentError: if it needs a password.
        ReaderFailedError: if it is no PDF or is damaged.
    """
    try:
        pdf = pypdfium2.PdfDocument(path)
    except pypdfium2.PdfiumError as error:
        if "password" in str(error).lower():
            raise EncryptedDocumentError(
                f"{path.name} is encrypted and needs a password",
                hint="save a copy without a password and ingest that",
            ) from error
        raise ReaderFailedError(
            f"{path.name} is not a readable PDF: {error}",
            hint="open it in a PDF viewer and save it anew, then ingest that",
        ) from error
    try:
        texts = [_page_text(pdf, index) for index in range(len(pdf))]
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
    return CanonicalText(canonical, "application/pdf", tuple(pages), sections, _ocr_warning(empty))


def _page_text(pdf: pypdfium2.PdfDocument, index: int) -> str:
    page = pdf[index]
    text_page = page.get_textpage()
    text = text_page.get_text_bounded()
    text_page.close()
    page.close()
    # pdfium marks a hyphen that it removed at a line end with U+0002
    return re.sub(r"\r\n?", "\n", text).replace("\x02", "").replace("\x00", "�")


def _sections(pdf: pypdfium2.PdfDocument, text: str, pages: list[Page]) -> tuple[Section, ...]:
    """Place each outline entry where its title stands on its page, else at the page's start."""
    sections: list[Section] = []
    for bookmark in pdf.get_toc():
        destination = bookmark.get_dest()
        index = destination.get_index() if destination else None
        title = " ".join(bookmark.get_title().split())
        if index is None or not 0 <= index < len(pages) or not title:
            continue
        page = pages[index]
        pattern = r"\s+".join(re.escape(word) for word in title.split())
        # a title found before the entry above it is a mention, not the heading
        after = max(page.start, sections[-1].start + 1 if sections else 0)
        match = re.compile(pattern).search(text, min(after, page.end), page.end)
        start = match.start() if match else page.start
        sections.append(Section(bookmark.level + 1, title, start))
    return tuple(sorted(sections, key=lambda section: section.start))


def _ocr_warning(empty_pages: list[int]) -> tuple[str, ...]:
    if not empty_pages:
        return ()
    shown = ", ".join(map(str, empty_pages[:10])) + (" …" if len(empty_pages) > 10 else "")
    return (f"{len(empty_pages)} pages hold no text and need OCR: {shown}",)
