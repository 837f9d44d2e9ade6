"""HTML and EPUB to canonical text; hidden elements are left out and counted.

Our own reading over Python's HTML parser, which is flat and so has no depth to overflow: see
docs/decisions/0007 for what the library lost.
"""

import codecs
import re
from collections import Counter
from dataclasses import dataclass, field
from html import escape
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from urllib.parse import unquote
from xml.etree import ElementTree as ET
from zipfile import ZipFile

from ingest.readers.archive import local_name, open_archive, read_part, read_xml, resolve_part
from ingest.readers.blocks import Block, join_blocks, table_blocks
from ingest.readers.text import decode
from rag.errors import EncryptedDocumentError, ReaderFailedError
from rag.types import CanonicalText, Section

_VOID = frozenset("area base br col embed hr img input link meta source track wbr".split())
_NOT_TEXT = frozenset("script style template head title noscript iframe object".split())
_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_BLOCKS = frozenset(
    "address article aside blockquote body center dd details dialog div dl dt fieldset figcaption"
    " figure footer form header hgroup hr legend main nav ol p pre section summary ul caption"
    " html".split()
) | set(_HEADINGS)
# an open element that another one of these closes by coming
_CLOSED_BY = {
    "p": _BLOCKS | {"table", "li", "td", "th", "tr"},
    "li": {"li"},
    "dt": {"dt", "dd"},
    "dd": {"dt", "dd"},
    "td": {"td", "th", "tr"},
    "th": {"td", "th", "tr"},
    "tr": {"tr"},
    "option": {"option"},
}
_HIDING = re.compile(
    r"display\s*:\s*none|visibility\s*:\s*hidden|font-size\s*:\s*0(?![.\d]*[1-9])"
    r"|opacity\s*:\s*0(?![.\d]*[1-9])",
    re.I,
)
_CHARSET = re.compile(rb"(?:charset|encoding)\s*=\s*[\"']?\s*([\w.:-]+)", re.I)
_CDATA = "<![cdata["
_HAZARD = re.compile(r"<!--|<!\[CDATA\[|<(?P<tag>script|style)\b[^<>]*+>", re.I)
_HAZARD_ENDS = {
    "<!--": re.compile(r"--!?>"),
    _CDATA: re.compile(r"\]\]>"),
    "script": re.compile(r"</script\b[^<>]*+>", re.I),
    "style": re.compile(r"</style\b[^<>]*+>", re.I),
}
_CONDITIONAL = re.compile(r"<!\[(?:if|else|endif)[^<>]{0,200}+>", re.I)
# a "<" with no ">" before the next "<", quoted values aside, or of another marked section
_STRAY = re.compile(r"<(?:(?=!\[)|(?!(?:[^<>\"']|\"[^\"]{0,5000}+\"|'[^']{0,5000}+'){1,4000}+>))")
_BREAK = "\x01"  # a <br>, until white space is collapsed
_SHORT_CELL_CHARS = 1000
_MAX_COLSPAN = 100
_MAX_NESTED_TABLES = 50  # deeper ones add their rows to the innermost of these


def read_html(path: Path, media_type: str = "text/html") -> CanonicalText:
    """Read an HTML file; its headings become sections, table rows lines."""
    text, warnings = decode_html(path.read_bytes())
    content, sections, hidden = html_text(text)
    return CanonicalText(content, media_type, (), sections, warnings + hidden_warning(hidden))


def read_epub(path: Path, media_type: str) -> CanonicalText:
    """Read the chapters of an EPUB in reading order.

    Raises:
        EncryptedDocumentError: if a chapter is protected.
        ReaderFailedError: if it is damaged.
    """
    texts: list[str] = []
    sections: list[Section] = []
    start, num_hidden, num_missing = 0, 0, 0
    with open_archive(path) as archive:
        names = set(archive.namelist())
        protected = b""
        if "META-INF/encryption.xml" in names:
            protected = read_part(archive, "META-INF/encryption.xml")
        for chapter in _spine(read_xml(archive, _package_part(archive)), _package_part(archive)):
            if chapter not in names:
                num_missing += 1
                continue
            if chapter.encode() in protected:
                raise EncryptedDocumentError(
                    f"{path.name} is protected against copying (DRM)",
                    hint="ingest a copy without protection",
                )
            html, _ = decode_html(read_part(archive, chapter))
            text, found, hidden = html_text(html, start)
            num_hidden += hidden
            if text:
                texts.append(text)
                sections += found
                start += len(text) + 2
    if not texts:
        raise ReaderFailedError(
            f"{path.name} names no chapter that it holds", hint="the EPUB is damaged; get it anew"
        )
    text = "\n\n".join(texts)
    warnings = hidden_warning(num_hidden)
    if num_missing:
        warnings += (f"{num_missing} chapters that it names are missing in the file",)
    return CanonicalText(text, media_type, (), tuple(sections), warnings)


def html_text(html: str, start: int = 0) -> tuple[str, tuple[Section, ...], int]:
    """Return the text, its sections with offsets from `start`, and the count of what is hidden."""
    parser = _TextParser()
    parser.feed(_without_hazards(html))
    parser.close()
    text, sections = join_blocks(parser.finish(), start)
    return text, sections, parser.num_hidden


def hidden_warning(num_hidden: int) -> tuple[str, ...]:
    """Return the warning for so many hidden elements, none for none."""
    if not num_hidden:
        return ()
    if num_hidden == 1:
        return ("1 hidden element is left out",)
    return (f"{num_hidden} hidden elements are left out",)


def decode_html(data: bytes) -> tuple[str, tuple[str, ...]]:
    """Return the text by the encoding that the page declares, else by what its bytes show."""
    declared = _CHARSET.search(data[:4096])
    if declared and not data.startswith(
        (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    ):
        try:
            return data.decode(declared[1].decode("ascii")), ()
        except (LookupError, UnicodeDecodeError):
            pass  # the declaration is wrong
    return decode(data)


def _without_hazards(html: str) -> str:
    """Return HTML in which every `<` begins a whole tag, and no comment or script is left.

    Python's parser looks from every unfinished construct to the end of the text, which takes
    minutes for a file full of them. Here each kind of end is missed only once.
    """
    parts: list[str] = []
    unclosed: set[str] = set()
    position = 0
    while start := _HAZARD.search(html, position):
        kind = (start["tag"] or start.group()).lower()
        end = None if kind in unclosed else _HAZARD_ENDS[kind].search(html, start.end())
        parts.append(html[position : start.start()])
        position = end.end() if end else start.end()
        if end is None:
            unclosed.add(kind)
            parts.append("" if start["tag"] else escape(start.group()))
        elif kind == _CDATA:
            parts.append(escape(html[start.end() : end.start()]))
    parts.append(html[position:])
    return _STRAY.sub("&lt;", _CONDITIONAL.sub("", "".join(parts)))


@dataclass(slots=True)
class _Table:
    """An open table: its rows of cells of blocks, and the cell that is open."""

    rows: list[list[list[Block]]] = field(default_factory=list)
    cell: list[Block] | None = None


class _TextParser(HTMLParser):
    """Collects blocks; inside a table, those of its cells."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.num_hidden = 0
        self._blocks: list[Block] = []
        self._inline: list[str] = []
        self._tables: list[_Table] = []
        self._open: list[str] = []
        self._num_open: Counter[str] = Counter()
        self._hidden_at: int | None = None  # depth of the outermost element that is not read
        self._lists: list[int | None] = []  # next number of each open list, None if not numbered
        self._marker = ""

    def finish(self) -> list[Block]:
        """Close what the page left open and return all blocks."""
        self._flush()
        while self._tables:
            self._end_table()
        return self._blocks

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open an element; those that it closes by coming are closed before."""
        while self._open and tag in _CLOSED_BY.get(self._open[-1], ()):
            self._close(self._open[-1])
        if tag in _VOID:
            self._void(tag, dict(attrs))
            return
        self._open.append(tag)
        self._num_open[tag] += 1
        if self._hidden_at is not None:
            return
        if tag in _NOT_TEXT or _is_hidden(dict(attrs)):
            self._hidden_at = len(self._open)
            self.num_hidden += tag not in _NOT_TEXT
            return
        if tag == "table":
            self._flush()
            if len(self._tables) < _MAX_NESTED_TABLES:
                self._tables.append(_Table())
        elif tag == "tr" and self._tables:
            self._flush()
            self._tables[-1].rows.append([])
            self._tables[-1].cell = None
        elif tag in ("td", "th") and self._tables:
            self._flush()
            self._start_cell(self._tables[-1], dict(attrs).get("colspan") or "1")
        elif tag in ("ul", "ol"):
            self._flush()
            self._lists.append(1 if tag == "ol" else None)
        elif tag == "li":
            self._flush()
            number = self._lists[-1] if self._lists else None
            self._marker = "- " if number is None else f"{number}. "
            if number is not None:
                self._lists[-1] = number + 1
        elif tag in _BLOCKS:
            self._flush()

    def handle_endtag(self, tag: str) -> None:
        """Close an element and whatever is still open inside it."""
        if not self._num_open[tag]:
            return
        while self._open[-1] != tag:
            self._close(self._open[-1])
        self._close(tag)

    def handle_data(self, data: str) -> None:
        """Take text, unless an element around it is hidden."""
        if self._hidden_at is None:
            self._inline.append(data)

    def unknown_decl(self, data: str) -> None:
        """Take the text of a CDATA section."""
        if data.startswith("CDATA["):
            self.handle_data(data[len("CDATA[") :])

    def _void(self, tag: str, attributes: dict[str, str | None]) -> None:
        if self._hidden_at is not None:
            return
        if tag == "br":
            self._inline.append(_BREAK)
        elif tag == "hr":
            self._flush()
        elif tag == "img" and (attributes.get("alt") or "").strip():
            self._inline.append(f"[image: {attributes['alt']}]")

    def _close(self, tag: str) -> None:
        depth = len(self._open)
        if self._hidden_at is not None:
            if self._hidden_at == depth:
                self._hidden_at = None
        elif tag == "table" and self._tables:
            self._flush()
            if self._num_open["table"] <= len(self._tables):
                self._end_table()
        elif tag in ("ul", "ol"):
            self._flush()
            self._lists = self._lists[:-1]
        elif tag in _BLOCKS or tag in ("li", "tr", "td", "th"):
            self._flush()
            if tag in ("td", "th") and self._tables:
                self._tables[-1].cell = None
        self._open.pop()
        self._num_open[tag] -= 1

    def _flush(self) -> None:
        text = "".join(self._inline)
        self._inline.clear()
        if self._num_open["pre"]:
            text = text.replace(_BREAK, "\n").strip("\n")
        else:
            text = " ".join(re.split(r"[ \t\n\r\f]+", text)).strip()
            text = re.sub(rf" ?{_BREAK} ?", "\n", text).strip()
        if not text.strip():
            return
        level = next((level for tag, level in _HEADINGS.items() if self._num_open[tag]), None)
        self._container().append(Block(self._marker + text, level, tight=bool(self._marker)))
        self._marker = ""

    def _container(self) -> list[Block]:
        """Return where a finished block belongs: the innermost open cell, or the page."""
        open_cells = (table.cell for table in reversed(self._tables) if table.cell is not None)
        return next(open_cells, self._blocks)

    def _start_cell(self, table: _Table, colspan: str) -> None:
        if not table.rows:
            table.rows.append([])
        table.cell = []
        table.rows[-1].append(table.cell)
        covered = min(int(colspan), _MAX_COLSPAN) - 1 if colspan.strip().isdecimal() else 0
        table.rows[-1].extend([] for _ in range(covered))

    def _end_table(self) -> None:
        """Add a table's rows to what is around it; the cells of a layout table stay blocks."""
        rows = self._tables.pop().rows
        blocks = [block for row in rows for cell in row for block in cell]
        if not any(block.level or len(block.text) > _SHORT_CELL_CHARS for block in blocks):
            cells = ([" ".join(block.text for block in cell) for cell in row] for row in rows)
            blocks = table_blocks(cells)
        self._container().extend(blocks)


def _is_hidden(attributes: dict[str, str | None]) -> bool:
    return "hidden" in attributes or bool(_HIDING.search(attributes.get("style") or ""))


def _package_part(archive: ZipFile) -> str:
    container = read_xml(archive, "META-INF/container.xml")
    root = next((e for e in container.iter() if local_name(e) == "rootfile"), None)
    return (root.get("full-path") or "") if root is not None else ""


def _spine(package: ET.Element, part: str) -> list[str]:
    """Return the part names of the chapters in reading order."""
    folder = str(PurePosixPath(part).parent)
    items = {e.get("id"): e for e in package.iter() if local_name(e) == "item"}
    references = [e.get("idref") for e in package.iter() if local_name(e) == "itemref"]
    return [
        resolve_part(folder, unquote(items[r].get("href") or "")) for r in references if r in items
    ]
