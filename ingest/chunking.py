"""Canonical text to chunks that are exact in tokens and keep their offsets."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from itertools import pairwise

from rag.types import CanonicalText, Chunk, Section

TokenOffsets = Callable[[str], list[tuple[int, int]]]

# Where a chunk may end, weakest to strongest; a stronger one is taken if it lies in the second
# half of what fits. A section start always ends a chunk.
_LINE, _SENTENCE, _PARAGRAPH = 1, 2, 3
_BREAK = re.compile(r"\n[ \t]*\n\s*|(?<=[.!?])\s+|\n|(?<=[。！？])")


def chunk_text(
    content: CanonicalText, *, title: str, token_offsets: TokenOffsets, max_tokens: int
) -> list[Chunk]:
    """Cut a text into chunks of at most `max_tokens` tokens, heading included.

    The chunks tile the text: no character other than white space is lost or repeated, none
    crosses a section start, and `content.text[c.start:c.end] == c.text`.

    Args:
        content: the text with its pages and sections.
        title: the document's title, part of what is embedded with each chunk.
        token_offsets: the embedder's tokenizer.
        max_tokens: what the embedder reads, special tokens not counted.
    """
    text, sections = content.text, sorted(content.sections, key=lambda s: s.start)
    starts = sorted({0, *(s.start for s in sections if 0 < s.start < len(text)), len(text)})
    chunks: list[Chunk] = []
    for start, end in pairwise(starts):
        path = heading_path(sections, start)
        heading_tokens = len(token_offsets(embedded_text(title, path, "")))
        budget = max(max_tokens - heading_tokens, max_tokens // 2)
        for first, last in _cut(text[start:end], token_offsets, budget):
            a, b = start + first, start + last
            chunks.append(
                Chunk(
                    ordinal=len(chunks),
                    start=a,
                    end=b,
                    text=text[a:b],
                    num_tokens=len(token_offsets(text[a:b])),
                    page_first=_page_at(content, a),
                    page_last=_page_at(content, b - 1),
                    heading_path=path,
                )
            )
    return chunks


def embedded_text(title: str, path: tuple[str, ...], text: str) -> str:
    """Return what the embedder sees of a chunk: where it stands, then what it says."""
    return f"{' > '.join((title, *path))[:200]}\n{text}"


def heading_path(sections: list[Section], offset: int) -> tuple[str, ...]:
    """Return the headings above `offset`, outermost first; `sections` are in text order."""
    path: list[Section] = []
    for section in sections:
        if section.start > offset:
            break
        while path and path[-1].level >= section.level:
            path.pop()
        path.append(section)
    return tuple(section.title for section in path)


def _cut(text: str, token_offsets: TokenOffsets, budget: int) -> list[tuple[int, int]]:
    """Return the trimmed `[start, end)` of each chunk of one section's text."""
    token_starts = [start for start, _ in token_offsets(text)]
    breaks = [(m.end(), _strength(m.group())) for m in _BREAK.finditer(text)]
    positions = [position for position, _ in breaks]
    spans, start = [], 0
    while start < len(text):
        first_token = bisect_left(token_starts, start)
        size = budget
        while True:
            last_token = first_token + size
            if last_token >= len(token_starts):
                end = len(text)
            else:
                half = token_starts[first_token + max(1, size // 2)]
                limit = token_starts[last_token]
                low, high = bisect_left(positions, half), bisect_right(positions, limit)
                best = max(breaks[low:high], key=lambda b: (b[1], b[0]), default=(limit, 0))
                end = max(best[0], start + 1)
            span = _trimmed(text, start, end)
            # A tokenizer may need more tokens for a part than it had inside the whole.
            if size == 1 or len(token_offsets(text[span[0] : span[1]])) <= budget:
                break
            size = max(1, size - max(1, size // 16))
        if span[0] < span[1]:
            spans.append(span)
        start = end
    return spans


def _strength(found: str) -> int:
    if found.count("\n") > 1:
        return _PARAGRAPH
    return _LINE if "\n" in found else _SENTENCE


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    part = text[start:end]
    left = len(part) - len(part.lstrip())
    right = len(part.rstrip())
    return (start + left, start + right) if left < right else (start, start)


def _page_at(content: CanonicalText, offset: int) -> int | None:
    if not content.pages:
        return None
    at = bisect_right([page.start for page in content.pages], offset) - 1
    return content.pages[max(at, 0)].number
