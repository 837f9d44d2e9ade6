"""Files that a request brings: copied to where the library reads them, under the names they had."""

import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fastapi import UploadFile

from ingest.sources import SourceToRead
from rag.errors import QuotaError
from rag.settings import Settings

MOST_UPLOADS = 100  # files in one request


def keep_uploads(
    settings: Settings, files: Sequence[UploadFile], collection: str | None
) -> tuple[Path, list[SourceToRead]]:
    """Copy uploads into a folder of their own, which the caller removes; return both.

    Raises:
        QuotaError: if they are too many for one request.
    """
    if len(files) > MOST_UPLOADS:
        raise QuotaError(
            f"{len(files)} files in one request; at most {MOST_UPLOADS} are taken",
            hint="send them in several requests",
        )
    scratch = settings.home / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=scratch, prefix="upload-"))
    sources = []
    try:
        for place, file in enumerate(files):
            name, path = upload_name(file.filename), folder / str(place)
            with path.open("wb") as copy:
                shutil.copyfileobj(file.file, copy)
            into = (collection or "").strip() or None
            sources.append(SourceToRead(path, f"upload:{name}", name, into))
    except BaseException:
        shutil.rmtree(folder)
        raise
    return folder, sources


def upload_name(given: str | None) -> str:
    """Return an upload's name, with the folders it lay in: docs/README.md is not src/README.md.

    It is a name and no path: nothing is ever opened by it.
    """
    parts = re.split(r"[\\/]+", given or "")
    return (
        "/".join(p for p in parts if p not in ("", ".", "..") and not p.endswith(":")) or "upload"
    )
