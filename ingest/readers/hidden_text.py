"""Text in a PDF that a reader of the page cannot see: white, tiny, invisible, off the page.

Looks at page objects, of which there are a few hundred on a page, not at characters.
"""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import pypdfium2
import pypdfium2.raw as pdfium

SMALLEST_POINTS = 2.0
_WHITE = 250  # of 255, in each of red, green and blue
_INVISIBLE_MODES = (
    pdfium.FPDF_TEXTRENDERMODE_INVISIBLE,
    pdfium.FPDF_TEXTRENDERMODE_CLIP,
)
_MAX_FORM_DEPTH = 8
_SCAN_SHARE = 0.5  # of the page that one image covers

Box = tuple[float, float, float, float]  # left, bottom, right, top
Matrix = tuple[float, float, float, float, float, float]
_IDENTITY: Matrix = (1.0, 0.0, 0.0, 1.0, 0.0, 0.0)

OCR_LAYER = "a scan's invisible text layer"
WHITE = "white on white"
TINY = f"smaller than {SMALLEST_POINTS:g} pt"
INVISIBLE = "invisible by its render mode"
OFF_PAGE = "outside the page"


@dataclass(frozen=True, slots=True)
class _Painted:
    """One page object: what it is, and where it lies on the page."""

    handle: ctypes.c_void_p
    kind: int
    box: Box
    scale: float


def hidden_text_kinds(page: pypdfium2.PdfPage, text_page: pypdfium2.PdfTextPage) -> set[str]:
    """Return the ways in which text on this page is hidden; an empty set for an honest page.

    White text is hidden only where nothing dark was painted below it. Invisible text over a page
    image is what OCR leaves, and gets a name of its own.
    """
    kinds: set[str] = set()
    below: list[Box] = []
    page_box = page.get_bbox()
    page_area = max(_area(page_box), 1.0)
    has_scan = False
    for painted in _objects(page.raw, pdfium.FPDFPage_CountObjects, pdfium.FPDFPage_GetObject):
        if painted.kind != pdfium.FPDF_PAGEOBJ_TEXT:
            if painted.kind == pdfium.FPDF_PAGEOBJ_IMAGE:
                has_scan = has_scan or _area(painted.box) > _SCAN_SHARE * page_area
            if painted.kind != pdfium.FPDF_PAGEOBJ_PATH or not _is_white(painted.handle):
                below.append(painted.box)
            continue
        kind = _hidden_kind(painted, page_box, below)
        if kind and kind not in kinds and _has_words(painted, text_page):
            kinds.add(kind)
    if INVISIBLE in kinds and has_scan:
        kinds = (kinds - {INVISIBLE}) | {OCR_LAYER}
    return kinds


def _objects(
    parent: object,
    count: object,
    get: object,
    matrix: Matrix = _IDENTITY,
    depth: int = 0,
) -> Iterator[_Painted]:
    """Yield the objects in the order of painting, those inside forms at their place."""
    for index in range(count(parent)):  # type: ignore[operator]
        handle = get(parent, index)  # type: ignore[operator]
        kind = pdfium.FPDFPageObj_GetType(handle)
        if kind == pdfium.FPDF_PAGEOBJ_FORM:
            if depth < _MAX_FORM_DEPTH:
                yield from _objects(
                    handle,
                    pdfium.FPDFFormObj_CountObjects,
                    pdfium.FPDFFormObj_GetObject,
                    _times(_matrix(handle), matrix),
                    depth + 1,
                )
            continue
        scale = 1.0
        if kind == pdfium.FPDF_PAGEOBJ_TEXT:
            _, _, c, d, _, _ = _times(_matrix(handle), matrix)
            scale = (c * c + d * d) ** 0.5
        yield _Painted(handle, kind, _placed(_bounds(handle), matrix), scale)


def _hidden_kind(painted: _Painted, page_box: Box, below: list[Box]) -> str | None:
    if pdfium.FPDFTextObj_GetTextRenderMode(painted.handle) in _INVISIBLE_MODES:
        return INVISIBLE
    left, bottom, right, top = painted.box
    if right < page_box[0] or left > page_box[2] or top < page_box[1] or bottom > page_box[3]:
        return OFF_PAGE
    size = ctypes.c_float()
    pdfium.FPDFTextObj_GetFontSize(painted.handle, size)
    if 0 < abs(size.value) * painted.scale < SMALLEST_POINTS:
        return TINY
    x, y = (left + right) / 2, (bottom + top) / 2
    if _is_white(painted.handle) and not any(
        box[0] <= x <= box[2] and box[1] <= y <= box[3] for box in below
    ):
        return WHITE
    return None


def _has_words(painted: _Painted, text_page: pypdfium2.PdfTextPage) -> bool:
    num_bytes = pdfium.FPDFTextObj_GetText(painted.handle, text_page.raw, None, 0)
    buffer = ctypes.create_string_buffer(num_bytes)
    pointer = ctypes.cast(buffer, ctypes.POINTER(ctypes.c_ushort))
    pdfium.FPDFTextObj_GetText(painted.handle, text_page.raw, pointer, num_bytes)
    return any(char.isalnum() for char in buffer.raw.decode("utf-16-le", errors="replace"))


def _is_white(handle: ctypes.c_void_p) -> bool:
    """Say whether the fill is white or fully transparent."""
    red, green, blue, alpha = (ctypes.c_uint() for _ in range(4))
    if not pdfium.FPDFPageObj_GetFillColor(handle, red, green, blue, alpha):
        return False
    return alpha.value == 0 or min(red.value, green.value, blue.value) >= _WHITE


def _matrix(handle: ctypes.c_void_p) -> Matrix:
    found = pdfium.FS_MATRIX()
    if not pdfium.FPDFPageObj_GetMatrix(handle, found):
        return _IDENTITY
    return (found.a, found.b, found.c, found.d, found.e, found.f)


def _times(inner: Matrix, outer: Matrix) -> Matrix:
    """Return the matrix that applies `inner` first. Source: ISO 32000-1, 8.3.4."""
    a, b, c, d, e, f = inner
    p, q, r, s, t, u = outer
    return (
        a * p + b * r,
        a * q + b * s,
        c * p + d * r,
        c * q + d * s,
        e * p + f * r + t,
        e * q + f * s + u,
    )


def _bounds(handle: ctypes.c_void_p) -> Box:
    left, bottom, right, top = (ctypes.c_float() for _ in range(4))
    pdfium.FPDFPageObj_GetBounds(handle, left, bottom, right, top)
    return (left.value, bottom.value, right.value, top.value)


def _placed(box: Box, matrix: Matrix) -> Box:
    if matrix == _IDENTITY:
        return box
    a, b, c, d, e, f = matrix
    corners = [(x, y) for x in (box[0], box[2]) for y in (box[1], box[3])]
    xs = [a * x + c * y + e for x, y in corners]
    ys = [b * x + d * y + f for x, y in corners]
    return (min(xs), min(ys), max(xs), max(ys))


def _area(box: Box) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)
