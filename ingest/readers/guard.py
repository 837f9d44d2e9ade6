"""Parse one file in a throw-away process with limits, so that no file can take Fathom down."""

import json
import math
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rag import errors
from rag.errors import EmptyDocumentError, ReaderFailedError, ReadError
from rag.settings import Settings
from rag.types import CanonicalText, Page, Section

# Nothing of the caller's environment reaches a parser. HOME does not exist, so that a library
# which would like to keep a cache or a setting there finds no place for it.
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LC_ALL": "C.UTF-8",
    "HOME": "/nonexistent",
    "XDG_CACHE_HOME": "/nonexistent",
    "KREUZBERG_CACHE_DIR": "/nonexistent",
}


def read_guarded(path: Path, *, name: str, settings: Settings) -> CanonicalText:
    """Return the canonical text of the file at `path`.

    Args:
        path: a regular file.
        name: the name a person knows it by; its suffix chooses the reader, and where it says
            nothing, the content does.
        settings: the limits on memory, time and the answer's size.

    Raises:
        UnsupportedFormatError: if no reader accepts it.
        EncryptedDocumentError: if it needs a password.
        EmptyDocumentError: if it holds no text.
        ReaderFailedError: if the parser failed, crashed or hit a limit.
    """
    answer = _ask_worker(path, name, settings)
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


def _ask_worker(path: Path, name: str, settings: Settings) -> dict[str, Any]:
    request = {
        "path": str(path),
        "name": name,
        "memory_bytes": settings.reader_memory_bytes,
        "cpu_seconds": math.ceil(settings.reader_timeout_seconds),
        "output_bytes": settings.reader_output_bytes,
    }
    # The answer goes to a file, not a pipe: the worker's limit on file size then bounds it, and
    # the worker can write nothing else anywhere that is larger.
    with tempfile.TemporaryFile() as output:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", _start_worker(), json.dumps(request)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.DEVNULL,
                timeout=settings.reader_timeout_seconds,
                env=_ENVIRONMENT,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise _time_is_up(name, settings) from error
        if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
            raise _time_is_up(name, settings)
        output.seek(0)
        answer = _json_object(output.read())
    if answer is None:
        raise ReaderFailedError(
            f"the reader of {name} crashed ({_ending(done.returncode)}); it may use"
            f" {settings.reader_memory_bytes // 2**20} MiB"
            f" and {settings.reader_timeout_seconds:g} s",
            hint="the file is damaged or too large: save it anew, or raise"
            " FATHOM_READER_MEMORY_BYTES",
        )
    return answer


def _start_worker() -> str:
    # -I keeps the current folder and the environment out of the import path
    root = Path(__file__).resolve().parents[2]
    return (
        f"import sys; sys.path.insert(0, {str(root)!r});"
        " from ingest.readers.worker import main; main(sys.argv[1])"
    )


def _time_is_up(name: str, settings: Settings) -> ReaderFailedError:
    return ReaderFailedError(
        f"{name} was not read within {settings.reader_timeout_seconds:g} s",
        hint="raise FATHOM_READER_TIMEOUT_SECONDS, or split the file",
    )


def _ending(return_code: int) -> str:
    try:
        return signal.Signals(-return_code).name
    except ValueError:
        return f"exit code {return_code}"


def _json_object(output: bytes) -> dict[str, Any] | None:
    """Return the object on the last line: a parser's chatter may stand above it."""
    try:
        value = json.loads(output[output.rstrip().rfind(b"\n") + 1 :])
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _content(answer: dict[str, Any]) -> CanonicalText:
    return CanonicalText(
        text=answer["text"],
        media_type=answer["media_type"],
        pages=tuple(Page(*page) for page in answer["pages"]),
        sections=tuple(Section(*section) for section in answer["sections"]),
        warnings=tuple(answer["warnings"]),
    )
