"""Canonical text to chunks that are exact in tokens and keep their offsets."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from itertools import pairwise

from rag.sentences import ends_sentence
from rag.types import CanonicalText, Chunk, Section

TokenOffsets = Callable[[str], list[tuple[int, int]]]

# What of the title and the headings is embedded with a chunk. In bytes, because no tokenizer makes
# more tokens than bytes: whatever the script, the chunk keeps the rest of the budget.
PREFIX_BYTES = 160
# Tokenizing one text of megabytes holds hundreds of bytes a token; a window bounds that.
WINDOW_CHARS = 50_000
# A stretch without spaces may be one unknown token however long it is; its chunks are cut here.
CHARS_PER_TOKEN = 20

# Where a chunk may end, weakest to strongest; a stronger one is taken if it lies in the second
# half of what fits. A section start always ends a chunk.
_LINE, _SENTENCE, _PARAGRAPH = 1, 2, 3
_BREAK = re.compile(r"\n[ \t]*\n\s*|(?<=[.!?])\s+|\n|(?<=[。！？])")
_NOT_SPACE = re.compile(r"\S")


def chunk_text(
    content: CanonicalText, *, title: str, token_offsets: TokenOffsets, max_tokens: int
) -> list[Chunk]:
    """Return all chunks of a text; see `iter_chunks`."""
    return list(
        iter_chunks(content, title=title, token_offsets=token_offsets, max_tokens=max_tokens)
    )


def iter_chunks(
    content: CanonicalText, *, title: str, token_offsets: TokenOffsets, max_tokens: int
) -> Iterator[Chunk]:
    """Cut a text into chunks of at most `max_tokens` tokens, heading included; lazily, in order.

    The chunks tile the text: no character other than white space is lost or repeated, none
    crosses a section start, and `content.text[c.start:c.end] == c.text`.

    Args:
        content: the text with its pages and sections.
        title: the document's title, part of what is embedded with each chunk.
        token_offsets: the embedder's tokenizer.
        max_tokens: what the embedder reads, special tokens not counted.
    """
    text = content.text
    page_starts = [page.start for page in content.pages]

    def page_at(offset: int) -> int | None:
        at = max(bisect_right(page_starts, offset) - 1, 0)
        return content.pages[at].number if content.pages else None

    ordinal = 0
    for start, end, path in _stretches(content):
        heading_tokens = len(token_offsets(embedded_text(title, path, "")))
        budget = max(max_tokens - heading_tokens, max_tokens // 4, 1)
        for first, last, num_tokens in _cut(text, start, end, token_offsets, budget):
            yield Chunk(
                ordinal=ordinal,
                start=first,
                end=last,
                text=text[first:last],
                num_tokens=num_tokens,
                page_first=page_at(first),
                page_last=page_at(last - 1),
                heading_path=path,
            )
            ordinal += 1


def embedded_text(title: str, path: tuple[str, ...], text: str) -> str:
    """Return what the embedder sees of a chunk: where it stands, then what it says.

    Where title and headings are longer than `PREFIX_BYTES`, the headings between the title and the
    innermost go first.
    """
    parts = [title, *path]
    while len(parts) > 2 and len(" > ".join(parts).encode()) > PREFIX_BYTES:
        del parts[1]
    if len(" > ".join(parts).encode()) > PREFIX_BYTES:
        share = (PREFIX_BYTES - 3) // len(parts)
        parts = [part.encode()[:share].decode(errors="ignore") for part in parts]
    return f"{' > '.join(parts)}\n{text}"


def heading_path(sections: list[Section], offset: int) -> tuple[str, ...]:
    """Return the headings above `offset`, outermost first; `sections` are in text order."""
    path: list[Section] = []
    for section in sections:
        if section.start > offset:
            break
        _enter(section, path)
    return tuple(section.title for section in path)


def _enter(section: Section, path: list[Section]) -> None:
    """Put a section under those of `path` that it belongs to; the others end here."""
    while path and path[-1].level >= section.level:
        path.pop()
    path.append(section)


def _stretches(content: CanonicalText) -> Iterator[tuple[int, int, tuple[str, ...]]]:
    """Yield `start, end, heading path` between any two neighbouring section starts."""
    sections = sorted(content.sections, key=lambda section: section.start)
    size = len(content.text)
    starts = sorted({0, *(s.start for s in sections if 0 < s.start < size), size})
    path: list[Section] = []
    entered = 0
    for start, end in pairwise(starts):
        while entered < len(sections) and sections[entered].start <= start:
            _enter(sections[entered], path)
            entered += 1
        yield start, end, tuple(section.title for section in path)


def _cut(
    text: str, start: int, end: int, token_offsets: TokenOffsets, budget: int
) -> Iterator[tuple[int, int, int]]:
    """Yield the trimmed `start, end` and the token count of each chunk of `text[start:end]`."""
    max_chars = budget * CHARS_PER_TOKEN
    window_chars = max(WINDOW_CHARS, 2 * max_chars)
    window_end = start
    token_starts: list[int] = []
    breaks: list[tuple[int, int]] = []
    while word := _NOT_SPACE.search(text, start, end):
        start = word.start()
        first = bisect_left(token_starts, start)
        if len(token_starts) - first <= budget and window_end < end:
            window_end = min(start + window_chars, end)
            found_tokens = token_offsets(text[start:window_end])
            token_starts, first = [start + token_start for token_start, _ in found_tokens], 0
            breaks = _breaks(text, start, window_end)
        limit = min(_at(token_starts, first + budget, window_end), start + max_chars)
        limit = max(limit, start + 1)  # one character may be several tokens
        while True:
            half = max((start + limit) // 2, start + 1)
            cut = _best_break(breaks, half, limit) if limit < end else end
            last = start + len(text[start:cut].rstrip())
            offsets = token_offsets(text[start:last])
            if len(offsets) <= budget or last - start == 1:
                break
            # A part may have more tokens than it had inside the whole: what fits of them is kept.
            limit = max(start + offsets[budget][0], start + 1)
        yield start, last, len(offsets)
        start = cut


def _at(positions: list[int], index: int, otherwise: int) -> int:
    return positions[index] if index < len(positions) else otherwise


def _best_break(breaks: list[tuple[int, int]], half: int, limit: int) -> int:
    """Return the strongest, then latest break in `[half, limit]`; `limit` where there is none."""
    low = bisect_left(breaks, (half, 0))
    high = bisect_right(breaks, (limit, _PARAGRAPH))
    return max(breaks[low:high], key=lambda found: (found[1], found[0]), default=(limit, 0))[0]


def _breaks(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """Return the offset and the strength of each place in `text[start:end]` to end a chunk at."""
    breaks = []
    for match in _BREAK.finditer(text, start, end):
        strength, stop = _strength(match[0]), match.start() - 1
        is_stop = strength == _SENTENCE and text[stop] == "."
        if not is_stop or ends_sentence(text, stop, match.start()):
            breaks.append((match.end(), strength))
    return breaks


def _strength(found: str) -> int:
    if found.count("\n") > 1:
        return _PARAGRAPH
    return _LINE if "\n" in found else _SENTENCE
