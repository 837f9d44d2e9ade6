"""Headings, paragraphs and table rows in reading order to canonical text with its sections."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rag.types import Section


@dataclass(frozen=True, slots=True)
class Block:
    """One paragraph, heading (`level` 1 or more), list item or table row.

    A `tight` block follows the one above it without a blank line.
    """

    text: str
    level: int | None = None
    tight: bool = False


def join_blocks(blocks: Iterable[Block], start: int = 0) -> tuple[str, tuple[Section, ...]]:
    """Return the text of all blocks, and the headings as sections; offsets count from `start`."""
    parts: list[str] = []
    sections: list[Section] = []
    for block in blocks:
        if not block.text.strip():
            continue
        if parts:
            parts.append("\n" if block.tight else "\n\n")
            start += len(parts[-1])
        if block.level is not None:
            sections.append(Section(block.level, " ".join(block.text.split()), start))
        parts.append(block.text)
        start += len(block.text)
    return "".join(parts), tuple(sections)


def table_blocks(rows: Iterable[Sequence[str]]) -> list[Block]:
    """Return one block a row, its cells parted by ` | `; columns that are empty throughout go."""
    cleaned = [[" ".join(cell.split()) for cell in row] for row in rows]
    width = max(map(len, cleaned), default=0)
    kept = [n for n in range(width) if any(n < len(row) and row[n] for row in cleaned)]
    lines = [" | ".join(row[n] if n < len(row) else "" for n in kept) for row in cleaned]
    filled = [line.rstrip(" |") for line in lines if line.strip(" |")]
    return [Block(line, tight=number > 0) for number, line in enumerate(filled)]
