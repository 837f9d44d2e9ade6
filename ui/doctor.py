"""Does everything agree? Checks of the installation, the store and what derives from it."""

import hashlib
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ingest.pipeline import original_path
from rag.errors import FathomError
from rag.runtime import check_one_faiss
from ui.assembly import Fathom

FIRST_SOUND_SQLITE = (3, 51, 3)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at; `repairable` says that `--repair` mends it."""

    name: str
    passed: bool
    detail: str
    repairable: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the object that `fathom doctor --json` prints on one line."""
        return asdict(self)


def examine(fathom: Fathom) -> Iterator[Check]:
    """Yield every check in turn; nothing is changed."""
    yield from _installation(fathom)
    yield _database(fathom)
    yield _texts(fathom)
    yield _originals(fathom)
    wrong = fathom.lexical.check()
    yield Check("lexical index", wrong is None, wrong or "equals the chunks", repairable=True)
    yield from _vectors(fathom)


def repair(fathom: Fathom) -> None:
    """Rebuild what derives from the store, and remove files that belong to no document."""
    fathom.lexical.rebuild()
    fathom.index.rebuild()
    known = {d.content_sha256 for d in fathom.store.all(include_superseded=True)}
    for path in fathom.settings.originals_dir.glob("*/*"):
        if path.name not in known:
            path.unlink()


def _installation(fathom: Fathom) -> Iterator[Check]:
    yield Check("python", True, f"{platform.python_version()} on {platform.machine()}")
    try:
        yield Check("faiss", True, check_one_faiss())
    except FathomError as error:
        yield Check("faiss", False, f"{error.message}; {error.hint}")
    kind, version = fathom.database.kind, fathom.database.server_version
    sound = kind != "sqlite" or version >= FIRST_SOUND_SQLITE
    caution = "" if sound else ": before 3.51.3, keep to one process that writes"
    yield Check(kind, True, f"{'.'.join(map(str, version))}{caution}")
    from rag.lm.catalog import resolve_model

    for use, name in (("embedder", fathom.settings.embedder), ("model", fathom.settings.model)):
        try:
            resolve_model(name, fathom.settings)
            yield Check(use, True, f"{name} is here")
        except FathomError as error:
            yield Check(use, False, f"{error.message}; {error.hint}")


def _database(fathom: Fathom) -> Check:
    wrong = fathom.database.integrity_problem()
    return Check("database", wrong is None, wrong or "ok")


def _texts(fathom: Fathom) -> Check:
    wrong = []
    documents = fathom.store.all(include_superseded=True)
    for document in documents:
        text = fathom.store.text(document.id)
        chunks = fathom.store.chunks_of(document.id)
        torn = len(chunks) != document.num_chunks or len(text) != document.num_chars
        if torn or any(text[c.chunk.start : c.chunk.end] != c.chunk.text for c in chunks):
            wrong.append(str(document.id))
    detail = f"documents {', '.join(wrong)} differ from their chunks: delete and ingest them anew"
    return Check("texts", not wrong, detail if wrong else f"{len(documents)} documents are whole")


def _originals(fathom: Fathom) -> Check:
    known = {d.content_sha256: d.id for d in fathom.store.all(include_superseded=True)}
    problems = []
    for sha256, number in known.items():
        path = original_path(fathom.settings, sha256)
        if not path.is_file():
            problems.append(f"document {number} has lost its original file")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            problems.append(f"the original file of document {number} has changed")
    strays = [p for p in fathom.settings.originals_dir.glob("*/*") if p.name not in known]
    if strays:
        problems.append(f"{len(strays)} files belong to no document")
    detail = "; ".join(problems) or f"{len(known)} files have their checksums"
    return Check("original files", not problems, detail, repairable=bool(strays))


def _vectors(fathom: Fathom) -> Iterator[Check]:
    try:
        index = fathom.index
    except FathomError as error:
        yield Check("vector index", False, f"{error.message}; {error.hint}")
        return
    bad = index.bad_snapshots()
    detail = "; ".join(bad) or "checksums are right"
    yield Check("index snapshots", not bad, detail, repairable=True)
    index.catch_up()
    documents = [d.id for d in fathom.store.all(include_superseded=True)]
    stored, indexed = set(fathom.store.chunk_ids(documents)), index.ids()
    if stored != indexed:
        missing, foreign = len(stored - indexed), len(indexed - stored)
        detail = f"{missing} chunks are missing, {foreign} are not in the store"
        yield Check("vector index", False, detail, repairable=True)
        return
    lengths = [float(np.linalg.norm(index.vectors([i])[1][0])) for i in sorted(indexed)[:1000]]
    unit = all(abs(length - 1) < 1e-3 for length in lengths)
    detail = f"{len(indexed)} vectors equal the chunks"
    yield Check("vector index", unit, detail if unit else "vectors are not of unit length", True)
