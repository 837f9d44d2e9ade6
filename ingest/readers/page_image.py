"""A PDF page as a picture, and where on it a stretch of its text stands.

Runs in the guarded process like the readers; `guard.render_page` and `guard.span_boxes` ask it.
"""

import ctypes
import io
from pathlib import Path

import pypdfium2
import pypdfium2.raw as pdfium

from ingest.readers.pdf import open_pdf, page_text
from rag.errors import ReaderFailedError

MAX_PIXELS = 4096  # of the longer side: a page may say that it is 5 km wide
_UNITS = 100_000  # of a page's width and height, as pdfium gives places in whole numbers
_SAME_LINE = 0.5  # share of the lower box's height that both boxes have in common

Box = tuple[float, float, float, float]  # left, top, right, bottom; fractions of the page


def render_page(path: Path, number: int, scale: float) -> bytes:
    """Return a page as PNG; `scale` is pixels per point, less where the page is too large.

    Raises:
        ReaderFailedError: if the file has no such page.
    """
    pdf, page = _open_page(path, number)
    try:
        longest = max(*page.get_size(), 1.0)
        image = page.render(scale=min(scale, MAX_PIXELS / longest)).to_pil()
        png = io.BytesIO()
        image.convert("RGB").save(png, "PNG", optimize=False)
        return png.getvalue()
    finally:
        pdf.close()


def span_boxes(path: Path, number: int, start: int, end: int) -> list[Box]:
    """Return a box for each line of characters `[start, end)` of a page's canonical text.

    pdfium counts a page's characters otherwise than the text has them (it makes up spaces and line
    breaks, and leaves out what lies off the page): the characters that are no spaces are found
    among its own, the nearest occurrence if there are several. What is not found has no box.

    Raises:
        ReaderFailedError: if the file has no such page.
    """
    pdf, page = _open_page(path, number)
    try:
        text_page = page.get_textpage()
        text = page_text(text_page)
        wanted = _without_spaces(text[start:end])
        drawn, indexes = _drawn_characters(text_page)
        first = _nearest(drawn, wanted, len(_without_spaces(text[:start])))
        if first is None:
            return []
        chosen = indexes[first : first + len(wanted)]
        boxes = [_place(page, text_page, index) for index in chosen]
        return _lines([box for box in boxes if box])
    finally:
        pdf.close()


def _open_page(path: Path, number: int) -> tuple[pypdfium2.PdfDocument, pypdfium2.PdfPage]:
    pdf, _ = open_pdf(path)
    try:
        if not 1 <= number <= len(pdf):
            raise ReaderFailedError(
                f"there is no page {number}; the document has {len(pdf)}",
                hint="pages count from 1",
            )
        return pdf, pdf[number - 1]
    except pypdfium2.PdfiumError as error:
        pdf.close()
        raise ReaderFailedError(
            f"page {number} cannot be drawn: {error}", hint="its text can be read all the same"
        ) from error
    except BaseException:
        pdf.close()
        raise


def _without_spaces(text: str) -> str:
    return "".join(text.split())


def _drawn_characters(text_page: pypdfium2.PdfTextPage) -> tuple[str, list[int]]:
    """Return the page's characters that are no spaces, and pdfium's number of each."""
    signs: list[str] = []
    indexes: list[int] = []
    for index in range(text_page.count_chars()):
        code = pdfium.FPDFText_GetUnicode(text_page, index)
        # surrogates stand alone here, in the text they are one character
        if 0xDC00 <= code < 0xE000 and signs and "\ud800" <= signs[-1] < "\udc00":
            pair = signs[-1] + chr(code)
            signs[-1] = pair.encode("utf-16", "surrogatepass").decode("utf-16")
            continue
        if code in (0, 2) or code > 0x10FFFF or chr(code).isspace():
            continue
        signs.append(chr(code))
        indexes.append(index)
    return "".join(signs), indexes


def _nearest(drawn: str, wanted: str, expected: int) -> int | None:
    """Return where `wanted` begins in `drawn`, as near to `expected` as it can be."""
    if not wanted:
        return None
    after = drawn.find(wanted, expected)
    before = drawn.rfind(wanted, 0, expected + len(wanted))
    found = [place for place in (before, after) if place >= 0]
    return min(found, key=lambda place: abs(place - expected), default=None)


def _place(page: pypdfium2.PdfPage, text_page: pypdfium2.PdfTextPage, index: int) -> Box | None:
    """Return a character's box on the page as it is drawn, turned and cropped."""
    left, bottom, right, top = text_page.get_charbox(index, loose=True)
    x, y = ctypes.c_int(), ctypes.c_int()
    corners = []
    for across, up in ((left, bottom), (right, top)):
        pdfium.FPDF_PageToDevice(page, 0, 0, _UNITS, _UNITS, 0, across, up, x, y)
        corners.append((x.value / _UNITS, y.value / _UNITS))
    (x0, y0), (x1, y1) = corners
    x0, x1 = sorted((min(max(x0, 0.0), 1.0), min(max(x1, 0.0), 1.0)))
    y0, y1 = sorted((min(max(y0, 0.0), 1.0), min(max(y1, 0.0), 1.0)))
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def _lines(boxes: list[Box]) -> list[Box]:
    """Join the boxes of characters that follow each other on one line."""
    lines: list[Box] = []
    for box in boxes:
        if lines and _is_beside(lines[-1], box):
            last = lines[-1]
            lines[-1] = (
                min(last[0], box[0]),
                min(last[1], box[1]),
                max(last[2], box[2]),
                max(last[3], box[3]),
            )
        else:
            lines.append(box)
    return lines


def _is_beside(line: Box, box: Box) -> bool:
    common = min(line[3], box[3]) - max(line[1], box[1])
    lower = min(line[3] - line[1], box[3] - box[1])
    goes_back = box[2] < line[0]
    return common > _SAME_LINE * lower and not goes_back
