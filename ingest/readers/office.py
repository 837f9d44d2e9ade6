"""XLSX, ODS and RTF to canonical text through kreuzberg's document structure."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kreuzberg import ExtractionConfig, extract_file_sync

from ingest.readers.archive import check_sizes, open_archive
from ingest.readers.blocks import Block, join_blocks, table_blocks
from ingest.readers.formats import RTF
from rag.types import CanonicalText


def read_office(path: Path, media_type: str) -> CanonicalText:
    """Read a spreadsheet or an RTF; sheets and headings become sections.

    Raises:
        EncryptedDocumentError: if it needs a password.
        ReaderFailedError: if it is damaged or unfolds to an absurd size.
    """
    if media_type != RTF.media_type:
        with open_archive(path) as archive:
            check_sizes(archive)
    config = ExtractionConfig(use_cache=False, include_document_structure=True)
    result = extract_file_sync(str(path), media_type, config=config)
    structure: Any = result.document
    text, sections = join_blocks(_blocks(structure["nodes"] if structure else []))
    warnings = tuple(str(warning) for warning in result.processing_warnings)
    return CanonicalText(text, media_type, sections=sections, warnings=warnings)


def _blocks(nodes: list[dict[str, Any]]) -> Iterator[Block]:
    for node in nodes:
        content = node["content"]
        kind = content["node_type"]
        if kind in ("heading", "title"):
            yield Block(content["text"].strip(), content.get("level", 1))
        elif kind == "table":
            yield from table_blocks(_rows(content["grid"]))
        elif kind == "list_item":
            yield Block(f"- {content['text'].strip()}", tight=True)
        elif kind != "group":  # a group repeats the heading that it holds
            yield Block(str(content.get("text") or content.get("description") or "").rstrip())


def _rows(grid: dict[str, Any]) -> list[list[str]]:
    rows = [[""] * grid["cols"] for _ in range(grid["rows"])]
    for cell in grid["cells"]:
        rows[cell["row"]][cell["col"]] = cell["content"]
    return rows
