"""Parse one file in a throw-away process with limits, so that no file can take Fathom down.

The process is forked by a server that has imported the readers; see `worker.py`.
"""

import atexit
import base64
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from rag import errors
from rag.errors import EmptyDocumentError, ReaderFailedError, ReadError
from rag.settings import Settings
from rag.types import CanonicalText, Page, Section

SERVER_SECONDS = 30.0  # for the server to start and to answer, beside what the file may take
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
    content = _content(_ask_worker({"task": "read"}, path, name, settings))
    if not content.text.strip():
        pages = f"no text on its pages ({len(content.pages):,})" if content.pages else "no text"
        raise EmptyDocumentError(
            f"{name} holds {pages}; expected words to read",
            hint="a scan needs OCR first (for example with ocrmypdf); then ingest the result",
        )
    return content


def render_page(path: Path, *, name: str, page: int, scale: float, settings: Settings) -> bytes:
    """Return a page of the PDF at `path` as PNG, `scale` pixels to the point.

    Raises:
        ReaderFailedError: if there is no such page, or it could not be drawn within the limits.
    """
    task = {"task": "render", "page": page, "scale": scale}
    return base64.b64decode(_ask_worker(task, path, name, settings)["png"])


def span_boxes(
    path: Path, *, name: str, page: int, start: int, end: int, settings: Settings
) -> list[tuple[float, float, float, float]]:
    """Return where characters `[start, end)` of a page's own text stand on its picture.

    Each line has a box: left, top, right, bottom, as fractions of the picture's width and height.

    Raises:
        ReaderFailedError: if there is no such page, or it could not be read within the limits.
    """
    task = {"task": "boxes", "page": page, "start": start, "end": end}
    return [tuple(box) for box in _ask_worker(task, path, name, settings)["boxes"]]


def _ask_worker(task: dict[str, Any], path: Path, name: str, settings: Settings) -> dict[str, Any]:
    """Return what the guarded process answers; an error that it names is raised here."""
    request = {
        **task,
        "path": str(path),
        "name": name,
        "memory_bytes": settings.reader_memory_bytes,
        "seconds": settings.reader_timeout_seconds,
        "cpu_seconds": math.ceil(settings.reader_timeout_seconds),
        "output_bytes": settings.reader_output_bytes,
    }
    # The answer goes to a file, not a pipe: the worker's limit on file size then bounds it, and
    # the worker can write nothing else anywhere that is larger.
    with tempfile.TemporaryFile() as output:
        server = _take_server()
        try:
            return_code = server.read(request, output.fileno())
        except BaseException as error:
            last_words = server.close()
            if not isinstance(error, OSError):
                raise
            raise _not_started(name, error, last_words) from error
        with _idle_lock:
            _idle.append(server)
        if return_code in (None, -signal.SIGXCPU, -signal.SIGKILL):
            raise _time_is_up(name, settings)
        output.seek(0)
        answer = _json_object(output.read())
    if answer is None:
        raise ReaderFailedError(
            f"the reader of {name} crashed ({_ending(return_code)}); it may use"
            f" {settings.reader_memory_bytes // 2**20} MiB"
            f" and {settings.reader_timeout_seconds:g} s",
            hint="the file is damaged or too large: save it anew, or raise"
            " FATHOM_READER_MEMORY_BYTES",
        )
    if "error" in answer:
        kind: type[ReadError] = getattr(errors, answer["error"])
        raise kind(answer["message"], hint=answer["hint"])
    return answer


class _Server:
    """A process that forks one process for each file, one after the other."""

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process lives
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _start_server()],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=self._said,
                env=_ENVIRONMENT,
            )

    def read(self, request: dict[str, Any], output: int) -> int | None:
        """Return how the process ended that read the file, None if its time was up.

        Raises:
            OSError: if the server has ended or does not answer.
        """
        self._channel.settimeout(request["seconds"] + SERVER_SECONDS)
        socket.send_fds(self._channel, [json.dumps(request).encode() + b"\n"], [output])
        answer = self._channel.recv(2**10)
        if not answer:
            raise ConnectionResetError("the process that starts readers has ended")
        ending: int | None = json.loads(answer)
        return ending

    def is_alive(self) -> bool:
        """Say whether the process is still there."""
        return self._process.poll() is None

    def close(self) -> str:
        """End it, whatever it is at; return the last line that it printed while it started."""
        self._channel.close()
        self._process.kill()
        self._process.wait()
        with self._said:
            self._said.seek(0)
            lines = self._said.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else ""


_idle: list[_Server] = []
_idle_lock = threading.Lock()
os.register_at_fork(after_in_child=lambda: _idle.clear())  # they answer to one process


def start_ahead() -> None:
    """Start a server now, so that the first file need not wait for it."""
    with _idle_lock:
        if not _idle:
            _idle.append(_Server())


@atexit.register
def stop_idle() -> None:
    """End the servers that wait for a file; the next file starts one again."""
    with _idle_lock:
        while _idle:
            _idle.pop().close()


def _take_server() -> _Server:
    with _idle_lock:
        while _idle:
            server = _idle.pop()
            if server.is_alive():
                return server
            server.close()
    return _Server()


def _start_server() -> str:
    # -I keeps the current folder and the environment out of the import path
    root = Path(__file__).resolve().parents[2]
    return (
        f"import sys; sys.path.insert(0, {str(root)!r});"
        " from ingest.readers.worker import serve; serve()"
    )


def _not_started(name: str, error: OSError, last_words: str) -> ReaderFailedError:
    if "ModuleNotFoundError" in last_words or "ImportError" in last_words:
        return ReaderFailedError(
            f"the process that reads {name} could not be started: {last_words}",
            hint=f"install Fathom, with all it needs, into {sys.executable}: readers see neither"
            " PYTHONPATH nor the current folder",
        )
    return ReaderFailedError(
        f"the process that reads {name} could not be started, or was ended: {last_words or error}",
        hint="free some memory, then run the same command again",
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
