"""Tables in CSV, TSV, XLSX, JSON Lines and Parquet: the one place that reads and writes them.

What is read stays what it was: a CSV holds text alone, so `007` stays `007`; the others have types.
What is written is meant for people's spreadsheets too, so no cell that came from a document or a
question can become a formula there, and nothing is cut without a word.
"""

import csv
import io
import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from ingest.readers.text import decode
from rag.errors import TableError
from rag.types import storable

SUFFIXES = (".csv", ".tsv", ".xlsx", ".jsonl", ".parquet")

# What a spreadsheet has room for. Source: Microsoft, "Excel specifications and limits".
CELL_CHARS = 32_767
_SHEET_ROWS = 1_048_576
_SHEET_COLUMNS = 16_384
_SHEET_LINKS = 65_530
_LINK_CHARS = 2_000
_EXACT_INTEGERS = 2**53  # its numbers are doubles

# The largest table once unpacked: more than a full sheet of sentences, less than a zip bomb.
UNPACKED_BYTES = 2**30

# A cell that begins so may be taken for a formula. Source: OWASP, "CSV Injection".
_FORMULA_SIGNS = frozenset("=+-@\t\r\n＝＋－＠")
_NUMBER = re.compile(r"[+-]?(\d+([.,]\d*)?|[.,]\d+)([eE][+-]?\d+)?%?")
# What XML cannot hold, and so no XLSX.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
_DELIMITERS = ",;\t|"


@dataclass(frozen=True, slots=True)
class Table:
    """Named columns and rows of cells; a row may lack a column, which is then empty.

    A cell is text, a number, a truth value, a date or None; in JSON Lines and Parquet also a list
    or an object of these. A cell to be written may be a Link. `warnings` says what was guessed
    while it was read, `numbers` at which row or line of the file each row stands.
    """

    columns: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...]
    warnings: tuple[str, ...] = ()
    numbers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Link:
    """A cell that leads somewhere in a spreadsheet; in the other formats it is its value alone.

    `target` is a URL, or what `row_of` returns.
    """

    value: Any
    target: str


def row_of(sheet: str, index: int) -> str:
    """Return the target of a link to row `index`, from 0, of the table on a sheet of that name."""
    return f"#'{sheet}'!A{index + 2}"  # row 1 holds the columns' names


def holds_lists(path: Path) -> bool:
    """Return whether a cell of a table in this format may be a list or an object."""
    return path.suffix.lower() in (".jsonl", ".parquet")


# ---- reading ------------------------------------------------------------------------------------


def read_table(path: Path) -> Table:
    """Return the table in a file; rows that are empty throughout are left out.

    Of an XLSX the first sheet is read, formulas as the values they had when it was saved. A CSV may
    be separated by commas, semicolons, tabs or bars, in any encoding.

    Raises:
        TableError: if it is not there, damaged, or no table: two columns of one name, or a row
            with more cells than there are columns.
    """
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise _unknown_format(path)
    if not path.is_file():
        raise TableError(
            f"there is no file {path}", hint=f"give a file that ends in {_known_suffixes()}"
        )
    try:
        return read(path)
    except TableError:
        raise
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, csv.Error) as error:
        raise _damaged(path, str(error)) from error


def _read_csv(path: Path) -> Table:
    csv.field_size_limit(2**31 - 1)
    text, warnings = decode(path.read_bytes())
    delimiter = "\t" if path.suffix.lower() == ".tsv" else None
    if named := re.match(r"sep=(.)\n", text):  # a line that spreadsheets write for each other
        delimiter, text = named[1], text[named.end() :]
    head = text.split("\n", 1)[0]
    if delimiter is None:
        delimiter = max(_DELIMITERS, key=lambda sign: len(next(csv.reader([head], delimiter=sign))))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)

    def lines() -> Iterator[tuple[int, list[str]]]:
        try:
            for cells in reader:
                yield reader.line_num, cells
        except csv.Error as error:
            raise _damaged(path, f"line {reader.line_num}: {error}") from error

    return replace(_table(path, lines()), warnings=warnings)


def _read_xlsx(path: Path) -> Table:
    from openpyxl import load_workbook

    with zipfile.ZipFile(path) as archive:
        _check_unpacked(path, sum(member.file_size for member in archive.infolist()))
    book = load_workbook(path, read_only=True, data_only=True)
    try:
        sheet = book.worksheets[0]
        sheet.reset_dimensions()  # some programs write a wrong one
        numbered = enumerate(sheet.iter_rows(values_only=True), start=1)
        return _table(path, ((number, list(cells)) for number, cells in numbered))
    except IndexError as error:
        raise _damaged(path, "it has no sheet of cells") from error
    finally:
        book.close()


def _check_unpacked(path: Path, num_bytes: int) -> None:
    if num_bytes > UNPACKED_BYTES:
        raise TableError(
            f"{path.name} would unpack to {num_bytes / 2**20:,.0f} MiB; expected at most"
            f" {UNPACKED_BYTES / 2**20:,.0f}",
            hint="save it as CSV, or split it",
        )


def _read_jsonl(path: Path) -> Table:
    text, warnings = decode(path.read_bytes())
    columns: dict[str, None] = {}
    rows, numbers = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _damaged(path, f"line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise _damaged(path, f"line {number} is not an object")
        columns.update(dict.fromkeys(row))
        rows.append(row)
        numbers.append(number)
    return Table(tuple(columns), tuple(rows), warnings, tuple(numbers))


def _read_parquet(path: Path) -> Table:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
        groups = range(file.metadata.num_row_groups)
        _check_unpacked(path, sum(file.metadata.row_group(n).total_byte_size for n in groups))
        found = file.read()
    except ArrowException as error:
        raise _damaged(path, str(error)) from error
    rows = zip(*(column.to_pylist() for column in found.columns), strict=True)
    head = list(found.column_names)
    return _table(path, enumerate([head, *map(list, rows)]))


_READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".xlsx": _read_xlsx,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _table(path: Path, lines: Iterable[tuple[int, list[Any]]]) -> Table:
    """Return the table of numbered lines of cells; the first names the columns."""
    filled = ((number, cells) for number, cells in lines if any(not _is_blank(c) for c in cells))
    _, names = next(filled, (0, []))
    columns = ["" if _is_blank(name) else str(name).strip() for name in names]
    while columns and not columns[-1]:
        columns.pop()
    columns = [name or f"column {number}" for number, name in enumerate(columns, start=1)]
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise TableError(
            f"{path.name} has two columns {twice[0]!r}; expected each name once",
            hint="rename one of them",
        )
    rows, numbers = [], []
    for number, cells in filled:
        if any(not _is_blank(cell) for cell in cells[len(columns) :]):
            raise _damaged(path, f"row {number} has {len(cells)} cells for {len(columns)} columns")
        rows.append(dict(zip(columns, cells, strict=False)))
        numbers.append(number)
    return Table(tuple(columns), tuple(rows), numbers=tuple(numbers))


def _is_blank(cell: Any) -> bool:  # noqa: ANN401
    return cell is None or (isinstance(cell, str) and not cell.strip())


# ---- writing ------------------------------------------------------------------------------------


def check_writable(path: Path) -> None:
    """Prove that a table can be written here, so that nobody waits for one that cannot.

    Raises:
        TableError: if its format is unknown, its folder is not there or closed, or something lies
            there that is not a file.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise _unknown_format(path)
    if path.exists() and not path.is_file():
        raise TableError(f"{path} is not a file", hint="give the name of a file to write")
    try:
        with NamedTemporaryFile(dir=path.resolve().parent):
            pass
    except OSError as error:
        raise TableError(
            f"nothing can be written in {path.resolve().parent}: {error.strerror}",
            hint="make the folder, or give another place",
        ) from error


def write_table(
    path: Path, table: Table, *, sheet: str = "table", further: Mapping[str, Table] | None = None
) -> None:
    """Write a table; a file that is there already is replaced in one step, or stays as it was.

    Args:
        path: its suffix names the format, see SUFFIXES.
        table: its rows may lack columns; a column that is not named is not written.
        sheet: the name of its sheet in an XLSX.
        further: more sheets of an XLSX by name; the other formats have no room for them.

    Raises:
        TableError: if it does not fit the format; then nothing is written.
    """
    write = _WRITERS.get(path.suffix.lower())
    if write is None:
        raise _unknown_format(path)
    check_writable(path)
    target = path.resolve()  # through a link, which stays
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        write(temporary, {sheet: table, **(further or {})})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        raise TableError(
            f"{path.name} could not be written: {error.strerror or error}",
            hint="make room, or give another place",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _write_csv(path: Path, sheets: Mapping[str, Table], *, delimiter: str = ",") -> None:
    table = next(iter(sheets.values()))
    with path.open("w", encoding="utf-8-sig", newline="") as file:  # the mark is for Excel
        writer = csv.writer(file, delimiter=delimiter, lineterminator="\r\n")
        writer.writerow(map(_no_formula, table.columns))
        for row in _cells(table):
            writer.writerow([_no_formula(_as_text(cell)) for cell in row])


def _write_tsv(path: Path, sheets: Mapping[str, Table]) -> None:
    _write_csv(path, sheets, delimiter="\t")


def _write_jsonl(path: Path, sheets: Mapping[str, Table]) -> None:
    table = next(iter(sheets.values()))
    with path.open("w", encoding="utf-8") as file:
        for row in _cells(table):
            object_ = {n: as_json(c) for n, c in zip(table.columns, row, strict=True)}
            file.write(storable(json.dumps(object_, ensure_ascii=False)) + "\n")


def _write_parquet(path: Path, sheets: Mapping[str, Table]) -> None:
    from pyarrow import Table as ArrowTable
    from pyarrow.parquet import write_table as write_parquet

    table = next(iter(sheets.values()))
    rows = list(_cells(table))
    columns = {
        name: _arrow_array([row[number] for row in rows])
        for number, name in enumerate(table.columns)
    }
    write_parquet(ArrowTable.from_pydict(columns), path)


def _arrow_array(cells: Sequence[Any]) -> Any:  # noqa: ANN401 - of pyarrow, which has no types
    """Return a column of one type; cells that have none in common become text."""
    import pyarrow

    if any(cell is not None for cell in cells):
        try:
            return pyarrow.array(cells)
        except (pyarrow.ArrowException, OverflowError, UnicodeError):
            pass
    texts = [None if cell is None else _as_text(cell) for cell in cells]
    return pyarrow.array(texts, pyarrow.string())


def _write_xlsx(path: Path, sheets: Mapping[str, Table]) -> None:
    from openpyxl import Workbook

    for name, table in sheets.items():
        if len(table.rows) >= _SHEET_ROWS or len(table.columns) > _SHEET_COLUMNS:
            raise TableError(
                f"the sheet {name} would have {len(table.rows):,} rows and"
                f" {len(table.columns):,} columns; an XLSX holds {_SHEET_ROWS - 1:,} and"
                f" {_SHEET_COLUMNS:,}",
                hint="write it as .csv, .jsonl or .parquet",
            )
    book = Workbook()
    book.remove(book.active)
    for name, table in sheets.items():
        _fill(book.create_sheet(name), table)
    with path.open("wb") as file:
        book.save(file)


def _fill(sheet: Any, table: Table) -> None:  # noqa: ANN401 - a sheet of openpyxl
    """Write a table into an empty sheet: names on top in bold, links as far as a sheet takes."""
    from openpyxl.styles import Alignment, Font
    from openpyxl.utils import get_column_letter
    from openpyxl.worksheet.hyperlink import Hyperlink

    widths = [len(name) for name in table.columns]
    for number, name in enumerate(table.columns, start=1):
        _set(sheet.cell(1, number), name)
        sheet.cell(1, number).font = Font(bold=True)
    num_links = 0
    for row_number, row in enumerate(table.rows, start=2):
        for number, name in enumerate(table.columns, start=1):
            given = row.get(name)
            shown = given.value if isinstance(given, Link) else given
            if shown is None:
                continue
            cell = sheet.cell(row_number, number)
            _set(cell, shown)
            cell.alignment = Alignment(wrap_text=True, vertical="top")
            widths[number - 1] = max(widths[number - 1], min(60, len(str(shown))))
            if not isinstance(given, Link) or len(given.target) > _LINK_CHARS:
                continue
            if num_links < _SHEET_LINKS:
                num_links += 1
                inside, url = given.target.startswith("#"), given.target
                cell.hyperlink = (
                    Hyperlink(ref=cell.coordinate, location=url[1:])
                    if inside
                    else Hyperlink(ref=cell.coordinate, target=url)
                )
                cell.font = Font(color="0563C1", underline="single")
    for number, width in enumerate(widths, start=1):
        sheet.column_dimensions[get_column_letter(number)].width = width + 2
    sheet.freeze_panes = "A2"
    sheet.auto_filter.ref = sheet.dimensions


def _set(cell: Any, value: Any) -> None:  # noqa: ANN401 - a cell of openpyxl
    """Give a spreadsheet's cell a value, as text where that may be read as something else."""
    if isinstance(value, bool | date | time | timedelta) and not _is_odd_date(value):
        cell.value = value
        return
    if isinstance(value, int | float | Decimal) and _is_exact(value):
        cell.value = value
        return
    text = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", _as_text(value))
    if len(text) > CELL_CHARS:
        words = f" [cut: of {len(text):,} characters a cell holds {CELL_CHARS:,}]"
        text = text[: CELL_CHARS - len(words)] + words
    cell.value = text
    cell.data_type = "s"  # or "=1" would be a formula and "#N/A" an error
    cell.quotePrefix = text[:1] in _FORMULA_SIGNS  # and stays text when the cell is edited


def _is_odd_date(value: Any) -> bool:  # noqa: ANN401
    """Return whether a spreadsheet cannot hold this date: it has a time zone, or is too old."""
    if isinstance(value, datetime | time) and value.tzinfo is not None:
        return True
    return isinstance(value, date) and value.year < 1900


def _is_exact(value: int | float | Decimal) -> bool:
    if isinstance(value, int):
        return abs(value) <= _EXACT_INTEGERS
    return math.isfinite(value)


_WRITERS: dict[str, Callable[[Path, Mapping[str, Table]], None]] = {
    ".csv": _write_csv,
    ".tsv": _write_tsv,
    ".xlsx": _write_xlsx,
    ".jsonl": _write_jsonl,
    ".parquet": _write_parquet,
}


def _cells(table: Table) -> Iterator[list[Any]]:
    """Yield the cells of each row in the columns' order, links as their values."""
    for row in table.rows:
        cells = (row.get(name) for name in table.columns)
        yield [cell.value if isinstance(cell, Link) else cell for cell in cells]


def _as_text(cell: Any) -> str:  # noqa: ANN401
    """Return a cell in words, for formats that have no types."""
    if cell is None:
        return ""
    if isinstance(cell, bool | list | dict):
        return json.dumps(as_json(cell), ensure_ascii=False)
    if isinstance(cell, date | time):
        return cell.isoformat()
    if isinstance(cell, bytes):
        cell = cell.decode("utf-8", errors="replace")
    return storable(str(cell))


def as_json(cell: Any) -> Any:  # noqa: ANN401
    """Return a cell as JSON has it: what it has no type for as text, not a number as null."""
    if isinstance(cell, Link):
        cell = cell.value
    if isinstance(cell, list):
        return [as_json(item) for item in cell]
    if isinstance(cell, dict):
        return {str(name): as_json(item) for name, item in cell.items()}
    if isinstance(cell, float) and not math.isfinite(cell):
        return None
    if cell is None or isinstance(cell, bool | int | float | str):
        return cell
    return _as_text(cell)


def _no_formula(text: str) -> str:
    """Return a CSV's cell, with an apostrophe where a spreadsheet might run it; a number stays."""
    if text[:1] in _FORMULA_SIGNS and not _NUMBER.fullmatch(text):
        return f"'{text}"
    return text


# ---- errors -------------------------------------------------------------------------------------


def _known_suffixes() -> str:
    return f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"


def _unknown_format(path: Path) -> TableError:
    return TableError(
        f"{path.name} is no table that can be read or written here",
        hint=f"give a file that ends in {_known_suffixes()}",
    )


def _damaged(path: Path, fault: str) -> TableError:
    return TableError(
        f"{path.name} cannot be read as a table: {fault}",
        hint="open and save it again with the program that made it, or export it as CSV in UTF-8",
    )
