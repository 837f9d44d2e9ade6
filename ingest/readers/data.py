"""Notebooks, JSON, JSON lines and tables to canonical text."""

import json
import re
from pathlib import Path
from typing import Any

from ingest.readers.blocks import Block, join_blocks
from ingest.readers.chat import chat_from_json, turn_sections
from ingest.readers.text import decode, markdown_headings
from rag.types import CanonicalText, Section

# a JSON text with a longer line was written for machines; line breaks let chunks end well
_LONG_LINE_CHARS = 2000
_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{},:]|[^\s"\[\]{},:]+')


def read_table(path: Path, media_type: str) -> CanonicalText:
    """Read CSV, TSV or JSON lines: every row is a line, as it stands."""
    text, warnings = decode(path.read_bytes())
    return CanonicalText(text, media_type, warnings=warnings)


def read_json(path: Path, media_type: str) -> CanonicalText:
    """Read JSON: a chat export by its turns, anything else as it stands.

    Text on one long line is broken after its commas and brackets; no other sign is changed.
    """
    text, warnings = decode(path.read_bytes())
    try:
        value = json.loads(text)
    except ValueError as error:
        warning = f"it is not valid JSON ({error}) and is read as plain text"
        return CanonicalText(text, media_type, warnings=(*warnings, warning))
    chat = chat_from_json(value)
    if chat is not None:
        said, turns = chat
        warning = "read as a chat: speaker, time and words of each message, no other field"
        sections = turn_sections(turns, len(said))
        return CanonicalText(said, media_type, (), sections, (*warnings, warning))
    if max(map(len, text.split("\n"))) > _LONG_LINE_CHARS:
        text = _with_line_breaks(text)
    return CanonicalText(text, media_type, warnings=warnings)


def read_notebook(path: Path, media_type: str) -> CanonicalText:
    """Read a Jupyter notebook: its cells in order with the text of their outputs."""
    text, warnings = decode(path.read_bytes())
    notebook = json.loads(text)
    cells = notebook.get("cells") or [
        cell for sheet in notebook.get("worksheets", ()) for cell in sheet.get("cells", ())
    ]
    parts: list[str] = []
    sections: list[Section] = []
    start = num_pictures = 0
    for cell in cells:
        source = _joined(cell.get("source", cell.get("input", "")))
        outputs, pictures = _outputs(cell.get("outputs", ()))
        num_pictures += pictures
        part, _ = join_blocks([Block(source.strip("\n")), *map(Block, outputs)])
        if not part:
            continue
        if cell.get("cell_type") == "markdown":
            sections += [
                Section(s.level, s.title, start + s.start) for s in markdown_headings(part)
            ]
        parts.append(part)
        start += len(part) + 2
    if num_pictures:
        warnings = (
            *warnings,
            f"outputs without text (pictures), which are not read: {num_pictures}",
        )
    return CanonicalText("\n\n".join(parts), media_type, (), tuple(sections), warnings)


def _outputs(outputs: list[dict[str, Any]]) -> tuple[list[str], int]:
    """Return the texts of a cell's outputs, and how many of them have none."""
    texts, num_pictures = [], 0
    for output in outputs:
        data = output.get("data", {})
        shown = output.get("text", data.get("text/plain", output.get("traceback")))
        if any(kind.startswith("image/") for kind in data):
            num_pictures += 1
        elif shown is not None:
            # colours of a terminal
            texts.append("Output:\n" + re.sub(r"\x1b\[[\d;]*m", "", _joined(shown)).strip("\n"))
    return texts, num_pictures


def _joined(lines: str | list[str]) -> str:
    return lines if isinstance(lines, str) else "".join(map(str, lines))


def _with_line_breaks(text: str) -> str:
    pieces: list[str] = []
    depth = 0
    for token in _JSON_TOKEN.findall(text):
        if token in "]}":
            depth -= 1
            pieces.append(f"\n{' ' * min(depth, 20)}")
        pieces.append(token)
        if token in "[{":
            depth += 1
        if token in "[{,":
            pieces.append(f"\n{' ' * min(depth, 20)}")
        elif token == ":":
            pieces.append(" ")
    return "".join(pieces)
