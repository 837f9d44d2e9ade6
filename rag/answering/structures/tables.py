"""Rows of a table, objects of JSON, and blocks of `Field: value` lines."""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from rag.answering.structures.item import (
    GENERIC_NAMES,
    RECORDS_SHARE,
    Item,
    Structure,
    fill,
    line_item,
    names_from,
    words_of,
)
from rag.types import Section

LEAST_BLOCKS = 3
ROW_NAMES = GENERIC_NAMES | {"row", "line"}
_JSON_NAMES = GENERIC_NAMES | {"object", "element"}
_SPACE = re.compile(r"[ \t\r\n]*")
_FIELD = re.compile(
    r"^[ \t]*(?P<key>[^\W\d_][\w /()-]{0,30}?)[ \t]*[:=][ \t]*(?P<value>\S[^\n]*)$", re.M
)
_BLOCK = re.compile(r"(?:[^\n]*\S[^\n]*(?:\n|$))+")
_RULE = re.compile(r"[ \t]*(?:[-=*_#~]{3,}|\|?[ :|-]*-[ :|-]*)[ \t]*")
# Words of a field's name that do not say what its record is.
_FIELD_WORDS = frozenset("name id number no nr title date key type status".split())


def delimited_rows(text: str, media_type: str, title: str) -> list[Structure]:
    """Return the rows of a CSV or TSV text; a row's quoted cell may hold line breaks."""
    delimiter = "\t" if media_type == "text/tab-separated-values" else _delimiter(text)
    rows = list(_delimited(text, delimiter))
    if len(rows) < 2 or max(len(cells) for _, _, cells in rows[:50]) < 2:
        rows = [row for row in rows if any(row[2])]
        if not rows:
            return []
    header, body = _header([cells for _, _, cells in rows])
    if header:
        rows = rows[1:]
    items = [
        replace(line_item(text, start, end), fields=_fields(header, cells))
        for start, end, cells in rows
    ]
    rows_found = _rows(items, header, body)
    named = replace(rows_found, names=rows_found.names | _names_of_file(title))
    return [named] if items else []


def json_items(text: str, media_type: str, title: str) -> list[Structure]:
    """Return the lines of JSON lines, or the elements of each array of a JSON text.

    Arrays are looked for at the top and one level below; text that is no JSON has none.
    """
    if media_type == "application/jsonl":
        items = []
        for match in re.finditer(r"[^\n]*\S[^\n]*", text):
            try:
                value = json.loads(match.group())
            except ValueError:
                return []
            item = line_item(text, match.start(), match.end())
            items.append(replace(item, fields=_json_fields(value)))
        names = _JSON_NAMES | ROW_NAMES | _names_of_file(title)
        described = "lines that are one JSON value each"
        return [Structure(names, 1, described, tuple(items))] if items else []
    try:
        arrays = list(_json_arrays(text))
    except (ValueError, IndexError, RecursionError):
        return []
    found = []
    for key, items in arrays:
        names = names_from(key) if key else _names_of_file(title)
        if len(arrays) == 1:
            names |= _JSON_NAMES
        place = f"of “{key}”" if key else "of the outermost array"
        found.append(Structure(names, 0 if key else 1, f"elements {place}", tuple(items)))
    return [structure for structure in found if structure.items]


def piped_tables(text: str, sections: Sequence[Section], title: str) -> list[Structure]:
    """Return the rows of each table whose cells stand between ` | `, as the readers write them."""
    found: list[Structure] = []
    tables: list[Item] = []
    for block in _BLOCK.finditer(text):
        lines = [
            (block.start() + m.start(), block.start() + m.end(), m.group())
            for m in re.finditer(r"[^\n]+", block.group())
            if not _RULE.fullmatch(m.group())
        ]
        if len(lines) < 2 or sum(" | " in line for _, _, line in lines) < 0.8 * len(lines):
            continue
        cells = [_piped_cells(line) for _, _, line in lines]
        header, body = _header(cells)
        skipped = 1 if header else 0
        items = [
            replace(line_item(text, start, end), fields=_fields(header, row))
            for (start, end, _), row in list(zip(lines, cells, strict=True))[skipped:]
        ]
        above = max((s for s in sections if s.start <= block.start()), key=_start, default=None)
        structure = _rows(items, header, body)
        if not fill(items, text):
            structure = replace(structure, names=frozenset({"row"}))
        if above and not text[above.start : block.start()].strip().count("\n"):
            structure = replace(structure, names=structure.names | names_from(above.title))
        found.append(structure)
        tables.append(line_item(text, block.start(), block.end()))
    if len(found) == 1 and fill(found[0].items, text):
        found = [replace(found[0], names=found[0].names | _names_of_file(title))]
    if tables:
        words = "blocks of rows with cells"
        found.append(Structure(frozenset({"table"}), 1, words, tuple(tables)))
    return found


def field_blocks(text: str, title: str) -> list[Structure]:
    """Return the blocks between blank lines that all begin with the same field: `Name: ...`."""
    blocks = []
    for match in _BLOCK.finditer(text):
        fields = list(_FIELD.finditer(text, match.start(), match.end()))
        # a block of one line is as likely a speaker's turn
        if len(fields) >= 2:
            blocks.append((match.start(), match.end(), fields))
    if len(blocks) < LEAST_BLOCKS:
        return []
    openers = Counter(fields[0]["key"].lower() for _, _, fields in blocks)
    opener, times = openers.most_common(1)[0]
    if times < max(LEAST_BLOCKS, 0.5 * len(blocks)):
        return []
    opening = [block for block in blocks if block[2][0]["key"].lower() == opener]
    # the field opens every block that has it, else it is no sign of a new one
    if sum(f["key"].lower() == opener for _, _, fields in blocks for f in fields) != len(opening):
        return []
    if sum(end - start for start, end, _ in opening) < RECORDS_SHARE * len(text.strip()):
        return []  # examples in a text about something else
    untils = [start for start, _, _ in opening[1:]] + [len(text)]
    items = [
        line_item(text, start, until) for (start, _, _), until in zip(opening, untils, strict=True)
    ]
    items = [replace(item, fields=fields_within(text, item)) for item in items]
    called = frozenset(word for word in words_of(opener) if word not in _FIELD_WORDS)
    names = GENERIC_NAMES | {"block"} | called | _names_of_file(title)
    shown = opening[0][2][0]["key"]
    return [Structure(names, 1, f"blocks that begin with “{shown}:”", tuple(items))]


def fields_within(text: str, item: Item) -> dict[str, str]:
    """Return the `Field: value` lines of an item, by the field in lower case."""
    return {
        m["key"].lower(): m["value"].strip() for m in _FIELD.finditer(text, item.start, item.until)
    }


def _rows(items: list[Item], header: list[str], said: str) -> Structure:
    """Return rows, also called by the first column if that has a short name: `customer_id`."""
    first = words_of(header[0].replace("_", " ")) if header else []
    called = frozenset(word for word in first if word not in _FIELD_WORDS and len(first) <= 2)
    return Structure(ROW_NAMES | called, 1, f"rows of a table, {said}", tuple(items))


def _names_of_file(title: str) -> frozenset[str]:
    return names_from(title.rsplit(".", 1)[0])


def _delimiter(text: str) -> str:
    """Return the sign that parts the most lines of the head into the same number of cells."""
    head = [line for line in text[:20_000].split("\n")[:50] if line.strip()]

    def agreement(sign: str) -> tuple[float, int]:
        counts = Counter(line.count(sign) for line in head)
        times, lines = counts.most_common(1)[0] if counts else (0, 0)
        return (lines / len(head), times) if times else (0.0, 0)

    return max(",;\t|", key=agreement)


def _delimited(text: str, delimiter: str) -> Iterator[tuple[int, int, list[str]]]:
    """Yield `[start, end)` and cells of each row that is not empty."""
    start = 0
    quoted = False
    for match in re.finditer(r'"|\n|\Z', text):
        if match.group() == '"':
            quoted = not quoted
            continue
        if quoted and match.group() == "\n":
            continue
        row = text[start : match.start()]
        if row.strip():
            cells = next(csv.reader([row.replace("\n", " ")], delimiter=delimiter), [])
            yield start, match.start(), [cell.strip() for cell in cells]
        start = match.end()


def _header(rows: list[list[str]]) -> tuple[list[str], str]:
    """Return the cells of the header, and in words what was counted.

    The first row is one if its cells are distinct words, and numbers stand below some of them or
    they themselves stand nowhere below.
    """
    first, rest = rows[0], rows[1:101]
    if not rest:
        return [], "the only one"
    cells = [cell.lower() for cell in first if cell]
    wordy = bool(cells) and len(set(cells)) == len(cells) and not any(map(_is_value, cells))
    below = {cell.lower() for row in rest for cell in row}
    columns = [[row[n] for row in rest if n < len(row) and row[n]] for n in range(len(first))]
    has_values = any(column and all(map(_is_value, column)) for column in columns)
    if not wordy or (set(cells) & below and not has_values):
        return [], "none of them a header"
    shown = " | ".join(cell for cell in first if cell)
    return first, f"below the header “{shown if len(shown) <= 80 else shown[:77] + '...'}”"


def _is_value(cell: str) -> bool:
    """Say whether a cell can only be data: a number, an amount or a date."""
    return bool(re.fullmatch(r"[\W\d_]*\d[\W\d_]*(?:%|[a-z]{1,3})?", cell))


def _fields(header: list[str], cells: list[str]) -> Mapping[str, str]:
    return {name.lower(): cell for name, cell in zip(header, cells, strict=False) if name and cell}


def _piped_cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _json_arrays(text: str) -> Iterator[tuple[str, list[Item]]]:
    """Yield the key and the elements of each array, at the top or inside the outermost object."""
    at = _after_space(text, 0)
    if text[at] == "[":
        yield "", list(_elements(text, at))
        json.loads(text)
        return
    if text[at] != "{":
        return
    json.loads(text)
    decoder = json.JSONDecoder()
    at = _after_space(text, at + 1)
    while text[at] != "}":
        key, at = decoder.raw_decode(text, at)
        at = _after_space(text, _after_space(text, at) + 1)  # the colon
        if text[at] == "[":
            yield key, list(_elements(text, at))
        _, at = decoder.raw_decode(text, at)
        at = _after_space(text, at)
        if text[at] == ",":
            at = _after_space(text, at + 1)


def _elements(text: str, at: int) -> Iterator[Item]:
    decoder = json.JSONDecoder()
    at = _after_space(text, at + 1)
    while text[at] != "]":
        value, end = decoder.raw_decode(text, at)
        first_lines = min(end, at + 300)
        yield Item(at, first_lines, end, None, _json_fields(value))
        at = _after_space(text, end)
        if text[at] == ",":
            at = _after_space(text, at + 1)


def _json_fields(value: object) -> Mapping[str, str]:
    if not isinstance(value, dict):
        return {}
    plain = (str, int, float, bool)
    return {key.lower(): str(cell) for key, cell in value.items() if isinstance(cell, plain)}


def _after_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _start(section: Section) -> int:
    return section.start
