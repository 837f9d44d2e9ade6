"""A structure that repeats in a text, its items, and the nouns that people call them by."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

MAX_QUOTE_CHARS = 600
# What any item of a file of records may be called.
GENERIC_NAMES = frozenset({"record", "entry", "item"})

# The share of the text that items must fill for the file to be one of such items.
RECORDS_SHARE = 0.5

_WORD = re.compile(r"[^\W\d_][\w'’-]*")


@dataclass(frozen=True, slots=True)
class Item:
    """One item: `[start, end)` is what is quoted, `[start, until)` all that belongs to it.

    `number` is what the text itself numbers it, None where it does not. `fields` are what a filter
    may ask about: columns of a row, the speaker of a turn.
    """

    start: int
    end: int
    until: int
    number: int | None = None
    fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Structure:
    """Items of one kind in the order of the text.

    `names` are singular nouns in lower case. Where the names of several structures fit a question,
    the lowest `rank` is meant: 0 where the text itself calls its items so, 1 where the form does,
    2 where any item of a file may be called so. `description` says what was counted, in words, and
    `notes` what was not.
    """

    names: frozenset[str]
    rank: int
    description: str
    items: tuple[Item, ...]
    notes: tuple[str, ...] = ()


def singulars(noun: str) -> frozenset[str]:
    """Return what the singular of an English noun may be, the noun itself among them.

    Spelling alone cannot tell `clauses` from `addresses`; a guess that is no word harms nothing,
    because it must be the name of a structure to count.
    """
    noun = noun.lower()
    found = {noun}
    if noun.endswith("ies"):
        found.add(noun[:-3] + "y")
    if noun.endswith("ices"):
        found |= {noun[:-4] + "ix", noun[:-4] + "ex"}
    if noun.endswith("es"):
        found.add(noun[:-2])
    if noun.endswith("s") and not noun.endswith("ss"):
        found.add(noun[:-1])
    return frozenset(found - {""})


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without numbers."""
    return [word.lower() for word in _WORD.findall(text)]


def names_from(text: str) -> frozenset[str]:
    """Return the singulars of the last word of a heading, file name or the like."""
    words = words_of(text.replace("_", " "))
    return singulars(words[-1]) if words else frozenset()


def fill(items: Sequence[Item], text: str) -> bool:
    """Say whether the stretch from the first item to the last is most of the text."""
    return bool(items) and items[-1].end - items[0].start >= RECORDS_SHARE * len(text.strip())


def line_item(
    text: str, start: int, until: int, *, number: int | None = None, **fields: str
) -> Item:
    """Return an item that is quoted by its first line with words on it."""
    start += len(text[start:until]) - len(text[start:until].lstrip())
    line_end = text.find("\n", start, until)
    end = until if line_end < 0 else line_end
    end = min(start + len(text[start:end].rstrip()), start + MAX_QUOTE_CHARS)
    return Item(start, end, until, number, fields)


def with_ends(text: str, starts: Iterable[tuple[int, int | None]]) -> list[Item]:
    """Return the items that begin at these offsets (and numbers), each up to the next."""
    found = list(starts)
    untils = [*(start for start, _ in found[1:]), len(text)]
    return [  # no item, no end
        line_item(text, start, until, number=number)
        for (start, number), until in zip(found, untils, strict=False)
    ]
