"""Plain text and Markdown to canonical text with sections."""

import re
from itertools import pairwise
from pathlib import Path

from charset_normalizer import from_bytes
from markdown_it import MarkdownIt

from rag.types import CanonicalText, Section

# A line of text over a line of one repeated sign of at least its length: reStructuredText's title.
_UNDERLINED = re.compile(r"^(?P<title>\S[^\n]*)\n(?P<sign>[=\-*~^#+])(?P=sign){2,}[ \t]*$", re.M)
_BOMS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


def read_text(path: Path) -> CanonicalText:
    """Read a plain text file; underlined titles become sections."""
    text, warnings = decode(path.read_bytes())
    return CanonicalText(text, "text/plain", sections=underlined_titles(text), warnings=warnings)


def read_markdown(path: Path) -> CanonicalText:
    """Read a Markdown file; its headings become sections, its source is the canonical text."""
    text, warnings = decode(path.read_bytes())
    return CanonicalText(text, "text/markdown", sections=markdown_headings(text), warnings=warnings)


def decode(data: bytes) -> tuple[str, tuple[str, ...]]:
    """Return the text with Unix line ends, and a warning if its encoding had to be guessed."""
    for bom, encoding in _BOMS:
        if data.startswith(bom):
            return _unix(data.decode(encoding, errors="replace")), ()
    try:
        return _unix(data.decode("utf-8")), ()
    except UnicodeDecodeError:
        best = from_bytes(data).best()
    if best is None:
        warning = "the encoding is unknown: unreadable bytes are shown as �"
        return _unix(data.decode("utf-8", errors="replace")), (warning,)
    return _unix(str(best)), (f"the encoding is not declared; read as {best.encoding}",)


def underlined_titles(text: str) -> tuple[Section, ...]:
    """Return the underlined titles; a sign's level is the order in which the signs first appear.

    Source: the rule of reStructuredText, "Section structure" in its specification.
    """
    levels: dict[str, int] = {}
    sections = []
    for match in _UNDERLINED.finditer(text):
        title = match["title"].strip()
        underline = text[match.start("sign") : match.end()].rstrip()
        if len(underline) < len(title) or not any(c.isalnum() for c in title):
            continue
        level = levels.setdefault(match["sign"], len(levels) + 1)
        sections.append(Section(level, title, match.start()))
    return tuple(sections)


def markdown_headings(text: str) -> tuple[Section, ...]:
    """Return the headings of a Markdown text, as CommonMark sees them."""
    line_starts = [0]
    for line in text.splitlines(keepends=True):
        line_starts.append(line_starts[-1] + len(line))
    tokens = MarkdownIt("commonmark").parse(text)
    sections = []
    for opening, content in pairwise(tokens):
        if opening.type != "heading_open" or opening.map is None or not content.content.strip():
            continue
        title = "".join(c.content for c in content.children or () if c.content).strip()
        start = line_starts[opening.map[0]]
        sections.append(Section(int(opening.tag[1:]), title or content.content, start))
    return tuple(sections)


def _unix(text: str) -> str:
    # splitlines() also breaks at form feeds and the like; CommonMark counts "\n" only
    return re.sub(r"\r\n?|[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]", "\n", text).replace("\x00", "�")
