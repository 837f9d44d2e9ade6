"""Small documents of every format, built from their specification, for the readers' tests."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

_XML = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'
_OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_PACKAGE = "http://schemas.openxmlformats.org/package/2006"

HEADINGS = ("Harbour handbook", "Berths")
SENTENCES = ("Berth seven is kept free for the pilot boat.", "The fee is 35 crowns & a smile.")
ROWS = (("Ship", "Length"), ("Aurora", "42 m"), ("Zephyr", "17 m"))


def write_zip(path: Path, parts: dict[str, str | bytes]) -> Path:
    """Write a zip archive; a part named `mimetype` is stored first, as ODF and EPUB ask."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            kind = zipfile.ZIP_STORED if name == "mimetype" else zipfile.ZIP_DEFLATED
            archive.writestr(name, data, compress_type=kind)
    return path


def docx_parts(body: str = "") -> dict[str, str | bytes]:
    """Return the parts of a DOCX with two headings, two sentences and a table, or with `body`."""

    def paragraph(text: str, style: str = "") -> str:
        properties = f'<w:pPr><w:pStyle w:val="{style}"/></w:pPr>' if style else ""
        return f"<w:p>{properties}<w:r><w:t>{escape(text)}</w:t></w:r></w:p>"

    rows = "".join(
        "<w:tr>" + "".join(f"<w:tc>{paragraph(cell)}</w:tc>" for cell in row) + "</w:tr>"
        for row in ROWS
    )
    body = body or (
        paragraph(HEADINGS[0], "Heading1")
        + paragraph(SENTENCES[0])
        + paragraph(HEADINGS[1], "Heading2")
        + paragraph(SENTENCES[1])
        + f"<w:tbl>{rows}</w:tbl>"
    )
    main = "application/vnd.openxmlformats-officedocument.wordprocessingml"
    styles = "".join(
        f'<w:style w:type="paragraph" w:styleId="Heading{n}"><w:name w:val="heading {n}"/>'
        f'<w:pPr><w:outlineLvl w:val="{n - 1}"/></w:pPr></w:style>'
        for n in (1, 2)
    )
    word = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
    return {
        "[Content_Types].xml": _content_types(
            {
                "/word/document.xml": f"{main}.document.main+xml",
                "/word/styles.xml": f"{main}.styles+xml",
            }
        ),
        "_rels/.rels": _relations([("officeDocument", "word/document.xml")]),
        "word/_rels/document.xml.rels": _relations([("styles", "styles.xml")]),
        "word/styles.xml": f"{_XML}<w:styles {word}>{styles}</w:styles>",
        "word/document.xml": f"{_XML}<w:document {word}><w:body>{body}</w:body></w:document>",
    }


def write_docx(path: Path) -> Path:
    """Write the handbook as DOCX."""
    return write_zip(path, docx_parts())


def write_pptx(path: Path) -> Path:
    """Write two slides, each with a title and a sentence."""
    spaces = (
        'xmlns:a="http://schemas.openxmlformats.org/drawingml/2006/main" '
        'xmlns:p="http://schemas.openxmlformats.org/presentationml/2006/main" '
        f'xmlns:r="{_OFFICE}"'
    )
    main = "application/vnd.openxmlformats-officedocument.presentationml"

    def shape(number: int, kind: str, text: str) -> str:
        return (
            f'<p:sp><p:nvSpPr><p:cNvPr id="{number}" name="{kind} {number}"/><p:cNvSpPr/><p:nvPr>'
            f'<p:ph type="{kind}"/></p:nvPr></p:nvSpPr><p:spPr/><p:txBody><a:bodyPr/><a:p><a:r>'
            f"<a:t>{escape(text)}</a:t></a:r></a:p></p:txBody></p:sp>"
        )

    def slide(heading: str, sentence: str) -> str:
        shapes = shape(2, "title", heading) + shape(3, "body", sentence)
        return (
            f'{_XML}<p:sld {spaces}><p:cSld><p:spTree><p:nvGrpSpPr><p:cNvPr id="1" name=""/>'
            f"<p:cNvGrpSpPr/><p:nvPr/></p:nvGrpSpPr><p:grpSpPr/>{shapes}</p:spTree></p:cSld></p:sld>"
        )

    slides = [slide(h, s) for h, s in zip(HEADINGS, SENTENCES, strict=True)]
    ids = "".join(f'<p:sldId id="{256 + n}" r:id="rId{n}"/>' for n in (1, 2))
    parts: dict[str, str | bytes] = {
        "[Content_Types].xml": _content_types(
            {"/ppt/presentation.xml": f"{main}.presentation.main+xml"}
            | {f"/ppt/slides/slide{n}.xml": f"{main}.slide+xml" for n in (1, 2)}
        ),
        "_rels/.rels": _relations([("officeDocument", "ppt/presentation.xml")]),
        "ppt/_rels/presentation.xml.rels": _relations(
            [("slide", f"slides/slide{n}.xml") for n in (1, 2)]
        ),
        "ppt/presentation.xml": f"{_XML}<p:presentation {spaces}><p:sldIdLst>{ids}</p:sldIdLst>"
        "</p:presentation>",
    }
    for number, xml in enumerate(slides, 1):
        parts[f"ppt/slides/slide{number}.xml"] = xml
    return write_zip(path, parts)


def write_xlsx(path: Path) -> Path:
    """Write a workbook whose sheets Ships and Fees hold ROWS and one row."""
    main = "application/vnd.openxmlformats-officedocument.spreadsheetml"
    space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'

    def sheet(rows: Sequence[Sequence[str]]) -> str:
        cells = "".join(
            f'<row r="{r}">'
            + "".join(
                f'<c r="{"ABC"[c]}{r}" t="inlineStr"><is><t>{escape(cell)}</t></is></c>'
                for c, cell in enumerate(row)
            )
            + "</row>"
            for r, row in enumerate(rows, 1)
        )
        return f"{_XML}<worksheet {space}><sheetData>{cells}</sheetData></worksheet>"

    sheets = "".join(
        f'<sheet name="{name}" sheetId="{n}" r:id="rId{n}"/>'
        for n, name in enumerate(("Ships", "Fees"), 1)
    )
    return write_zip(
        path,
        {
            "[Content_Types].xml": _content_types(
                {"/xl/workbook.xml": f"{main}.sheet.main+xml"}
                | {f"/xl/worksheets/sheet{n}.xml": f"{main}.worksheet+xml" for n in (1, 2)}
            ),
            "_rels/.rels": _relations([("officeDocument", "xl/workbook.xml")]),
            "xl/_rels/workbook.xml.rels": _relations(
                [("worksheet", f"worksheets/sheet{n}.xml") for n in (1, 2)]
            ),
            "xl/workbook.xml": f'{_XML}<workbook {space} xmlns:r="{_OFFICE}"><sheets>{sheets}'
            "</sheets></workbook>",
            "xl/worksheets/sheet1.xml": sheet(ROWS),
            "xl/worksheets/sheet2.xml": sheet([("harbour fee", "35 crowns")]),
        },
    )


def write_odt(path: Path) -> Path:
    """Write the handbook as ODT."""
    rows = "".join(
        "<table:table-row>"
        + "".join(f"<table:table-cell><text:p>{c}</text:p></table:table-cell>" for c in row)
        + "</table:table-row>"
        for row in ROWS
    )
    body = (
        f'<text:h text:outline-level="1">{HEADINGS[0]}</text:h><text:p>{SENTENCES[0]}</text:p>'
        f'<text:h text:outline-level="2">{HEADINGS[1]}</text:h>'
        f"<text:p>{escape(SENTENCES[1])}</text:p><table:table>{rows}</table:table>"
    )
    return write_odf(path, "text", f"<office:text>{body}</office:text>")


def write_ods(path: Path) -> Path:
    """Write ROWS as the sheet Ships of an ODS."""
    rows = "".join(
        "<table:table-row>"
        + "".join(
            f'<table:table-cell office:value-type="string"><text:p>{c}</text:p></table:table-cell>'
            for c in row
        )
        + "</table:table-row>"
        for row in ROWS
    )
    table = f'<table:table table:name="Ships">{rows}</table:table>'
    return write_odf(path, "spreadsheet", f"<office:spreadsheet>{table}</office:spreadsheet>")


def write_rtf(path: Path) -> Path:
    """Write the handbook's sentences as RTF, one with a code page's letter."""
    text = "".join(rf"\pard {line}\par" + "\n" for line in (*SENTENCES, r"Geb\'fchr"))
    path.write_bytes((r"{\rtf1\ansi\ansicpg1252\deff0 " + text + "}").encode("ascii"))
    return path


def write_epub(path: Path) -> Path:
    """Write the handbook as an EPUB of two chapters."""
    chapters = [
        f'{_XML}<html xmlns="http://www.w3.org/1999/xhtml"><head><title>{h}</title></head><body>'
        f"<h{n}>{h}</h{n}><p>{escape(s)}</p></body></html>"
        for n, (h, s) in enumerate(zip(HEADINGS, SENTENCES, strict=True), 1)
    ]
    items = "".join(
        f'<item id="c{n}" href="c{n}.xhtml" media-type="application/xhtml+xml"/>' for n in (1, 2)
    )
    return write_zip(
        path,
        {
            "mimetype": "application/epub+zip",
            "META-INF/container.xml": f'{_XML}<container version="1.0" xmlns="urn:oasis:names:tc:'
            'opendocument:xmlns:container"><rootfiles><rootfile full-path="content.opf" '
            'media-type="application/oebps-package+xml"/></rootfiles></container>',
            "content.opf": f'{_XML}<package xmlns="http://www.idpf.org/2007/opf" version="3.0" '
            'unique-identifier="i"><metadata xmlns:dc="http://purl.org/dc/elements/1.1/">'
            '<dc:identifier id="i">x</dc:identifier><dc:title>Handbook</dc:title>'
            f"<dc:language>en</dc:language></metadata><manifest>{items}</manifest>"
            '<spine><itemref idref="c1"/><itemref idref="c2"/></spine></package>',
            "c1.xhtml": chapters[0],
            "c2.xhtml": chapters[1],
        },
    )


def write_pdf(
    path: Path,
    pages: Sequence[str],
    *,
    outline: Sequence[tuple[str, int]] = (),
    labels: str = "",
    extra: Sequence[bytes] = (),
) -> Path:
    """Write a PDF from its pages' content streams.

    Args:
        path: where.
        pages: content streams; the font is /F1, a grey image is /I1.
        outline: titles with the page index that each points to.
        labels: the /PageLabels number tree's entries, e.g. `0 << /S /r >>`.
        extra: objects appended as they are.
    """
    first_page, count = 5, len(pages)
    kids = " ".join(f"{first_page + 2 * n} 0 R" for n in range(count))
    outlines = first_page + 2 * count
    catalog = "<< /Type /Catalog /Pages 2 0 R"
    catalog += f" /PageLabels << /Nums [{labels}] >>" if labels else ""
    catalog += f" /Outlines {outlines} 0 R" if outline else ""
    objects: list[bytes] = [
        (catalog + " >>").encode(),
        f"<< /Type /Pages /Kids [{kids}] /Count {count} >>".encode(),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
        b"<< /Type /XObject /Subtype /Image /Width 1 /Height 1 /ColorSpace /DeviceGray"
        b" /BitsPerComponent 8 /Length 1 >>\nstream\n\x80\nendstream",
    ]
    for number, content in enumerate(pages):
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R /Resources"
            b" << /Font << /F1 3 0 R >> /XObject << /I1 4 0 R >> >> >>"
            % (first_page + 2 * number + 1)
        )
        data = content.encode("latin-1")
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(data), data))
    if outline:
        last = outlines + len(outline)
        objects.append(
            f"<< /Type /Outlines /First {outlines + 1} 0 R /Last {last} 0 R"
            f" /Count {len(outline)} >>".encode()
        )
        for number, (title, page) in enumerate(outline, outlines + 1):
            links = f" /Prev {number - 1} 0 R" if number > outlines + 1 else ""
            links += f" /Next {number + 1} 0 R" if number < last else ""
            objects.append(
                f"<< /Title ({title}) /Parent {outlines} 0 R{links}"
                f" /Dest [{first_page + 2 * page} 0 R /Fit] >>".encode()
            )
    path.write_bytes(_pdf_file([*objects, *extra]))
    return path


def pdf_line(text: str, *, x: int = 72, y: int = 700, size: float = 12, before: str = "") -> str:
    """Return a content stream that writes one line; `before` sets colour or render mode."""
    return f"q BT {before} /F1 {size} Tf {x} {y} Td ({text}) Tj ET Q\n"


def _pdf_file(objects: list[bytes]) -> bytes:
    data, offsets = bytearray(b"%PDF-1.7\n"), []
    for number, body in enumerate(objects, 1):
        offsets.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    xref = len(data)
    data += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    data += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    data += b"trailer\n<< /Size %d /Root 1 0 R >>\n" % (len(objects) + 1)
    return bytes(data + b"startxref\n%d\n%%%%EOF\n" % xref)


def write_odf(path: Path, kind: str, body: str) -> Path:
    """Write an OpenDocument file of that kind around the given body."""
    media_type = f"application/vnd.oasis.opendocument.{kind}"
    spaces = " ".join(
        f'xmlns:{name}="urn:oasis:names:tc:opendocument:xmlns:{name}:1.0"'
        for name in ("office", "text", "table")
    )
    return write_zip(
        path,
        {
            "mimetype": media_type,
            "META-INF/manifest.xml": f'{_XML}<manifest:manifest xmlns:manifest="urn:oasis:names:tc:'
            'opendocument:xmlns:manifest:1.0"><manifest:file-entry manifest:full-path="/" '
            f'manifest:media-type="{media_type}"/></manifest:manifest>',
            "content.xml": f'{_XML}<office:document-content {spaces} office:version="1.2">'
            f"<office:body>{body}</office:body></office:document-content>",
        },
    )


def _content_types(overrides: dict[str, str]) -> str:
    parts = "".join(
        f'<Override PartName="{name}" ContentType="{kind}"/>' for name, kind in overrides.items()
    )
    return (
        f'{_XML}<Types xmlns="{_PACKAGE}/content-types"><Default Extension="rels" ContentType='
        '"application/vnd.openxmlformats-package.relationships+xml"/><Default Extension="xml" '
        f'ContentType="application/xml"/>{parts}</Types>'
    )


def _relations(targets: Sequence[tuple[str, str]]) -> str:
    parts = "".join(
        f'<Relationship Id="rId{n}" Type="{_OFFICE}/{kind}" Target="{target}"/>'
        for n, (kind, target) in enumerate(targets, 1)
    )
    return f'{_XML}<Relationships xmlns="{_PACKAGE}/relationships">{parts}</Relationships>'
