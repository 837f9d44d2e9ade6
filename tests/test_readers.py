"""Every format to canonical text: nothing lost, headings and pages where they stand."""

import email.message
import email.policy
import json
import re
from pathlib import Path

import numpy as np
import pytest

from conftest import INGEST_DOCS
from documents import (
    HEADINGS,
    SENTENCES,
    docx_parts,
    pdf_line,
    write_docx,
    write_epub,
    write_odf,
    write_ods,
    write_odt,
    write_pdf,
    write_pptx,
    write_rtf,
    write_xlsx,
    write_zip,
)
from ingest.readers.chat import chat_sections
from ingest.readers.guard import read_guarded
from ingest.readers.source import read_source
from ingest.readers.text import decode, markdown_headings, underlined_titles
from ingest.readers.web import html_text
from rag.errors import (
    EmptyDocumentError,
    EncryptedDocumentError,
    ReaderFailedError,
    ReadError,
    UnsupportedFormatError,
)
from rag.settings import Settings
from rag.types import CanonicalText, Page, Section

needs_documents = pytest.mark.skipif(
    not INGEST_DOCS.is_dir(), reason="../shared/data/ingest_docs is not here"
)


def _read(path: Path, name: str | None = None) -> CanonicalText:
    return read_guarded(path, name=name or path.name, settings=Settings())


def _written(path: Path, data: str | bytes) -> CanonicalText:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return _read(path)


def _titles(content: CanonicalText) -> list[tuple[int, str]]:
    for section in content.sections:
        assert " ".join(content.text[section.start :].split()).startswith(section.title)
    return [(section.level, section.title) for section in content.sections]


# ---- office and e-book formats ----------------------------------------------------------------

HANDBOOK_TEXT = f"{HEADINGS[0]}\n\n{SENTENCES[0]}\n\n{HEADINGS[1]}\n\n{SENTENCES[1]}"
TABLE_TEXT = "Ship | Length\nAurora | 42 m\nZephyr | 17 m"


@pytest.mark.parametrize("suffix", ["", ".bin"])
def test_docx_keeps_headings_tables_and_ampersands(tmp_path: Path, suffix: str) -> None:
    path = write_docx(tmp_path / "a.docx")
    content = _read(path, f"a.docx{suffix}")  # with an unknown suffix the content tells
    assert content.text == f"{HANDBOOK_TEXT}\n\n{TABLE_TEXT}"
    assert _titles(content) == [(1, HEADINGS[0]), (2, HEADINGS[1])]


def test_docx_leaves_out_deletions_and_tells_hidden_text(tmp_path: Path) -> None:
    run = "<w:r><w:t>{}</w:t></w:r>"
    body = (
        f"<w:p>{run.format('R&amp;D &lt;b&gt; ')}"
        "<w:del><w:r><w:delText>gone</w:delText></w:r></w:del>"
        f"<w:ins>{run.format('new')}</w:ins><w:r><w:noBreakHyphen/><w:br/><w:tab/></w:r>"
        "<w:r><w:rPr><w:vanish/></w:rPr><w:t>unseen</w:t></w:r></w:p>"
        f"<w:sdt><w:sdtContent><w:p>{run.format('control')}</w:p></w:sdtContent></w:sdt>"
        f"<w:p><w:r><w:txbxContent><w:p>{run.format('box')}</w:p></w:txbxContent></w:r></w:p>"
    )
    content = _read(write_zip(tmp_path / "a.docx", docx_parts(body)))
    assert content.text == "R&D <b> new-\n\tunseen\n\ncontrol\n\nbox"
    assert content.warnings == ("hidden text in 1 places is read with the rest",)


def test_pptx_slides_are_pages_and_sections(tmp_path: Path) -> None:
    content = _read(write_pptx(tmp_path / "a.pptx"))
    assert content.text == HANDBOOK_TEXT
    second = content.text.index(HEADINGS[1])
    assert content.pages == (
        Page(1, "1", 0, second - 2),
        Page(2, "2", second, len(content.text)),
    )
    assert _titles(content) == [(1, HEADINGS[0]), (1, HEADINGS[1])]


def test_sheets_are_sections_and_rows_lines(tmp_path: Path) -> None:
    content = _read(write_xlsx(tmp_path / "a.xlsx"))
    assert content.text == f"Ships\n\n{TABLE_TEXT}\n\nFees\n\nharbour fee | 35 crowns"
    assert [title for _, title in _titles(content)] == ["Ships", "Fees"]
    assert _read(write_ods(tmp_path / "a.ods")).text == f"Ships\n\n{TABLE_TEXT}"


def test_odt_rtf_and_epub_are_read_whole(tmp_path: Path) -> None:
    odt = _read(write_odt(tmp_path / "a.odt"))
    epub = _read(write_epub(tmp_path / "a.epub"), "unknown")
    assert odt.text == f"{HANDBOOK_TEXT}\n\n{TABLE_TEXT}"
    assert epub.text == HANDBOOK_TEXT
    assert _titles(odt) == _titles(epub) == [(1, HEADINGS[0]), (2, HEADINGS[1])]
    assert _read(write_rtf(tmp_path / "a.rtf")).text == "\n\n".join([*SENTENCES, "Gebühr"])


def test_odt_keeps_notes_breaks_and_lists_in_cells(tmp_path: Path) -> None:
    body = (
        "<text:p>a<text:line-break/>b<text:tab/>c<text:s/>d<text:note><text:note-citation>1"
        "</text:note-citation><text:note-body><text:p>note</text:p></text:note-body></text:note> e"
        "</text:p><text:tracked-changes><text:p>gone</text:p></text:tracked-changes>"
        "<text:list><text:list-item><text:p>one</text:p><text:list><text:list-item>"
        "<text:p>nested</text:p></text:list-item></text:list></text:list-item></text:list>"
        "<table:table><table:table-header-rows><table:table-row><table:table-cell><text:p>x</text:p>"
        "<text:p>y</text:p></table:table-cell><table:table-cell><text:list><text:list-item>"
        "<text:p>z</text:p></text:list-item></text:list></table:table-cell></table:table-row>"
        "</table:table-header-rows></table:table>"
    )
    content = _read(write_odf(tmp_path / "a.odt", "text", f"<office:text>{body}</office:text>"))
    assert content.text == "a\nb\tc d e\n\nnote\n- one\n- nested\n\nx y | - z"


def test_an_office_file_with_a_password_says_so(tmp_path: Path) -> None:
    for name in ("a.docx", "a.xlsx", "a.pptx"):
        (tmp_path / name).write_bytes(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600))
        with pytest.raises(EncryptedDocumentError, match=re.escape(name)):
            _read(tmp_path / name)


# ---- HTML -------------------------------------------------------------------------------------


def test_html_loses_nothing_that_is_shown() -> None:
    text, sections, hidden = html_text(
        "<title>no</title><h1>A &amp; B</h1>naked <b>bold</b><br>line<blockquote>quote</blockquote>"
        "<dl><dt>term<dd>meaning</dl><ol><li>one<li>two</ol><pre>a  b\n c</pre>"
        "<table><tr><th>x<th><th>y<tr><td>1<td><td>2</table><aside>aside</aside>"
        "<script>no</script><p style='display:none'>no</p><p hidden>no<p>tail<img alt='map'>"
    )
    assert text == (
        "A & B\n\nnaked bold\nline\n\nquote\n\nterm\n\nmeaning\n1. one\n2. two\n\na  b\n c\n\n"
        "x | y\n1 | 2\n\naside\n\ntail[image: map]"
    )
    assert sections == (Section(1, "A & B", 0),)
    assert hidden == 2


def test_html_with_stray_signs_comments_and_scripts_loses_no_text() -> None:
    text, _, _ = html_text(
        "<script>var s = '<!--';</script>kept <!-- not --> a < b, c > d <![CDATA[x & <y>]]>"
        '<a title="1 > 0 < 2">link</a><![if !IE]>!<![endif]> <!-- never closed, still text'
    )
    assert text == "kept a < b, c > d x & <y>link! <!-- never closed, still text"


def test_tables_for_layout_stay_paragraphs_and_cells_may_hold_tables() -> None:
    layout, sections, _ = html_text("<table><tr><td><h2>H</h2><p>one<p>two</table>")
    assert layout == "H\n\none\n\ntwo"
    assert sections == (Section(2, "H", 0),)
    nested, _, _ = html_text(
        "<table><tr><td>a<table><tr><td>b<td>c</table><td>d</table>after</table></td>"
    )
    assert nested == "a b | c | d\n\nafter"


def test_html_is_decoded_as_it_declares(tmp_path: Path) -> None:
    page = '<meta charset="shift_jis"><p>港の料金'.encode("shift_jis")
    assert _written(tmp_path / "a.html", page).text == "港の料金"
    assert _written(tmp_path / "page", "<!doctype html><p>sniffed").text == "sniffed"


# ---- plain text -------------------------------------------------------------------------------

JAPANESE = "港の料金は一泊三十五クローネです。"
GERMAN = "Die Gebühr für größere Schiffe beträgt fünfzig Kronen. "


@pytest.mark.parametrize(
    ("encoding", "words"),
    [
        *((e, JAPANESE) for e in ("utf-8", "utf-8-sig", "shift_jis", "euc_jp", "iso2022_jp")),
        *((e, GERMAN) for e in ("utf-16", "utf-16-le", "utf-16-be", "utf-32")),
        ("cp1252", GERMAN * 8),
        ("utf-8", "plain"),
    ],
)
def test_text_is_decoded_whatever_its_encoding(encoding: str, words: str) -> None:
    text, _ = decode(words.encode(encoding))
    assert text == words


def test_a_program_named_text_is_refused_and_a_damaged_text_is_read(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFormatError, match=r"noise\.txt holds no text: \d\d% of its"):
        _written(tmp_path / "noise.txt", np.random.default_rng(0).bytes(50_000))
    with pytest.raises(UnsupportedFormatError, match="100%"):
        _written(tmp_path / "zeros.txt", bytes(5_000))
    damaged = GERMAN.encode() * 20 + b"\xff\xfe\x00" * 20
    assert GERMAN in _written(tmp_path / "damaged.txt", damaged).text


def test_line_ends_become_unix() -> None:
    assert decode(b"a\r\nb\rc\x0cd")[0] == "a\nb\nc\nd"


def test_markdown_headings_skip_code_and_front_matter_and_keep_offsets() -> None:
    text = "# One\n\n```\n# not a heading\n```\n\nTwo\n---\nx\n"
    assert markdown_headings(text) == (Section(1, "One", 0), Section(2, "Two", 32))
    front = "---\ntitle: no heading\n---\n"
    assert markdown_headings(f"{front}# One\n") == (Section(1, "One", len(front)),)


def test_underlined_titles_take_levels_in_order_of_appearance() -> None:
    text = "Part\n****\n\nChapter\n=======\n\nx\n\nNext\n****\n\n| a |\n---\n"
    titles = [(s.level, s.title) for s in underlined_titles(text)]
    assert titles == [(1, "Part"), (2, "Chapter"), (1, "Next")]


def test_chapters_of_a_book_are_sections(tmp_path: Path) -> None:
    book = "PART 1\n\nCHAPTER I\n\nIt began.\n\nCHAPTER II. The end\n\nIt ended.\n\nPART 2\n\nx"
    assert _titles(_written(tmp_path / "book.txt", book)) == [
        (1, "PART 1"),
        (2, "CHAPTER I"),
        (2, "CHAPTER II. The end"),
        (1, "PART 2"),
    ]


def test_latex_commands_are_sections_and_comments_none(tmp_path: Path) -> None:
    source = "\\section{Fees}\nx\n% \\section{no}\n\\subsection*{In {\\em winter}}\ny\n"
    content = _written(tmp_path / "a.tex", source)
    assert content.text == source
    assert [(s.level, s.title) for s in content.sections] == [(1, "Fees"), (2, "In winter")]
    assert [source[s.start :][:4] for s in content.sections] == ["\\sec", "\\sub"]


# ---- data, mail, source -----------------------------------------------------------------------


def test_a_notebook_keeps_cells_and_outputs(tmp_path: Path) -> None:
    outputs = [
        {"output_type": "stream", "text": ["35\n"]},
        {"output_type": "display_data", "data": {"image/png": "x", "text/plain": "<Figure>"}},
    ]
    notebook = {
        "cells": [
            {"cell_type": "markdown", "source": ["# Fees\n", "a night"]},
            {"cell_type": "code", "source": "# no heading\nfee()", "outputs": outputs},
        ]
    }
    content = _written(tmp_path / "a.ipynb", json.dumps(notebook))
    assert content.text == "# Fees\na night\n\n# no heading\nfee()\n\nOutput:\n35"
    assert content.sections == (Section(1, "Fees", 0),)
    assert content.warnings == ("outputs without text (pictures), which are not read: 1",)


def test_tables_and_json_stay_as_they_are(tmp_path: Path) -> None:
    for name, text in (
        ("a.csv", 'ship,"length, m"\nAurora,42\n'),
        ("a.tsv", "ship\tlength\n"),
        ("a.jsonl", '{"fee": 35}\n{"fee": 36}\n'),
        ("a.json", '{\n "fee": 1.10, "fee": 12345678901234567890}'),
    ):
        assert _written(tmp_path / name, text).text == text
    broken = _written(tmp_path / "b.json", '{"fee": 35')
    assert broken.text == '{"fee": 35'
    assert "not valid JSON" in broken.warnings[0]


def test_json_on_one_line_is_broken_without_changing_a_sign(tmp_path: Path) -> None:
    text = json.dumps([{"a, {b": 'x "y": [', "n": 1.50, "list": [1, 2, {}]}] * 100)
    content = _written(tmp_path / "a.json", text)
    assert max(map(len, content.text.split("\n"))) < 60
    assert re.sub(r"\s", "", content.text) == re.sub(r"\s", "", text)
    assert json.loads(content.text) == json.loads(text)


def test_mail_keeps_its_headers_and_names_what_is_attached(tmp_path: Path) -> None:
    message = email.message.EmailMessage(policy=email.policy.default)
    message["From"], message["To"] = "Ana Řehoř <ana@example.org>", "ben@example.org"
    message["Subject"], message["Date"] = "Fees in März", "Tue, 24 Nov 2026 10:00:00 +0000"
    message.set_content("The fee is 35 crowns.\nBörth seven.")
    message.add_attachment(b"%PDF", maintype="application", subtype="pdf", filename="fees.pdf")
    (tmp_path / "a.eml").write_bytes(bytes(message))
    content = _read(tmp_path / "a.eml")
    assert content.text.startswith("From: Ana Řehoř <ana@example.org>\nTo: ben@example.org\n")
    assert content.text.rstrip().endswith("The fee is 35 crowns.\nBörth seven.")
    assert content.sections[0] == Section(1, "Fees in März", 0)
    assert "fees.pdf (application/pdf) is not read" in content.warnings[0]
    message.clear_content()
    message.set_content("<h1>Fees</h1><p hidden>no</p><p>35 crowns", subtype="html")
    content = _written(tmp_path / "b.eml", bytes(message))
    assert content.text.endswith("Fees\n\n35 crowns")
    assert content.text[content.sections[1].start :].startswith("Fees\n")


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        (
            "a.py",
            "import x\n@deco\ndef f(): pass\nclass C:\n  def m(self): pass\n",
            ["f", "C", "m"],
        ),
        ("a.py", "def broken(:\n", []),
        ("a.go", "func (s *S) Fee() int {\n}\ntype Ship struct {\n", ["Fee", "Ship"]),
        ("a.rs", "pub fn fee() {}\nstruct Ship;\n  fn inner() {}\n", ["fee", "Ship"]),
        ("a.ts", "export class A {}\nasync function b() {}\nconst c = 1\n", ["A", "b"]),
        ("a.c", "int fee(int ship)\n{\n  if (x) return;\n}\nint declared(int);\n", ["fee"]),
        ("a.java", "public final class Ship {\n  void fee() {}\n}\n", ["Ship"]),
        ("a.yaml", "fee: 35\n", []),
    ],
)
def test_definitions_of_source_files(
    tmp_path: Path, name: str, source: str, expected: list[str]
) -> None:
    (tmp_path / name).write_text(source)
    assert _read(tmp_path / name).text == source
    from ingest.readers.formats import FORMATS

    content = read_source(tmp_path / name, FORMATS[Path(name).suffix].media_type)
    assert [section.title for section in content.sections] == expected


# ---- chats ------------------------------------------------------------------------------------

LONG = "word " * 150
CHATS = {
    "whatsapp": "31.12.23, 22:0{n} - {who}: {words}",
    "iphone": "[12/31/23, 10:0{n}:11 PM] {who}: {words}",
    "irc": "[22:0{n}] <{who}> {words}",
    "meeting": "[00:0{n}:15] {who}: {words}",
    "transcript": "{who}: {words}",
}


@pytest.mark.parametrize("kind", CHATS)
def test_a_chat_is_cut_by_turns_that_name_speaker_and_time(kind: str) -> None:
    said = [
        ("Ana", "Hello"),
        ("Ben", "Hi there"),
        ("Ana", LONG),
        ("Ben", "Yes, I see"),
        ("Ana", "Good"),
        ("Ben", "Where is the fee?"),
        ("Ben", "I mean 35"),
        ("Ana", "There"),
    ]
    lines = [CHATS[kind].format(n=n, who=who, words=words) for n, (who, words) in enumerate(said)]
    text = "\n".join(lines)
    sections = chat_sections(text)
    turns = [s for s in sections if any(name in s.title for name in ("Ana", "Ben"))]
    assert [s.title.split(", ")[0] for s in turns] == ["Ana", "Ana", "Ben"]
    assert [text[s.start :].split("\n")[0] for s in turns] == [lines[0], lines[2], lines[3]]
    if kind != "transcript":
        assert "2" in turns[1].title or ":02" in turns[1].title
    if kind in ("whatsapp", "iphone"):
        assert sections[0].title in ("31.12.23", "12/31/23")
        assert {s.level for s in turns} == {2}


@pytest.mark.parametrize(
    "text",
    [
        "Note: this is prose.\nIt goes on: and on.\n" * 20,
        "Name: Ana\nPhone: 35\nTown: Brest\n" * 20,
        "Name: Ana Kowalska\nPhone: 35 36\n" * 20,
        "2026-11-24 10:00:00 INFO: started\n2026-11-24 10:00:01 ERROR: stopped\n" * 20,
        "10:00 The ship arrives.\n11:00 It leaves.\n" * 20,
        "Chapter: one\n" * 20,
        "",
    ],
)
def test_what_is_no_chat_is_not_taken_for_one(text: str) -> None:
    assert chat_sections(text) == ()


def test_exported_messages_become_a_chat(tmp_path: Path) -> None:
    slack = [
        {"user": "U1", "user_profile": {"real_name": "Ana"}, "ts": "1700000000.0001", "text": "Hi"},
        {"user": "Ben", "ts": "1700000060.0", "text": LONG},
    ]
    content = _written(tmp_path / "slack.json", json.dumps(slack))
    assert content.text.startswith("[2023-11-14 22:13:20] Ana: Hi\n[2023-11-14 22:14:20] Ben: word")
    assert _titles_of_chat(content) == ["2023-11-14", "Ana, 22:13:20", "Ben, 22:14:20"]
    assert "read as a chat" in content.warnings[0]
    telegram = {
        "messages": [{"from": "Ana", "date": "2026-01-02T03:04:05", "text": ["a ", {"text": "b"}]}]
    }
    assert (
        _written(tmp_path / "t.json", json.dumps(telegram)).text == "[2026-01-02 03:04:05] Ana: a b"
    )


def _titles_of_chat(content: CanonicalText) -> list[str]:
    return [section.title for section in content.sections]


@pytest.mark.skipif(not (INGEST_DOCS.parent / "qmsum").is_dir(), reason="qmsum is not here")
def test_real_meetings_are_chats_and_real_prose_is_none() -> None:
    import gzip

    for folder in ("qmsum", "squad2_articles", "covidqa", "quality_mc", "cuad_contracts"):
        with gzip.open(INGEST_DOCS.parent / folder / "documents.jsonl.gz") as lines:
            found = [bool(chat_sections(json.loads(line)["text"])) for line in lines]
        assert set(found) == {folder == "qmsum"}, folder


# ---- PDF --------------------------------------------------------------------------------------

SCAN = "q 612 0 0 792 0 0 cm /I1 Do Q\n"
DARK = "0 0 0 rg 50 650 300 60 re f\n"


def test_pdf_pages_labels_and_outline(tmp_path: Path) -> None:
    content = _read(
        write_pdf(
            tmp_path / "a.pdf",
            [pdf_line("Preface"), pdf_line("About the FEES today"), ""],
            outline=[("Preface", 0), ("Fees", 1), ("Nowhere", 2)],
            labels="0 << /S /r >> 1 << /S /D >>",
        ),
        "a",
    )
    assert content.text == "Preface\n\nAbout the FEES today\n\n"
    assert [p.label for p in content.pages] == ["i", "1", "2"]
    assert [content.text[p.start : p.end] for p in content.pages] == [
        "Preface",
        "About the FEES today",
        "",
    ]
    assert content.sections[1] == Section(1, "Fees", content.text.index("FEES"))
    assert content.warnings == ("1 page without text, in need of OCR: 3",)


@pytest.mark.parametrize(
    ("page", "expected", "is_read"),
    [
        (pdf_line("unseen", y=600, before="1 1 1 rg"), "white on white", True),
        (DARK + pdf_line("unseen", y=670, before="1 1 1 rg"), None, True),
        (pdf_line("unseen", y=600, size=1), "smaller than 2 pt", True),
        (pdf_line("unseen", y=600, before="3 Tr"), "invisible by its render mode", True),
        (pdf_line("unseen", y=-50), "outside the page", False),
        (SCAN + pdf_line("unseen", y=600, before="3 Tr"), "from OCR", True),
        (pdf_line("   ", y=600, before="1 1 1 rg") + pdf_line("unseen", y=500), None, True),
    ],
)
def test_hidden_text_in_a_pdf_is_told_with_its_page(
    tmp_path: Path, page: str, expected: str | None, is_read: bool
) -> None:
    first = pdf_line("seen", y=750)
    content = _read(write_pdf(tmp_path / "a.pdf", [first, first + page]))
    assert ("unseen" in content.text) == is_read
    if expected is None:
        assert content.warnings == ()
    else:
        (warning,) = content.warnings
        assert expected in warning
        assert warning.endswith("on 1 page: 2")


def test_a_broken_pdf_is_repaired_and_says_so(tmp_path: Path) -> None:
    path = write_pdf(tmp_path / "a.pdf", [pdf_line("one"), pdf_line("two"), pdf_line("three")])
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex(b"xref\n0")])
    content = _read(path)
    assert content.text == "one\n\ntwo\n\nthree"
    assert "repaired before reading: 3 pages" in content.warnings[0]
    path.write_bytes(whole[: whole.index(b"(three)")])
    assert _read(path).text.startswith("one\n\ntwo")


# ---- real documents ---------------------------------------------------------------------------

# name -> characters, pages, sections, a word of each warning; all within a hundredth
REAL = {
    "book-war-and-peace-1225p.txt": (3_202_303, 0, 379, ()),
    "debian-policy.copyright": (5_020, 0, 0, ()),
    "debian-policy.epub": (450_687, 0, 342, ()),
    "debian-policy.pdf": (482_659, 193, 339, ("OCR: 2",)),
    "debian-policy.txt": (478_876, 0, 340, ()),
    "docx-tables.docx": (180, 0, 0, ()),
    "doj-ch13-trustee-handbook-872p.docx": (816_386, 0, 294, ()),
    "galaxy-gaming-10k-2021-ixbrl.html": (176_868, 0, 0, ("1 hidden element is left out",)),
    "gao-23-106826-malformed-structure.pdf": (10_830, 2, 0, ()),
    "irs-manual-2.3.59-400p.pdf": (337_384, 400, 134, ("OCR: 2, 400", "white on white")),
    "korean-text-with-tables.pdf": (1_213, 1, 0, ("outside the page",)),
    "simple.docx": (179, 0, 1, ()),
    "simple.odt": (180, 0, 1, ()),
    "winter-sports.epub": (339_851, 0, 33, ()),
}
UNREADABLE: dict[str, type[ReadError]] = {
    "encrypted-password.pdf": EncryptedDocumentError,
    "image-only-no-text-layer.pdf": EmptyDocumentError,
}


@needs_documents
@pytest.mark.parametrize("name", REAL)
def test_real_documents_are_read_whole(name: str) -> None:
    num_chars, num_pages, num_sections, warnings = REAL[name]
    content = _read(INGEST_DOCS / name)
    assert len(content.text) == pytest.approx(num_chars, rel=0.01)
    assert len(content.pages) == num_pages
    assert len(content.sections) == pytest.approx(num_sections, rel=0.01)
    assert len(content.warnings) == len(warnings), content.warnings
    for found, expected in zip(content.warnings, warnings, strict=True):
        assert expected in found
    starts = [section.start for section in content.sections]
    assert starts == sorted(starts)
    assert all(start < len(content.text) for start in starts)


@needs_documents
@pytest.mark.parametrize("name", UNREADABLE)
def test_real_documents_that_cannot_be_read_say_why(name: str) -> None:
    with pytest.raises(UNREADABLE[name], match=name) as caught:
        _read(INGEST_DOCS / name)
    assert caught.value.hint


@needs_documents
def test_every_real_document_has_its_expectation() -> None:
    names = {path.name for path in INGEST_DOCS.iterdir()} - {"PROVENANCE.md"}
    assert names == {*REAL, *UNREADABLE}


@needs_documents
def test_headings_of_real_pdfs_stand_where_they_are_printed() -> None:
    for name, expected in (("debian-policy.pdf", 0.98), ("irs-manual-2.3.59-400p.pdf", 0.95)):
        content = _read(INGEST_DOCS / name)
        placed = sum(
            content.text[s.start :].split(maxsplit=1)[0].lower() == s.title.split()[0].lower()
            for s in content.sections
        )
        assert placed >= expected * len(content.sections), name


@needs_documents
def test_the_same_passage_is_in_every_container() -> None:
    passages = (
        "This manual also describes Debian policy as it relates to creating Debian packages.",
        "Errors which occur during the execution of an installation script must be checked and the"
        " installation must not continue after an error.",
        "Significant changes that will require work in many packages will be signaled by a change"
        " to the minor number.",
        "Packages including a service unit may optionally include an init script to support other"
        " init systems.",
        "There should be a clear time limit to this stage, but as yet we have not set one.",
    )
    for suffix in ("txt", "pdf", "epub"):
        text = " ".join(_read(INGEST_DOCS / f"debian-policy.{suffix}").text.split())
        assert [passage for passage in passages if passage not in text] == [], suffix


def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_text("<html>")
    with pytest.raises(ReaderFailedError, match=r"a\.pdf is not a readable PDF"):
        _read(tmp_path / "a.pdf")
