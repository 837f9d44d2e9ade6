"""Parse one file in a throw-away process with limits, so that no file can take Fathom down."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rag import errors
from rag.errors import EmptyDocumentError, ReaderFailedError, ReadError, UnsupportedFormatError
from rag.settings import Settings
from rag.types import CanonicalText, Page, Section

# suffix -> the reader that ingest/readers/worker.py calls
READERS = {
    ".txt": "text",
    ".text": "text",
    ".rst": "text",
    ".log": "text",
    ".md": "markdown",
    ".markdown": "markdown",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".pdf": "pdf",
}


def can_read(path: Path) -> bool:
    """Say whether a reader accepts the file, by its suffix."""
    return path.suffix.lower() in READERS


def read_guarded(path: Path, *, name: str, settings: Settings) -> CanonicalText:
    """Return the canonical text of the file at `path`.

    Args:
        path: a regular file.
        name: the name a person knows it by; its suffix chooses the reader.
        settings: the limits on memory and time.

    Raises:
        UnsupportedFormatError: if no reader accepts the suffix.
        EncryptedDocumentError: if it needs a password.
        EmptyDocumentError: if it holds no text.
        ReaderFailedError: if the parser failed, crashed or hit a limit.
    """
    reader = READERS.get(Path(name).suffix.lower())
    if reader is None:
        raise UnsupportedFormatError(
            f"no reader for {name!r}; expected one of {' '.join(READERS)}",
            hint="convert it to PDF, HTML, Markdown or plain text",
        )
    request = {
        "path": str(path),
        "name": name,
        "reader": reader,
        "memory_bytes": settings.reader_memory_bytes,
        "cpu_seconds": math.ceil(settings.reader_timeout_seconds),
    }
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _start_worker(), json.dumps(request)],
            capture_output=True,
            timeout=settings.reader_timeout_seconds,
            env={name: value for name, value in os.environ.items() if name in ("PATH", "LANG")},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ReaderFailedError(
            f"{name} was not read within {settings.reader_timeout_seconds:g} s",
            hint="raise FATHOM_READER_TIMEOUT_SECONDS, or split the file",
        ) from error
    answer = _last_object(done.stdout)
    if answer is None:
        raise ReaderFailedError(
            f"the reader of {name} ended without an answer (exit code {done.returncode});"
            f" it may use {settings.reader_memory_bytes // 2**20} MiB"
            f" and {settings.reader_timeout_seconds:g} s",
            hint="the file is damaged or too large: save it anew, or raise"
            " FATHOM_READER_MEMORY_BYTES",
        )
    if "error" in answer:
        kind: type[ReadError] = getattr(errors, answer["error"])
        raise kind(answer["message"], hint=answer["hint"])
    content = _content(answer)
    if not content.text.strip():
        pages = f"{len(content.pages)} pages without text" if content.pages else "no text"
        raise EmptyDocumentError(
            f"{name} holds {pages}; expected words to read",
            hint="a scan needs OCR first (for example with ocrmypdf); then ingest the result",
        )
    return content


def _start_worker() -> str:
    # -I keeps the current folder and the environment out of the import path
    root = Path(__file__).resolve().parents[2]
    return (
        f"import sys; sys.path.insert(0, {str(root)!r});"
        " from ingest.readers.worker import main; main(sys.argv[1])"
    )


def _last_object(output: bytes) -> dict[str, Any] | None:
    """Return the JSON object on the last line, if there is one."""
    lines = output.splitlines()
    try:
        value = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _content(answer: dict[str, Any]) -> CanonicalText:
    return CanonicalText(
        text=answer["text"],
        media_type=answer["media_type"],
        pages=tuple(Page(**page) for page in answer["pages"]),
        sections=tuple(Section(**section) for section in answer["sections"]),
        warnings=tuple(answer["warnings"]),
    )
