"""The guarded process: set the limits, read one file, print one JSON object."""

import json
import resource
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rag.errors import ReaderFailedError, ReadError
from rag.types import CanonicalText


def main(request_json: str) -> None:
    """Answer one request of `guard.read_guarded` on stdout."""
    request = json.loads(request_json)
    _limit(resource.RLIMIT_AS, request["memory_bytes"])
    _limit(resource.RLIMIT_CPU, request["cpu_seconds"])
    _limit(resource.RLIMIT_CORE, 0)
    try:
        answer = asdict(_read(request["reader"], Path(request["path"])))
    except ReadError as error:
        answer = _failure(error, request)
    except MemoryError:
        mebibytes = request["memory_bytes"] // 2**20
        answer = _failure(
            ReaderFailedError(
                f"{request['name']} needs more than {mebibytes} MiB to be read",
                hint="raise FATHOM_READER_MEMORY_BYTES, or split the file",
            ),
            request,
        )
    except Exception as error:  # any parser's own error: it is told, and this process ends
        answer = _failure(
            ReaderFailedError(
                f"{request['name']} could not be read: {type(error).__name__}: {error}",
                hint="the file is damaged or not what its name says; save it anew",
            ),
            request,
        )
    sys.stdout.write(json.dumps(answer) + "\n")


def _read(reader: str, path: Path) -> CanonicalText:
    if reader == "pdf":
        from ingest.readers.pdf import read_pdf

        return read_pdf(path)
    if reader == "html":
        from ingest.readers.web import read_html

        return read_html(path)
    from ingest.readers.text import read_markdown, read_text

    return read_markdown(path) if reader == "markdown" else read_text(path)


def _failure(error: ReadError, request: dict[str, Any]) -> dict[str, str]:
    # the readers see the stored copy, whose name is its checksum
    message = error.message.replace(Path(request["path"]).name, request["name"])
    return {"error": type(error).__name__, "message": message, "hint": error.hint}


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (soft, hard))
