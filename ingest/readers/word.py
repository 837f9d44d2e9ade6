"""DOCX to canonical text: paragraphs, headings by style, tables, footnotes and text boxes.

Our own reading of WordprocessingML: see docs/decisions/0007 for what the library lost.
"""

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

from ingest.readers.archive import (
    local_attribute,
    local_name,
    open_archive,
    read_relations,
    read_xml,
)
from ingest.readers.blocks import Block, join_blocks, table_blocks
from rag.types import CanonicalText

MAIN_PART = "word/document.xml"
_HEADING_NAME = re.compile(r"heading (\d)|title", re.I)
_BODY_LEVEL = 9  # w:outlineLvl 9 is body text
_MAX_SPAN = 100
_DELETED = frozenset(
    "del moveFrom instrText delText pPr rPr tblPr tcPr trPr sectPr Fallback".split()
)


def read_docx(path: Path, media_type: str) -> CanonicalText:
    """Read a DOCX; tracked deletions are left out, hidden text is read and told.

    Raises:
        EncryptedDocumentError: if it needs a password.
        ReaderFailedError: if it is damaged or unfolds to an absurd size.
    """
    with open_archive(path) as archive:
        relations = dict(read_relations(archive, MAIN_PART).values())
        body = read_xml(archive, MAIN_PART)
        reader = _WordReader(
            _heading_styles(archive, relations.get("styles")),
            {
                kind: _notes(archive, relations.get(f"{kind}s"), kind)
                for kind in ("footnote", "endnote")
            },
        )
        text, sections = join_blocks(reader.blocks(body))
        warnings = []
        if reader.num_hidden:
            warnings.append(f"hidden text in {reader.num_hidden} places is read with the rest")
        if relations.get("comments") in archive.namelist():
            warnings.append("its comments are not read")
    return CanonicalText(text, media_type, sections=sections, warnings=tuple(warnings))


class _WordReader:
    """Walks the body once; `num_hidden` counts the hidden runs met."""

    def __init__(
        self, heading_styles: dict[str, int], notes: dict[str, dict[str, ET.Element]]
    ) -> None:
        self._heading_styles = heading_styles
        self._notes = notes
        self.num_hidden = 0

    def blocks(self, parent: ET.Element) -> Iterator[Block]:
        """Yield the blocks of a body, a cell, a note or a text box."""
        for child in parent:
            name = local_name(child)
            if name == "p":
                yield from self._paragraph(child)
            elif name == "tbl":
                yield from table_blocks(self._rows(child))
            elif name not in _DELETED:
                yield from self.blocks(child)

    def _rows(self, table: ET.Element) -> Iterator[list[str]]:
        for row in _own(table, "tr"):
            cells: list[str] = []
            for cell in _own(row, "tc"):
                cells.append(self._cell(cell))
                properties = _child(cell, "tcPr")
                span = _value(_child(properties, "gridSpan")) if properties is not None else None
                if span is not None and span.isdecimal():
                    cells += [""] * (min(int(span), _MAX_SPAN) - 1)
            yield cells

    def _cell(self, cell: ET.Element) -> str:
        return join_blocks(self.blocks(cell))[0]

    def _paragraph(self, paragraph: ET.Element) -> Iterator[Block]:
        pieces: list[str] = []
        boxes: list[ET.Element] = []
        notes: list[tuple[str, ET.Element]] = []
        self._inline(paragraph, pieces, boxes, notes)
        text = "".join(pieces).strip()
        properties = next((c for c in paragraph if local_name(c) == "pPr"), None)
        level = self._level(properties)
        if level is None and properties is not None and _child(properties, "numPr") is not None:
            text = f"- {text}" if text else ""
        yield Block(" ".join(text.split()) if level else text, level)
        for box in boxes:
            yield from self.blocks(box)
        for label, note in notes:
            yield Block(f"{label} {self._cell(note)}")

    def _inline(
        self,
        parent: ET.Element,
        pieces: list[str],
        boxes: list[ET.Element],
        notes: list[tuple[str, ET.Element]],
    ) -> None:
        for child in parent:
            name = local_name(child)
            if name == "t":
                pieces.append(child.text or "")
            elif name == "tab":
                pieces.append("\t")
            elif name in ("br", "cr"):
                pieces.append("\n")
            elif name == "noBreakHyphen":
                pieces.append("-")
            elif name == "sym":
                pieces.append(_symbol(child))
            elif name in ("footnoteReference", "endnoteReference"):
                note = self._notes[name[:-9]].get(local_attribute(child, "id") or "")
                if note is not None:
                    label = f"[{name[:-9]} {local_attribute(child, 'id')}]"
                    pieces.append(label)
                    notes.append((label, note))
            elif name == "txbxContent":
                boxes.append(child)
            elif name not in _DELETED:
                if name == "r" and _is_hidden(child):
                    self.num_hidden += 1
                self._inline(child, pieces, boxes, notes)

    def _level(self, properties: ET.Element | None) -> int | None:
        if properties is None:
            return None
        outline = _value(_child(properties, "outlineLvl"))
        if outline is not None and outline.isdigit():
            return int(outline) + 1 if int(outline) < _BODY_LEVEL else None
        return self._heading_styles.get(_value(_child(properties, "pStyle")) or "")


def _heading_styles(archive: zipfile.ZipFile, part: str | None) -> dict[str, int]:
    """Return style id -> heading level; a style without one inherits that of its base."""
    if part not in archive.namelist() or part is None:
        return {}
    levels: dict[str, int | None] = {}
    bases: dict[str, str] = {}
    for style in read_xml(archive, part):
        style_id = local_attribute(style, "styleId")
        if style_id is None:
            continue
        properties = _child(style, "pPr")
        outline = _value(_child(properties, "outlineLvl")) if properties is not None else None
        named = _HEADING_NAME.fullmatch(_value(_child(style, "name")) or "")
        if outline is not None and outline.isdigit():
            levels[style_id] = int(outline) + 1 if int(outline) < _BODY_LEVEL else None
        elif named:
            levels[style_id] = int(named[1] or 1)
        else:
            bases[style_id] = _value(_child(style, "basedOn")) or ""
    found = {}
    for style_id in [*levels, *bases]:
        base, seen = style_id, set[str]()
        while base in bases and base not in seen:
            seen.add(base)
            base = bases[base]
        if level := levels.get(base):
            found[style_id] = level
    return found


def _notes(archive: zipfile.ZipFile, part: str | None, kind: str) -> dict[str, ET.Element]:
    if part not in archive.namelist() or part is None:
        return {}
    notes = (note for note in read_xml(archive, part) if local_name(note) == kind)
    # those with a type are the line that parts notes from text
    return {
        local_attribute(note, "id") or "": note
        for note in notes
        if local_attribute(note, "type") in (None, "normal")
    }


def _is_hidden(run: ET.Element) -> bool:
    properties = _child(run, "rPr")
    vanish = _child(properties, "vanish") if properties is not None else None
    has_text = any(local_name(child) == "t" and child.text for child in run)
    return vanish is not None and has_text and _value(vanish) not in ("0", "false", "off")


def _symbol(element: ET.Element) -> str:
    try:
        return chr(int(local_attribute(element, "char") or "", 16))
    except (ValueError, OverflowError):
        return "�"


def _child(element: ET.Element, name: str) -> ET.Element | None:
    return next((child for child in element if local_name(child) == name), None)


def _value(element: ET.Element | None) -> str | None:
    return None if element is None else local_attribute(element, "val")


def _own(parent: ET.Element, name: str) -> Iterator[ET.Element]:
    """Yield a table's rows or a row's cells, through wrappers but not those of a nested table."""
    for child in parent:
        if local_name(child) == name:
            yield child
        elif local_name(child) not in ("tbl", "tc", *_DELETED):
            yield from _own(child, name)
