"""The guarded processes: a server that forks one for each file, and what that one does.

The forked process sets its limits, reads its one file, prints one JSON object and ends. The server
touches no file; it only has the readers imported already, which takes longer than most files.
"""

import base64
import contextlib
import json
import os
import re
import resource
import select
import signal
import socket
import sys
import time
from dataclasses import astuple
from importlib import import_module
from pathlib import Path
from typing import Any

from ingest.readers.formats import FORMATS, format_of_name, sniff
from rag.errors import ReaderFailedError, ReadError, UnsupportedFormatError
from rag.types import CanonicalText

# kreuzberg is left to the process that needs it: what has threads must not be forked
PRELOADED = ("pdf", "page_image", "web", "text", "word")
_SURROGATE = re.compile("[\ud800-\udfff]")
# What no text holds. Of a program, a picture or an archive read as text they are half, of a text
# with a few damaged bytes hardly any.
_UNREADABLE = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f\ufffd]")
_UNREADABLE_SHARE = 0.2
_HEAD_CHARS = 2**20


def serve() -> None:
    """Answer the requests of `guard.read_guarded`, one line each, on the socket that is stdin.

    With a request comes the file that its process prints to. The answer is one line, too: how the
    process ended, as `subprocess` says it, or null if its time was up.
    """
    for name in PRELOADED:
        import_module(f"ingest.readers.{name}")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what it cannot start for was said until here
    channel = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    while True:
        line, outputs, _, _ = socket.recv_fds(channel, 2**16, 1)
        while line and not line.endswith(b"\n"):
            line += channel.recv(2**16)
        if not line:  # Fathom has ended
            return
        request, output = json.loads(line), outputs[0]
        life, held = os.pipe()  # the forked process holds it open
        pid = os.fork()
        if pid == 0:
            _be_forked(request, output, channel)
        os.close(held)
        os.close(output)
        ending = _ending(pid, life, request["seconds"])
        os.close(life)
        channel.sendall(json.dumps(ending).encode() + b"\n")


def _be_forked(request: dict[str, Any], output: int, channel: socket.socket) -> None:
    code = 1
    try:
        channel.close()
        os.dup2(output, 1)
        main(request)
        code = 0
    finally:
        os._exit(code)


def _ending(pid: int, life: int, seconds: float) -> int | None:
    """Wait for a process; one that takes longer is killed, and None is returned."""
    deadline = time.monotonic() + seconds
    select.select([life], [], [], seconds)
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)  # it has closed the pipe and not ended yet
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def main(request: dict[str, Any]) -> None:
    """Read the file of one request and print the answer."""
    _set_limits(request)
    try:
        output = _answer(request)
    except ReadError as error:
        output = _failure(error, request)
    except MemoryError:
        output = _failure(_too_large(request), request)
    except RecursionError:
        output = _failure(
            _damaged(f"{request['name']} could not be read: it is nested too deeply"), request
        )
    except Exception as error:  # any parser's own error: it is told, and this process ends
        told = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        told = told.replace(f"{type(error).__name__}: " * 2, f"{type(error).__name__}: ")
        output = _failure(_damaged(f"{request['name']} could not be read: {told}"), request)
    with contextlib.suppress(MemoryError):
        _write(output)


def _answer(request: dict[str, Any]) -> bytes:
    path, task = Path(request["path"]), request["task"]
    if task == "read":
        return _as_json(_read(path, request["name"]), request)
    pages = import_module("ingest.readers.page_image")
    if task == "render":
        png = pages.render_page(path, request["page"], request["scale"])
        return json.dumps({"png": base64.b64encode(png).decode()}).encode()
    boxes = pages.span_boxes(path, request["page"], request["start"], request["end"])
    return json.dumps({"boxes": boxes}).encode()


def _read(path: Path, name: str) -> CanonicalText:
    chosen = format_of_name(name) or sniff(path)
    if chosen is None:
        raise UnsupportedFormatError(
            f"no reader for {name!r}: its suffix is unknown and its content is no text",
            hint=f"convert it to one of: {' '.join(FORMATS)}",
        )
    read = getattr(import_module(f"ingest.readers.{chosen.module}"), chosen.function)
    content: CanonicalText = read(path, chosen.media_type)
    head = content.text[:_HEAD_CHARS]
    share = len(_UNREADABLE.findall(head)) / max(1, len(head))
    if share > _UNREADABLE_SHARE:
        raise UnsupportedFormatError(
            f"{name} holds no text: {share:.0%} of its characters are unreadable",
            hint="if it is text, save it as UTF-8; if it shows text on a screen, it needs OCR"
            " (for example with ocrmypdf)",
        )
    return content


def _as_json(content: CanonicalText, request: dict[str, Any]) -> bytes:
    # half a surrogate pair cannot be stored; one sign for one keeps every offset
    text = content.text if content.text.isascii() else _SURROGATE.sub("�", content.text)
    answer = {
        "text": text.replace("\x00", "�"),
        "media_type": content.media_type,
        "pages": [astuple(page) for page in content.pages],
        "sections": [astuple(section) for section in content.sections],
        "warnings": content.warnings,
    }
    output = json.dumps(answer, ensure_ascii=False).encode("utf-8", errors="replace")
    if len(output) > request["output_bytes"]:
        raise ReaderFailedError(
            f"{request['name']} holds more than {request['output_bytes'] // 2**20} MiB of text",
            hint="split the file, or raise FATHOM_READER_OUTPUT_BYTES",
        )
    return output


def _write(output: bytes) -> None:
    # what a parser printed stands above; the answer is the last line
    sys.stdout.flush()
    sys.stdout.buffer.write(b"\n" + output + b"\n")
    sys.stdout.buffer.flush()


def _failure(error: ReadError, request: dict[str, Any]) -> bytes:
    # the readers see the stored copy, whose name is its checksum
    message = error.message.replace(Path(request["path"]).name, request["name"])
    answer = {"error": type(error).__name__, "message": message, "hint": error.hint}
    return json.dumps(answer).encode()


def _too_large(request: dict[str, Any]) -> ReaderFailedError:
    return ReaderFailedError(
        f"{request['name']} needs more than {request['memory_bytes'] // 2**20} MiB to be read",
        hint="raise FATHOM_READER_MEMORY_BYTES, or split the file",
    )


def _damaged(message: str) -> ReaderFailedError:
    return ReaderFailedError(
        message, hint="the file is damaged or not what its name says; save it anew"
    )


def _set_limits(request: dict[str, Any]) -> None:
    _limit(resource.RLIMIT_AS, request["memory_bytes"])
    _limit(resource.RLIMIT_CPU, request["cpu_seconds"])
    _limit(resource.RLIMIT_CORE, 0)
    # an error of write() is told; the signal would only end the process
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _limit(resource.RLIMIT_FSIZE, request["output_bytes"] + 2**16)


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (soft, hard))
