"""Which reader takes which file: one table by suffix, and a look at the content for the rest."""

import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePath

SNIFFED_BYTES = 4096
_OPENDOCUMENT = "application/vnd.oasis.opendocument"
_OPENXML = "application/vnd.openxmlformats-officedocument"


@dataclass(frozen=True, slots=True)
class Format:
    """A reader, `ingest.readers.<module>.<function>(path, media_type)`, and its media type."""

    module: str
    function: str
    media_type: str


TEXT = Format("text", "read_text", "text/plain")
HTML = Format("web", "read_html", "text/html")
PDF = Format("pdf", "read_pdf", "application/pdf")
RTF = Format("office", "read_office", "application/rtf")
MAIL = Format("mail", "read_mail", "message/rfc822")
JSON = Format("data", "read_json", "application/json")

FORMATS: dict[str, Format] = {
    **dict.fromkeys((".txt", ".text", ".log"), TEXT),
    **dict.fromkeys((".md", ".markdown"), Format("text", "read_markdown", "text/markdown")),
    ".rst": Format("text", "read_rest", "text/x-rst"),
    **dict.fromkeys((".tex", ".latex"), Format("text", "read_latex", "text/x-tex")),
    **dict.fromkeys((".html", ".htm", ".xhtml"), HTML),
    ".pdf": PDF,
    ".docx": Format("word", "read_docx", f"{_OPENXML}.wordprocessingml.document"),
    ".pptx": Format("slides", "read_pptx", f"{_OPENXML}.presentationml.presentation"),
    ".xlsx": Format("office", "read_office", f"{_OPENXML}.spreadsheetml.sheet"),
    ".odt": Format("writer", "read_odt", f"{_OPENDOCUMENT}.text"),
    ".ods": Format("office", "read_office", f"{_OPENDOCUMENT}.spreadsheet"),
    ".rtf": RTF,
    ".epub": Format("web", "read_epub", "application/epub+zip"),
    ".ipynb": Format("data", "read_notebook", "application/x-ipynb+json"),
    ".json": JSON,
    **dict.fromkeys((".jsonl", ".ndjson"), Format("data", "read_table", "application/jsonl")),
    ".csv": Format("data", "read_table", "text/csv"),
    ".tsv": Format("data", "read_table", "text/tab-separated-values"),
    ".eml": MAIL,
    **{
        suffix: Format("source", "read_source", f"text/x-{language}")
        for language, suffixes in {
            "python": ".py .pyi",
            "javascript": ".js .mjs .cjs .jsx",
            "typescript": ".ts .tsx",
            "c": ".c .h",
            "c++": ".cc .cpp .cxx .hh .hpp .cu",
            "csharp": ".cs",
            "java": ".java",
            "kotlin": ".kt",
            "scala": ".scala",
            "swift": ".swift",
            "go": ".go",
            "rust": ".rs",
            "ruby": ".rb",
            "php": ".php",
            "perl": ".pl .pm",
            "lua": ".lua",
            "r": ".r",
            "julia": ".jl",
            "shell": ".sh .bash .zsh",
            "sql": ".sql",
            "other": ".css .scss .toml .yaml .yml .ini .cfg .conf .xml .proto .cmake .tf .el .hs",
        }.items()
        for suffix in suffixes.split()
    },
}

# what a zip archive must hold to be one of ours
_ZIP_PARTS = {
    "word/document.xml": ".docx",
    "ppt/presentation.xml": ".pptx",
    "xl/workbook.xml": ".xlsx",
}
_ZIP_TYPES = {FORMATS[suffix].media_type.encode(): suffix for suffix in (".epub", ".odt", ".ods")}
_MAIL_HEADERS = (b"from:", b"to:", b"date:", b"subject:", b"received:", b"return-path:")


def format_of_name(name: str) -> Format | None:
    """Return the format that the name's suffix stands for, None if it says nothing."""
    return FORMATS.get(PurePath(name).suffix.lower())


def may_be_readable(head: bytes) -> bool:
    """Say from the first `SNIFFED_BYTES` of a file of unknown suffix whether to try it."""
    return head.startswith((b"PK\x03\x04", b"{\\rtf")) or b"%PDF-" in head or _is_text(head)


def sniff(path: Path) -> Format | None:
    """Return the format that the content of a file shows, None if no reader takes it."""
    with path.open("rb") as file:
        head = file.read(SNIFFED_BYTES)
    if b"%PDF-" in head[:1024]:
        return PDF
    if head.startswith(b"PK\x03\x04"):
        return _sniff_zip(path)
    if head.startswith(b"{\\rtf"):
        return RTF
    if not _is_text(head):
        return None
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return HTML
    if sum(b"\n" + name in b"\n" + head.lower() for name in _MAIL_HEADERS) >= 3:
        return MAIL
    return JSON if start.startswith((b"{", b"[{")) else TEXT


def _sniff_zip(path: Path) -> Format | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            if "mimetype" in names:
                with archive.open("mimetype") as part:
                    suffix = _ZIP_TYPES.get(part.read(100).strip())
                return FORMATS[suffix] if suffix else None
    except zipfile.BadZipFile:
        return None
    return next((FORMATS[suffix] for part, suffix in _ZIP_PARTS.items() if part in names), None)


def _is_text(head: bytes) -> bool:
    """Say whether bytes look like text: few control characters, NULs only as UTF-16 has them."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return True
    if b"\x00" in head:
        even, odd = head[0::2].count(0), head[1::2].count(0)
        return max(even, odd) > 0.3 * len(head) / 2 and min(even, odd) < 0.05 * len(head) / 2
    control = sum(byte < 32 and byte not in b"\t\n\r\x0c\x1b" for byte in head)
    return bool(head) and control < 0.02 * len(head)
