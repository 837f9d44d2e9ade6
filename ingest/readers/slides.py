"""PPTX to canonical text: a slide is a page and a section, its speaker notes stand below it."""

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
from rag.types import CanonicalText, Page, Section

MAIN_PART = "ppt/presentation.xml"
PAGE_SEPARATOR = "\n\n"


def read_pptx(path: Path, media_type: str) -> CanonicalText:
    """Read a PPTX in the order in which it is shown.

    Raises:
        EncryptedDocumentError: if it needs a password.
        ReaderFailedError: if it is damaged or unfolds to an absurd size.
    """
    texts: list[str] = []
    pages: list[Page] = []
    sections: list[Section] = []
    hidden: list[str] = []
    missing: list[str] = []
    start = 0
    with open_archive(path) as archive:
        relations = read_relations(archive, MAIN_PART)
        ids = [e for e in read_xml(archive, MAIN_PART).iter() if local_name(e) == "sldId"]
        for number, slide_id in enumerate(ids, 1):
            # the relation's id has the same local name as the slide's own
            relation = next((v for k, v in slide_id.attrib.items() if k.endswith("}id")), "")
            if relation not in relations:
                missing.append(str(number))
                continue
            part = relations[relation][1]
            root = read_xml(archive, part)
            title, blocks = _slide(root)
            for kind, notes_part in read_relations(archive, part).values():
                if kind == "notesSlide":
                    blocks += _notes(read_xml(archive, notes_part))
            if root.get("show") == "0":
                hidden.append(str(number))
            text, _ = join_blocks(blocks)
            texts.append(text)
            pages.append(Page(number, str(number), start, start + len(text)))
            sections.append(Section(1, title or f"Slide {number}", start))
            start += len(text) + len(PAGE_SEPARATOR)
    warnings = [f"hidden slides are read with the rest: {', '.join(hidden)}"] if hidden else []
    if missing:
        warnings.append(f"slides that it names are missing in the file: {', '.join(missing)}")
    text = PAGE_SEPARATOR.join(texts)
    sections = [section for section in sections if section.start < len(text)]
    return CanonicalText(text, media_type, tuple(pages), tuple(sections), tuple(warnings))


def _slide(root: ET.Element) -> tuple[str, list[Block]]:
    """Return a slide's title, and its blocks with the title first."""
    title, heads, blocks = "", [], []
    for shape in root.iter():
        name = local_name(shape)
        if name == "sp":
            paragraphs = [Block(text) for text in _paragraphs(shape)]
            if not title and _placeholder(shape) in ("title", "ctrTitle"):
                title = " ".join(" ".join(block.text for block in paragraphs).split())
                heads = paragraphs
            else:
                blocks += paragraphs
        elif name == "tbl":
            rows = (row for row in shape if local_name(row) == "tr")
            cells = ([c for c in row if local_name(c) == "tc"] for row in rows)
            blocks += table_blocks([" ".join(_paragraphs(cell)) for cell in row] for row in cells)
    return title, heads + blocks


def _notes(root: ET.Element) -> list[Block]:
    shapes = (s for s in root.iter() if local_name(s) == "sp" and _placeholder(s) == "body")
    text = "\n".join(line for shape in shapes for line in _paragraphs(shape))
    return [Block(f"Notes: {text}")] if text else []


def _placeholder(shape: ET.Element) -> str | None:
    found = next((e for e in shape.iter() if local_name(e) == "ph"), None)
    return None if found is None else local_attribute(found, "type")


def _paragraphs(shape: ET.Element) -> Iterator[str]:
    for paragraph in shape.iter():
        if local_name(paragraph) != "p":
            continue
        pieces = (
            "\n" if local_name(piece) == "br" else piece.text or ""
            for piece in paragraph.iter()
            if local_name(piece) in ("t", "br")
        )
        if text := "".join(pieces).strip():
            yield text
