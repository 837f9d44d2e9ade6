"""ODT to canonical text: paragraphs, headings by outline level, lists, tables, notes."""

from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

from ingest.readers.archive import (
    local_attribute,
    local_name,
    open_archive,
    read_part,
    read_xml,
)
from ingest.readers.blocks import Block, join_blocks, table_blocks
from rag.errors import EncryptedDocumentError
from rag.types import CanonicalText

MAIN_PART = "content.xml"
_MAX_REPEATED = 100
# deleted text, remarks, and what is made anew from the rest
_NOT_TEXT = frozenset("tracked-changes annotation note-citation sequence-decls forms".split())


def read_odt(path: Path, media_type: str) -> CanonicalText:
    """Read an ODT; a note stands below the paragraph that calls it.

    Raises:
        EncryptedDocumentError: if it needs a password.
        ReaderFailedError: if it is damaged or unfolds to an absurd size.
    """
    with open_archive(path) as archive:
        manifest = "META-INF/manifest.xml"
        if manifest in archive.namelist() and b"encryption-data" in read_part(archive, manifest):
            raise EncryptedDocumentError(
                f"{path.name} is encrypted and needs a password",
                hint="save a copy without a password and ingest that",
            )
        root = read_xml(archive, MAIN_PART)
    bodies = (element for element in root if local_name(element) == "body")
    text, sections = join_blocks(block for body in bodies for block in _blocks(body))
    return CanonicalText(text, media_type, sections=sections)


def _blocks(parent: ET.Element, marker: str = "") -> Iterator[Block]:
    """Yield the blocks of a body, a cell, a section or a list; `marker` begins the first."""
    for child in parent:
        name = local_name(child)
        if name in ("p", "h"):
            yield from _paragraph(child, name, marker)
            marker = ""
        elif name == "table":
            yield from table_blocks(_rows(child))
        elif name in ("list-item", "list-header"):
            yield from _blocks(child, "- ")
        elif name not in _NOT_TEXT:
            yield from _blocks(child)


def _paragraph(paragraph: ET.Element, name: str, marker: str) -> Iterator[Block]:
    pieces: list[str] = []
    apart: list[ET.Element] = []
    _inline(paragraph, pieces, apart)
    text = "".join(pieces).strip()
    if name == "h":
        level = local_attribute(paragraph, "outline-level") or "1"
        yield Block(" ".join(text.split()), int(level) if level.isdecimal() else 1)
    elif text:
        yield Block(marker + text, tight=bool(marker))
    for element in apart:
        yield from _blocks(element)


def _inline(parent: ET.Element, pieces: list[str], apart: list[ET.Element]) -> None:
    pieces.append(parent.text or "")
    for child in parent:
        name = local_name(child)
        if name == "line-break":
            pieces.append("\n")
        elif name == "tab":
            pieces.append("\t")
        elif name == "s":
            count = local_attribute(child, "c") or "1"
            pieces.append(" " * min(int(count) if count.isdecimal() else 1, _MAX_REPEATED))
        elif name in ("note", "text-box"):
            apart.append(child)
        elif name not in _NOT_TEXT:
            _inline(child, pieces, apart)
        pieces.append(child.tail or "")


def _rows(parent: ET.Element) -> Iterator[list[str]]:
    """Yield a table's rows, through header rows and row groups."""
    for child in parent:
        if local_name(child) == "table-row":
            yield [text for cell in child for text in _cell(cell)]
        elif local_name(child).startswith("table-"):
            yield from _rows(child)


def _cell(cell: ET.Element) -> list[str]:
    text, _ = join_blocks(_blocks(cell))
    repeated = local_attribute(cell, "number-columns-repeated") or "1"
    return [text] * min(int(repeated) if repeated.isdecimal() else 1, _MAX_REPEATED)
