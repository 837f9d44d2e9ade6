"""Items that the text numbers by name: `Record 17`, `ARTICLE IV.`, `### Step 3: ...`.

Only what opens a line in the form of a heading counts. A sentence that begins with "Record 5 was"
does not; nor does a table of contents that names them before, or a heading repeated on each page.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from rag.answering.structures.item import Structure, fill, with_ends
from rag.types import Section

LEAST_ITEMS = 3
_WORD_NUMBERS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    " sixteen seventeen eighteen nineteen twenty"
).split()
_ROMAN = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}

_NUMBER = (
    r"(?<![^\W_])(?P<number>\d{1,7}[A-Za-z]?(?![^\W_])|[IVXLCDM]{1,8}|[A-Z]|(?i:"
    + "|".join(_WORD_NUMBERS)
    + r"))"
)
_HEADING = re.compile(
    r"^[ \t]*(?P<mark>#{1,6}[ \t]+|[-*•][ \t]+)?(?:\*\*|__)?"
    r"(?P<label>[^\W\d_][^\W_]{0,30}(?:[ ][^\W\d_][^\W_]{0,30}){0,2})"
    r"[ \t]*(?:No\.?|Nr\.?|n°|№|#|[-–:])?[ \t]*" + _NUMBER + r"(?:\*\*|__)?(?P<after>[^\n]*)$",
    re.M,
)
# A title may follow, after a sign or with a capital; a sentence that goes on may not.
_TITLE_OR_END = re.compile(
    r"[ \t]*$|[ \t]*[:.)\]|–—-][ \t]*(?:$|[^\W\d_]|\S)|[ \t]+(?:[^\Wa-z_]|[\"'“(\[|])"
)
_GOES_ON = re.compile(
    r"[ \t]*,|[ \t]*[.:)]?[ \t]+(?:and|or|to|of|is|was|were|has|had|shall|which)\b"
)
_PAGE_NUMBER = re.compile(r"[ \t.…·]*[ \t]\d{1,4}[ \t]*$|[.…]{3,}.*$")
_PART_OF_NUMBER = re.compile(r"[.,/:-]?\d")
# What divides a whole text: a few of them in one corner are not what a question means.
DIVISIONS = frozenset(
    "chapter section article part book clause item record entry title division act".split()
)
# What may be lettered: elsewhere a capital is an initial, a word, or the Roman 1, 5 or 10.
_LETTERED = frozenset(
    "appendix annex exhibit schedule part section attachment title book act division".split()
)
# Labels of the calendar and of pages, which number something else.
_NO_LABEL = frozenset(
    "page january february march april may june july august september october november december"
    " no nr the a an in on at by of and or to from".split()
)
# Two passes over the same numbers are a table of contents and what it names if the one has this
# share of the other's headings, nearly all of them the same, and takes little of the text.
_LEAST_LISTED = 0.6
_SAME_SHARE = 0.8
_CONTENTS_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class _Heading:
    start: int
    end: int
    label: str
    number: int
    written: str
    title: str
    after_blank: bool
    interrupts: bool  # stands inside a paragraph

    @property
    def title_without_page(self) -> str:
        """The title as it is without the page number of a table of contents."""
        return _PAGE_NUMBER.sub("", self.title).strip(" \t:.)]–—-|*_")


def labelled_structures(text: str, sections: Sequence[Section] = ()) -> list[Structure]:
    """Return one structure for each word that numbers at least three headings.

    Where the document's own outline numbers them, the outline is believed.
    """
    by_label: dict[str, list[_Heading]] = defaultdict(list)
    for match in _HEADING.finditer(text):
        if heading := _heading(text, match):
            by_label[heading.label].append(heading)
    outlined = _outlined(sections)
    found = []
    for label in dict.fromkeys([*by_label, *outlined]):
        structure = _structure(text, label, by_label.get(label, []))
        if len(outlined.get(label, [])) >= LEAST_ITEMS:
            structure = _from_outline(text, label, outlined[label])
        if structure:
            found.append(structure)
    return found


def numbering_words(numbers: Sequence[int], written: Sequence[str] = ()) -> str:
    """Return how items are numbered, gaps and repeats included.

    Numbering that starts again, as the steps of each chapter do, is only said to do so. `written`
    tells `1` from `1a`; by default the numbers are all there is.
    """
    restarts = sum(b < a and b <= 1 for a, b in pairwise(numbers))
    if restarts:
        return f"whose numbering starts again {'once' if restarts == 1 else f'{restarts} times'}"
    low, high = min(numbers), max(numbers)
    if high - low > 10 * len(numbers) + 100:
        return f"numbered {low} to {high}, not in sequence"
    present = set(numbers)
    missing = [str(number) for number in range(low, high + 1) if number not in present]
    keys = written or list(map(str, numbers))
    twice = [key for key, times in Counter(keys).items() if times > 1]
    words = f"numbered {low} to {high}"
    if missing:
        words += f"; {_few(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    if twice:
        words += f"; {_few(twice)} {'stands' if len(twice) == 1 else 'stand'} more than once"
    return words


def number_value(written: str) -> int | None:
    """Return the value of `17`, `17a`, `XVII`, `Q` or `seventeen`."""
    if written[0].isdecimal():
        return int(re.sub(r"\D", "", written))
    if written.lower() in _WORD_NUMBERS:
        return _WORD_NUMBERS.index(written.lower()) + 1
    if written != written.upper():
        return None
    if set(written) <= _ROMAN.keys():
        values = [_ROMAN[sign] for sign in written]
        pairs = zip(values, [*values[1:], 0], strict=True)
        return sum(-value if value < following else value for value, following in pairs)
    return ord(written) - ord("A") + 1 if len(written) == 1 else None


def _heading(text: str, match: re.Match[str]) -> _Heading | None:
    after, label, written = match["after"], match["label"], match["number"]
    number = number_value(written)
    if number is None or set(label.lower().split()) & _NO_LABEL:
        return None
    if not _TITLE_OR_END.match(after) or _GOES_ON.match(after) or _PART_OF_NUMBER.match(after):
        return None  # `Section 2.1` is a part of Section 2
    above = text[max(0, match.start() - 200) : match.start()].rstrip(" \t")
    line_above = above[:-1].rsplit("\n", 1)[-1].strip() if above.endswith("\n") else ""
    if line_above and label[0].islower() and not match["mark"]:
        return None
    return _Heading(
        match.start(),
        match.end(),
        label.lower(),
        number,
        written.lower(),
        after.strip(" \t:.)]–—-|*_").lower(),
        after_blank=not line_above,
        interrupts=not match["mark"] and len(line_above) >= 40 and line_above[-1] not in '.:!?;"”|',
    )


def _structure(text: str, label: str, headings: list[_Heading]) -> Structure | None:
    headings, notes = _without_prose(_of_one_numbering(label, headings)), []
    headings, repeated = _without_running_heads(headings)
    if repeated:
        notes.append(f"{repeated} repeats of the same heading on later pages were left out")
    headings, listed = _without_contents(headings)
    if listed:
        notes.append(f"a table of contents that names {listed} of them was left out")
    items = with_ends(text, [(h.start, h.number) for h in headings])
    if len(items) < LEAST_ITEMS or not (_in_sequence(headings) or _are_records(headings)):
        return None
    needs_all = label.split()[-1] in DIVISIONS or not _in_sequence(headings)
    has_bodies = sum(item.until > item.end + 2 for item in items) > 0.5 * len(items)
    if not fill(items, text) and (needs_all or not has_bodies):
        return None
    shown = text[items[0].start : items[0].end][: len(label)]
    numbering = numbering_words([h.number for h in headings], [h.written for h in headings])
    return Structure(
        names=_label_names(label),
        rank=0,
        description=f"headings that begin with “{shown}” and a number, {numbering}",
        items=tuple(items),
        notes=tuple(notes),
    )


def _in_sequence(headings: Sequence[_Heading]) -> bool:
    """Say whether the numbers go up by one, or start again, as a numbering does."""
    steps = [b.number - a.number for a, b in pairwise(headings)]
    regular = sum(
        step in (0, 1) if after.number > 1 else step <= 1
        for step, after in zip(steps, headings[1:], strict=True)
    )
    distinct = len({heading.written for heading in headings})
    starts_over = sum(heading.number <= 1 for heading in headings)
    return (
        headings[0].number <= 1
        and regular >= 0.7 * len(steps)
        and (distinct >= 0.6 * len(headings) or starts_over > 1)
        and distinct >= LEAST_ITEMS
    )


def _are_records(headings: Sequence[_Heading]) -> bool:
    """Say whether headings with numbers of any kind all stand apart, as those of records do."""
    distinct = len({heading.written for heading in headings})
    apart = sum(heading.after_blank for heading in headings)
    return distinct >= 0.8 * len(headings) and apart >= 0.9 * len(headings)


def _of_one_numbering(label: str, headings: list[_Heading]) -> list[_Heading]:
    """Return the headings that are numbered in the form that most of them are: 1, I or A."""
    letters = [h for h in headings if len(h.written) == 1 and h.written.isalpha()]
    others = [h for h in headings if h not in letters]
    if label.split()[-1] in _LETTERED and len(letters) > len(others):
        return [replace(h, number=ord(h.written) - ord("a") + 1) for h in letters]
    romans = sum(not h.written[0].isdecimal() for h in others)
    if romans > 0.5 * len(others):
        return [h for h in headings if h not in letters or h.written in "ivxlcdm"]
    return others


def _outlined(sections: Sequence[Section]) -> dict[str, list[tuple[Section, int]]]:
    """Return the document's own headings that are numbered by name, by that name."""
    found: dict[str, list[tuple[Section, int]]] = defaultdict(list)
    for section in sections:
        match = _HEADING.match(section.title)
        number = number_value(match["number"]) if match else None
        if match is None or number is None or _PART_OF_NUMBER.match(match["after"]):
            continue
        if _TITLE_OR_END.match(match["after"]):
            found[match["label"].lower()].append((section, number))
    return found


def _from_outline(text: str, label: str, outlined: list[tuple[Section, int]]) -> Structure:
    items = with_ends(text, [(section.start, number) for section, number in outlined])
    numbering = numbering_words([number for _, number in outlined])
    shown = outlined[0][0].title[: len(label)]
    return Structure(
        names=_label_names(label),
        rank=0,
        description=f"headings of the outline that begin with “{shown}” and a number, {numbering}",
        items=tuple(items),
    )


def _label_names(label: str) -> frozenset[str]:
    return frozenset({label, label.split()[-1]})


def _without_prose(headings: list[_Heading]) -> list[_Heading]:
    """Leave out lines of a wrapped paragraph, where the others stand apart."""
    apart = sum(heading.after_blank for heading in headings)
    if apart < 0.5 * len(headings):
        return headings
    return [h for h in headings if h.after_blank or not h.interrupts]


def _without_running_heads(headings: list[_Heading]) -> tuple[list[_Heading], int]:
    """Keep the first of headings that repeat the one before, if that happens again and again.

    A single repeat is a number used twice, which is counted and said.
    """
    repeats = [
        after.number == before.number and after.title_without_page == before.title_without_page
        for before, after in pairwise(headings)
    ]
    if sum(repeats) <= 0.1 * len(headings):
        return headings, 0
    first = zip(headings, [False, *repeats], strict=True)
    return [heading for heading, is_repeat in first if not is_repeat], sum(repeats)


def _without_contents(headings: list[_Heading]) -> tuple[list[_Heading], int]:
    """Leave out a table of contents: the same numbers and titles in a small part of the text."""
    if not headings:
        return headings, 0
    for cut in range(LEAST_ITEMS, len(headings)):
        if headings[cut].number != headings[0].number:
            continue
        first, rest = headings[:cut], headings[cut:]
        if min(len(first), len(rest)) < _LEAST_LISTED * max(len(first), len(rest)):
            continue
        for contents, body in ((first, rest), (rest, first)):
            kept = {(h.number, h.title) for h in body}
            same = sum(
                bool({(h.number, h.title), (h.number, h.title_without_page)} & kept)
                for h in contents
            )
            spans = [part[-1].end - part[0].start for part in (contents, body)]
            if same >= _SAME_SHARE * len(contents) and spans[0] < _CONTENTS_SHARE * spans[1]:
                return body, len(contents)
    return headings, 0


def _few(numbers: Sequence[str]) -> str:
    shown = list(numbers[:5])
    if len(numbers) > 5:
        return f"{', '.join(shown)} and {len(numbers) - 5} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else shown[0]
