"""Plain text, Markdown, reStructuredText and LaTeX: the source is the canonical text."""

import codecs
import re
from itertools import pairwise
from pathlib import Path

from charset_normalizer import from_bytes
from markdown_it import MarkdownIt

from ingest.readers.chat import chat_sections
from rag.types import CanonicalText, Section

# A line of text over a line of one repeated sign of at least its length: reStructuredText's title.
_UNDERLINED = re.compile(r"^(?P<title>\S[^\n]*)\n(?P<sign>[=\-*~^#+\"'])(?P=sign){2,}[ \t]*$", re.M)
# A numbered chapter that stands alone between blank lines, as in a printed book.
_CHAPTER = re.compile(
    r"(?:\A|\n[ \t]*\n)[ \t]*(?P<title>(?P<kind>BOOK|Book|PART|Part|CHAPTER|Chapter|ACT|SCENE)"
    r" (?:[IVXLC]+|\d{1,3}|[A-Z]{3,9})\b[^\n]{0,80}?)[ \t]*(?=\n[ \t]*\n)"
)
_LEAST_CHAPTERS = 3
_LATEX = re.compile(
    r"^[^%\n]*?\\(?P<kind>part|chapter|section|subsection|subsubsection|paragraph)\*?"
    r"(?:\[[^\]\n]*\])?\{(?P<title>(?:[^{}]|\{[^{}]*\})*)\}",
    re.M,
)
_LATEX_KINDS = ("part", "chapter", "section", "subsection", "subsubsection", "paragraph")
_FRONT_MATTER = re.compile(r"\A---\n(?:.*\n)*?(?:---|\.\.\.)[ \t]*\n")
# UTF-32 first: its mark begins with that of UTF-16
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_KANA = re.compile("[\u3041-\u30ff]")
_HALF_WIDTH_KANA = re.compile("[\uff61-\uff9f]")


def read_text(path: Path, media_type: str = "text/plain") -> CanonicalText:
    """Read a plain text file; the turns of a chat, underlined titles or chapters are sections."""
    text, warnings = decode(path.read_bytes())
    sections = chat_sections(text) or underlined_titles(text) or _chapters(text)
    return CanonicalText(text, media_type, sections=sections, warnings=warnings)


def read_markdown(path: Path, media_type: str = "text/markdown") -> CanonicalText:
    """Read a Markdown file; its headings become sections."""
    text, warnings = decode(path.read_bytes())
    return CanonicalText(text, media_type, sections=markdown_headings(text), warnings=warnings)


def read_rest(path: Path, media_type: str = "text/x-rst") -> CanonicalText:
    """Read a reStructuredText file; its underlined titles become sections."""
    text, warnings = decode(path.read_bytes())
    return CanonicalText(text, media_type, sections=underlined_titles(text), warnings=warnings)


def read_latex(path: Path, media_type: str = "text/x-tex") -> CanonicalText:
    """Read a LaTeX file; its sectioning commands become sections."""
    text, warnings = decode(path.read_bytes())
    kinds = [kind for kind in _LATEX_KINDS if re.search(rf"\\{kind}\b", text)]
    sections = [
        Section(kinds.index(m["kind"]) + 1, title, m.start("kind") - 1)
        for m in _LATEX.finditer(text)
        if (title := " ".join(re.sub(r"\\[a-zA-Z]+\s*|[{}~]", " ", m["title"]).split()))
    ]
    return CanonicalText(text, media_type, sections=tuple(sections), warnings=warnings)


def decode(data: bytes) -> tuple[str, tuple[str, ...]]:
    """Return the text with Unix line ends, and a warning if its encoding had to be guessed."""
    for bom, encoding in _BOMS:
        if data.startswith(bom):
            return _unix(data.decode(encoding, errors="replace")), ()
    encoding = _utf16_without_mark(data[:4096]) or "utf-8"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        return _guessed(data)
    if b"\x1b$" in data[:4096]:  # ISO-2022-JP is made of ASCII bytes
        return _guessed(data)
    warnings = () if encoding == "utf-8" else (f"the encoding is not declared; read as {encoding}",)
    return _unix(text), warnings


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
    """Return the headings of a Markdown text, as CommonMark sees them; YAML on top is none."""
    line_starts = [0]
    for line in text.splitlines(keepends=True):
        line_starts.append(line_starts[-1] + len(line))
    front = _FRONT_MATTER.match(text)
    skipped = front.group().count("\n") if front else 0
    # only a heading's own words are looked into, so a megabyte of brackets costs nothing
    markdown = MarkdownIt("commonmark")
    blocks = MarkdownIt("commonmark").disable("inline").parse(text[line_starts[skipped] :])
    sections = []
    for opening, content in pairwise(blocks):
        if opening.type != "heading_open" or opening.map is None or not content.content.strip():
            continue
        inline = markdown.parseInline(content.content)[0].children or ()
        title = "".join(piece.content for piece in inline if piece.content).strip()
        start = line_starts[opening.map[0] + skipped]
        sections.append(Section(int(opening.tag[1:]), title or content.content, start))
    return tuple(sections)


def _chapters(text: str) -> tuple[Section, ...]:
    """Return `CHAPTER IV`, `Part 2` and the like; their levels follow their first appearance."""
    matches = list(_CHAPTER.finditer(text))
    if len(matches) < _LEAST_CHAPTERS:
        return ()
    kinds = list(dict.fromkeys(match["kind"].lower() for match in matches))
    return tuple(
        Section(kinds.index(m["kind"].lower()) + 1, m["title"], m.start("title")) for m in matches
    )


def _utf16_without_mark(head: bytes) -> str | None:
    """Name the UTF-16 whose high bytes are mostly zero here, as in any text with ASCII in it."""
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if max(even, odd) <= 0.3 * len(head) / 2 or min(even, odd) >= 0.05 * len(head) / 2:
        return None
    return "utf-16-le" if odd > even else "utf-16-be"


def _guessed(data: bytes) -> tuple[str, tuple[str, ...]]:
    for encoding in ("iso2022_jp", "cp932", "euc_jp"):
        text = _decoded_japanese(data, encoding)
        if text is not None:
            return _unix(text), (f"the encoding is not declared; read as {encoding}",)
    best = from_bytes(data).best()
    if best is None:
        warning = "the encoding is unknown: unreadable bytes are shown as �"
        return _unix(data.decode("utf-8", errors="replace")), (warning,)
    return _unix(str(best)), (f"the encoding is not declared; read as {best.encoding}",)


def _decoded_japanese(data: bytes, encoding: str) -> str | None:
    """Return the text if it reads as Japanese: full-width kana, hardly any of half width.

    The statistics of charset-normalizer mistake short Shift-JIS texts; no text of another language
    decodes to a fifth of kana.
    """
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        return None
    foreign = sum(not char.isascii() for char in text[:10_000])
    kana = len(_KANA.findall(text[:10_000]))
    half_width = len(_HALF_WIDTH_KANA.findall(text[:10_000]))
    return text if foreign and kana > 0.2 * foreign and half_width < 0.1 * foreign else None


def _unix(text: str) -> str:
    # splitlines() also breaks at form feeds and the like; CommonMark counts "\n" only
    return re.sub(r"\r\n?|[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]", "\n", text).replace("\x00", "�")
