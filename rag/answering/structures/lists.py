"""Lists, headings by level, turns of a conversation, e-mails, definitions, pages, paragraphs."""

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from rag.answering.structures.item import (
    GENERIC_NAMES,
    Structure,
    fill,
    line_item,
    names_from,
    singulars,
    with_ends,
    words_of,
)
from rag.answering.structures.labelled import numbering_words
from rag.turns import chat_turns
from rag.types import Page, Section

LEAST_ITEMS = 3
# A list whose numbers jump by more is another list.
MOST_MISSING = 5

_NUMBERED = re.compile(r"^(?P<indent>[ \t]*)(?P<number>\d{1,6})[.)][ \t]+(?=\S)", re.M)
_BULLET = re.compile(r"^(?P<indent>[ \t]*)[-*•‣◦–][ \t]+(?=\S)", re.M)
_NUMBERED_TITLE = re.compile(r"(?P<number>\d{1,3}(?:\.\d{1,3}){0,3}\.?)[ \t]+[^\W\d_]")
_MAIL = re.compile(
    r"^From:[ \t]*(?P<sender>[^\n]*)\n(?:[A-Z][\w-]{1,30}:[^\n]*\n|[ \t][^\n]*\n)*", re.M
)
_PYTHON = re.compile(r"(?:@[^\n]*\n[ \t]*|[ \t]*\n)*(?:async[ \t]+)?(?P<kind>def|class)\b")
_PARAGRAPH = re.compile(r"(?:[^\n]*\S[^\n]*(?:\n|\Z))+")


def lists(text: str, sections: Sequence[Section]) -> list[Structure]:
    """Return each list of numbered items and of bullets; items nested in an item do not count.

    The noun of the heading right above a list names its items (`## Requirements`).
    """
    return [
        replace(structure, names=structure.names | _names_above(text, structure, sections))
        for found in (_numbered_lists(text), _bulleted_lists(text))
        for structure in _named_if_alone(found, text)
    ]


def headings(text: str, sections: Sequence[Section]) -> list[Structure]:
    """Return the headings of the document: all of them, and those that have a name.

    Where the outermost are numbered (`1. Scope`), they are chapters, and `1.1` and `1.1.1` sections
    and subsections. Elsewhere levels have names only if there are no more than two.
    """
    if not sections:
        return []
    untils = _untils(sections, len(text))

    def structure(name: str, wanted: list[Section], words: str, left_out: int = 0) -> Structure:
        items = tuple(line_item(text, s.start, untils[s.start]) for s in wanted)
        notes = (f"{left_out} other headings were left out",) if left_out else ()
        return Structure(frozenset({name}), 1, words, items, notes)

    found = [structure("heading", list(sections), "headings of every level")]
    by_depth: dict[int, list[tuple[Section, int]]] = {}
    for section in sections:
        if match := _NUMBERED_TITLE.match(section.title):
            parts = match["number"].strip(".").split(".")
            by_depth.setdefault(len(parts), []).append((section, int(parts[0])))
    chapters = by_depth.get(1, [])
    numbers = [number for _, number in chapters]
    # a numbering that starts again numbers appendices, say, in the same form
    if len(chapters) >= LEAST_ITEMS and all(b == a + 1 for a, b in pairwise(numbers)):
        for name, depth in (("chapter", 1), ("section", 2), ("subsection", 3)):
            wanted = [section for section, _ in by_depth.get(depth, [])]
            words = f"headings numbered {'.'.join('nmk'[:depth])}"
            if depth == 1:
                words += f", {numbers[0]} to {numbers[-1]}"
            found.append(structure(name, wanted, words, len(sections) - len(wanted)))
        if len(by_depth) == 1:  # what people call sections, then
            found.append(replace(found[1], names=frozenset({"section"})))
    if sum(map(len, by_depth.values())) >= LEAST_ITEMS:
        return [one for one in found if one.items]
    levels = sorted({section.level for section in sections})
    at = {level: [s for s in sections if s.level == level] for level in levels}
    while len(levels) > 1 and len(at[levels[0]]) == 1:
        levels.pop(0)  # a single heading above all others is the title
    if len(levels) <= 2:
        for name, level in zip(("section", "subsection"), levels, strict=False):
            left_out = len(sections) - len(at[level])
            found.append(structure(name, at[level], f"headings of level {level}", left_out))
    return found


def turns(text: str) -> list[Structure]:
    """Return the turns of a chat log or a transcript, with their speakers."""
    said = chat_turns(text)
    items = with_ends(text, [(turn.start, None) for turn in said])
    items = [
        replace(item, fields={"speaker": turn.speaker})
        for item, turn in zip(items, said, strict=True)
    ]
    names = frozenset({"message", "turn", "post", "utterance", "comment", "reply"})
    return [Structure(names, 1, "turns of the conversation", tuple(items))] if items else []


def mails(text: str) -> list[Structure]:
    """Return the e-mails of a text: headers that begin with From: and hold a subject or a date."""
    found = [
        match for match in _MAIL.finditer(text) if re.search(r"^(?:Subject|Date):", match[0], re.M)
    ]
    items = [
        replace(item, fields={"speaker": match["sender"].strip()})
        for match, item in zip(
            found, with_ends(text, [(match.start(), None) for match in found]), strict=True
        )
    ]
    names = frozenset({"email", "e-mail", "mail", "message"})
    return [Structure(names, 1, "headers of e-mails", tuple(items))] if items else []


def definitions(text: str, media_type: str, sections: Sequence[Section]) -> list[Structure]:
    """Return Python's functions, classes and methods, as its own parser found them."""
    if media_type != "text/x-python":
        return []
    kinds: dict[str, list[int]] = {"function": [], "class": [], "method": []}
    for section in sections:
        match = _PYTHON.match(text, section.start)
        if match and match["kind"] == "class":
            kinds["class"].append(section.start)
        elif match:
            kinds["function" if section.level == 1 else "method"].append(section.start)
    found = []
    for kind, starts in kinds.items():
        if not starts:
            continue
        notes: tuple[str, ...] = ()
        if kind == "function" and kinds["method"]:
            notes = (f"{len(kinds['method'])} methods of classes were left out",)
        items = with_ends(text, [(start, None) for start in starts])
        found.append(
            Structure(frozenset({kind}), 1, f"definitions of a {kind}", tuple(items), notes)
        )
    return found


def pages_and_slides(text: str, media_type: str, pages: Sequence[Page]) -> list[Structure]:
    """Return the pages; those of a presentation are slides. One without text is an empty item."""
    items = tuple(line_item(text, page.start, page.end) for page in pages)
    name = "slide" if "presentation" in media_type else "page"
    silent = sum(item.start == item.end for item in items)
    notes = (f"without text among them: {silent}",) if silent else ()
    return [Structure(frozenset({name}), 1, f"{name}s", items, notes)] if items else []


def paragraphs(text: str, sections: Sequence[Section]) -> list[Structure]:
    """Return the blocks between blank lines that are no heading."""
    starts = {section.start for section in sections}
    items = [
        line_item(text, match.start(), match.end())
        for match in _PARAGRAPH.finditer(text)
        if match.start() not in starts and len(match.group().split()) > 3
    ]
    described = "blocks between blank lines, headings left out"
    return [Structure(frozenset({"paragraph"}), 1, described, tuple(items))] if items else []


def _numbered_lists(text: str) -> list[Structure]:
    runs: list[list[re.Match[str]]] = []
    for match in _NUMBERED.finditer(text):
        number = int(match["number"])
        last = int(runs[-1][-1]["number"]) if runs else -1
        if runs and _depth(match) > _depth(runs[-1][0]) + 1:
            continue  # nested in an item
        if last <= number <= last + MOST_MISSING:
            runs[-1].append(match) if runs else runs.append([match])
        elif number <= 1:
            runs.append([match])
        # anything else is a year or a day that begins a line
    runs = [run for run in runs if len(run) >= LEAST_ITEMS]
    ends = [run[0].start() for run in runs[1:]] + [len(text)]
    found = []
    for run, end in zip(runs, ends, strict=False):
        items = with_ends(text[:end], [(match.start(), int(match["number"])) for match in run])
        numbering = numbering_words([int(match["number"]) for match in run])
        names = frozenset({"list item", "numbered item", "point"})
        found.append(Structure(names, 1, f"numbered items, {numbering}", tuple(items)))
    return found


def _bulleted_lists(text: str) -> list[Structure]:
    runs: list[list[re.Match[str]]] = []
    for match in _BULLET.finditer(text):
        run = runs[-1] if runs else []
        if run and len(match["indent"]) > len(run[0]["indent"]) + 1:
            continue
        between = text[run[-1].end() : match.start()] if run else ""
        # a line that is neither a bullet nor indented ends a list
        if run and not re.search(r"\n(?![ \t]|[-*•‣◦–]|\n)(?=\S)", between):
            run.append(match)
        else:
            runs.append([match])
    return [
        Structure(
            frozenset({"list item", "bullet", "bullet point", "point"}),
            1,
            "bullets of a list",
            tuple(with_ends(text, [(match.start(), None) for match in run])),
        )
        for run in runs
        if len(run) >= LEAST_ITEMS
    ]


def _named_if_alone(found: list[Structure], text: str) -> list[Structure]:
    """Let the items of the only list be called `item`; of one that is the file, `record`, too.

    Such a list may also be named by the line above it: `The fees are:`.
    """
    if len(found) != 1:
        return found
    (only,) = found
    if not fill(only.items, text):
        return [replace(only, names=only.names | {"item"})]
    above = text[max(0, only.items[0].start - 200) : only.items[0].start].rstrip()
    line = above.rsplit("\n", 1)[-1]
    plurals = [word for word in words_of(line) if word.endswith("s") and len(word) > 3]
    called = frozenset().union(*map(singulars, plurals)) if line.endswith(":") else frozenset()
    return [replace(only, names=only.names | GENERIC_NAMES | called)]


def _names_above(text: str, structure: Structure, sections: Sequence[Section]) -> frozenset[str]:
    start = structure.items[0].start
    above = max((s for s in sections if s.start < start), key=lambda s: s.start, default=None)
    if above is None or text[above.start : start].strip().count("\n") > 1:
        return frozenset()
    return names_from(above.title)


def _untils(sections: Sequence[Section], end: int) -> dict[int, int]:
    """Return where each section ends: at the next heading of its level or above."""
    untils: dict[int, int] = {}
    open_sections: list[Section] = []
    for section in sections:
        while open_sections and open_sections[-1].level >= section.level:
            untils[open_sections.pop().start] = section.start
        open_sections.append(section)
    return {section.start: end for section in open_sections} | untils


def _depth(match: re.Match[str]) -> int:
    return len(match["indent"].expandtabs(4))
