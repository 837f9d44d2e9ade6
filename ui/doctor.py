"""Does everything agree? Finds what is wrong in the installation and the library, and mends it."""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ingest.originals import is_ingesting
from ingest.pipeline import original_path
from ingest.reindex import embed_chunks, reread_document
from rag.errors import DocumentNotFoundError, FathomError
from rag.lm.engine import model_named
from rag.runtime import check_one_faiss
from rag.store.access import EVERY_OWNER
from rag.store.integrity import StoreIntegrity
from rag.store.oplog import OpLog
from rag.store.receipts import ReceiptStore
from rag.types import Document
from ui.assembly import Fathom

FIRST_SOUND_SQLITE = (3, 51, 3)
PROBLEMS_SHOWN = 5
CHUNKS_PER_REPAIR = 1_000


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at; `repairable` says that `--repair` mends it.

    `about` is "installation" or "library"; the library is consistent if all of its checks pass.
    """

    name: str
    about: str
    passed: bool
    detail: str
    repairable: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the object that `fathom doctor --json` prints on one line."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Problem:
    """One inconsistency: what it is, and what mends it; None where only a person can."""

    detail: str
    mend: Callable[[], object] | None


def examine(fathom: Fathom) -> Iterator[Check]:
    """Yield every check in turn; the library is not changed."""
    yield from _installation(fathom)
    yield from examine_library(fathom)


def examine_library(fathom: Fathom) -> Iterator[Check]:
    """Yield the checks of the library alone: store, lexical index, FAISS and files agree."""
    for name, find, fine in _LIBRARY:
        problems = _problems(find, fathom)
        shown = list(islice(problems, PROBLEMS_SHOWN))
        num_more = sum(1 for _ in problems)
        details = [problem.detail for problem in shown] + [f"and {num_more} more"] * bool(num_more)
        repairable = any(problem.mend is not None for problem in shown)
        detail = "; ".join(details) or fine(fathom)
        yield Check(name, "library", not shown, detail, repairable)


def repair(fathom: Fathom) -> Iterator[str]:
    """Mend what can be mended from what is right; yield a sentence for each thing done.

    Two rounds, because one repair can lay open the next: a document that was read anew has new
    vectors, which the index has to follow.
    """
    for _ in range(2):
        for name, find, _fine in _LIBRARY:
            tried: list[Callable[[], object]] = []
            for problem in list(_problems(find, fathom)):
                if problem.mend is None or problem.mend in tried:
                    continue  # one rebuilding mends all that it concerns
                tried.append(problem.mend)
                try:
                    problem.mend()
                except FathomError as error:
                    yield f"{name}: {problem.detail}; not mended: {error.message}"
                else:
                    yield f"{name}: {problem.detail}; mended"
    fathom.database.erase_deleted()
    fathom.lexical.erase_deleted()


def _problems(find: Callable[[Fathom], Iterator[Problem]], fathom: Fathom) -> Iterator[Problem]:
    """Yield the problems; one that keeps the rest from being looked for is the last."""
    try:
        yield from find(fathom)
    except FathomError as error:
        yield Problem(f"{error.message}; {error.hint}", None)


# ---- the installation -------------------------------------------------------------------------


def _installation(fathom: Fathom) -> Iterator[Check]:
    about = "installation"
    yield Check("python", about, True, f"{platform.python_version()} on {platform.machine()}")
    try:
        yield Check("faiss", about, True, check_one_faiss())
    except FathomError as error:
        yield Check("faiss", about, False, f"{error.message}; {error.hint}")
    kind, version = fathom.database.kind, fathom.database.server_version
    sound = kind != "sqlite" or version >= FIRST_SOUND_SQLITE
    caution = "" if sound else ": before 3.51.3, keep to one process that writes"
    yield Check(kind, about, True, f"{'.'.join(map(str, version))}{caution}")
    from rag.lm.catalog import resolve_model

    for use, name in (("embedder", fathom.settings.embedder), ("model", fathom.settings.model)):
        try:
            changed = _changed_files(resolve_model(name, fathom.settings))
            told = f"{name} is here"
            if changed:
                told = (
                    f"not as it was fetched: {changed}; delete it, then fathom models fetch {name}"
                )
            yield Check(use, about, not changed, told)
        except FathomError as error:
            yield Check(use, about, False, f"{error.message}; {error.hint}")
    if fathom.settings.decode_weights == "4-bit":
        yield _four_bits(fathom)


def _changed_files(folder: Path) -> str:
    """Return the files of a fetched model that are not as they were fetched or converted.

    A folder of one's own has no checksums; of what an earlier version fetched, safetensors that it
    converted have none.

    Raises:
        BrokenModelError: if weights with a checksum of their own are not those that were written.
    """
    from rag.lm.catalog import MANIFEST_NAME
    from rag.lm.weights_checksum import checked_weights

    manifest = folder / MANIFEST_NAME
    if not manifest.is_file():
        return ""
    changed = []
    noted = json.loads(manifest.read_text(encoding="utf-8"))
    for name, sha256 in (noted["source"] | noted.get("sha256", {})).items():
        path = folder / name
        if path.is_file():
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    changed.append(str(path))
    for path in sorted(folder.glob("*.weights")):
        checked_weights(path)
    return ", ".join(changed)


def _four_bits(fathom: Fathom) -> Check:
    """Say whether 4-bit weights, which were asked for, are there for this model and device."""
    try:
        name = fathom.engine.name
    except FathomError as error:
        return Check("4-bit weights", "installation", False, f"{error.message}; {error.hint}")
    missing = "" if model_named(name) != name else "; it has none for this device: the stored ones"
    return Check("4-bit weights", "installation", True, f"{name}{missing}")


# ---- the store --------------------------------------------------------------------------------


def _database(fathom: Fathom) -> Iterator[Problem]:
    wrong = fathom.database.integrity_problem()
    if wrong and "fts" not in wrong:  # newer SQLite checks the full-text rows along with it
        yield Problem(f"{wrong}: restore a backup, or ingest into a new --home", None)


def _rows(fathom: Fathom) -> Iterator[Problem]:
    integrity = StoreIntegrity(fathom.database)
    for name in integrity.missing_triggers():
        yield Problem(f"the trigger {name} is missing", integrity.restore_triggers)
    for table, number in integrity.orphans().items():
        yield Problem(
            f"{number} rows of {table} belong to nothing that exists", integrity.delete_orphans
        )
    for number in integrity.nameless():
        yield Problem(
            f"no name stands for document {number}", partial(integrity.restore_name, number)
        )
    beyond = integrity.log_floor_beyond_end()
    if beyond:
        floor, last = beyond
        yield Problem(
            f"the op-log's floor {floor} lies beyond its last entry {last}",
            integrity.lower_log_floor,
        )


def _lexical(fathom: Fathom) -> Iterator[Problem]:
    integrity = StoreIntegrity(fathom.database)

    def mend_scopes() -> None:
        integrity.restore_scopes()
        fathom.lexical.rebuild()

    for number in integrity.wrong_scopes():
        yield Problem(f"chunks of document {number} are searched as another's", mend_scopes)
    wrong = fathom.lexical.check()
    if wrong:
        yield Problem(f"differs from the chunks: {wrong}", fathom.lexical.rebuild)


def _originals(fathom: Fathom) -> Iterator[Problem]:
    settings = fathom.settings
    known = set()
    for document in fathom.everything.all(include_superseded=True):
        path = original_path(settings, document.content_sha256)
        known.add(path)
        if _sha256(path) != document.content_sha256 and _is_there(document, fathom):
            yield _lost_original(document, path)
    if is_ingesting(settings):
        return  # what another process is copying now belongs to no document yet
    for path in settings.originals_dir.rglob("*"):
        if not path.is_dir() and path not in known:
            yield Problem(f"{path.relative_to(settings.home)} belongs to no document", path.unlink)


def _lost_original(document: Document, path: Path) -> Problem:
    what = "has changed" if path.exists() else "is missing"
    detail = f"the original file of document {document.id} {document.title!r} {what}"
    source = Path(document.source)
    if _sha256(source) != document.content_sha256:
        return Problem(f"{detail}: give the same file to fathom ingest again", None)

    def copy_back() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"incoming-{os.getpid()}")
        shutil.copyfile(source, temporary)
        temporary.replace(path)

    return Problem(detail, copy_back)


def _texts(fathom: Fathom) -> Iterator[Problem]:
    for document in fathom.everything.all(include_superseded=True):
        wrong = _wrong_with(document, fathom)
        if wrong is None or not _is_there(document, fathom):
            continue
        detail = f"document {document.id} {document.title!r}: {wrong}"
        original = original_path(fathom.settings, document.content_sha256)
        if _sha256(original) != document.content_sha256:
            advice = f"fathom delete {document.id}, then fathom ingest the file"
            yield Problem(f"{detail}; its original is gone: {advice}", None)
            continue
        yield Problem(
            f"{detail}; to be read anew from its original",
            partial(_read_anew, document, fathom),
        )


def _read_anew(document: Document, fathom: Fathom) -> None:
    reread_document(
        document, store=fathom.everything, embedder=fathom.embedder, settings=fathom.settings
    )


def _wrong_with(document: Document, fathom: Fathom) -> str | None:
    """Return what of a document's own parts does not fit together, or None."""
    text = fathom.everything.text(document.id)
    if len(text) != document.num_chars:
        return f"its text has {len(text):,} characters instead of {document.num_chars:,}"
    chunks = [stored.chunk for stored in fathom.everything.chunks_of(document.id)]
    if len(chunks) != document.num_chunks:
        return f"it has {len(chunks):,} chunks instead of {document.num_chunks:,}"
    for ordinal, chunk in enumerate(chunks):
        if chunk.ordinal != ordinal:
            return f"its chunk {ordinal} is missing"
        if text[chunk.start : chunk.end] != chunk.text:
            return f"its chunk {ordinal} is not the text at {chunk.start}"
    pages = fathom.everything.pages(document.id)
    if [page.number for page in pages] != list(range(1, document.num_pages + 1)):
        return f"it has {len(pages):,} pages instead of {document.num_pages:,}"
    starts = [section.start for section in fathom.everything.sections(document.id)]
    ends = [page.end for page in pages]
    if max([0, *starts, *ends]) > len(text):
        return "its pages or sections lie beyond its text"
    return None


def _receipts(fathom: Fathom) -> Iterator[Problem]:
    receipts = ReceiptStore(fathom.database, EVERY_OWNER)
    for receipt, number in receipts.quoting_the_deleted():
        yield Problem(
            f"receipt {receipt} still has words of document {number}, which was deleted",
            partial(receipts.redact_deleted, number),
        )


# ---- vectors and index ------------------------------------------------------------------------


def _vectors(fathom: Fathom) -> Iterator[Problem]:
    embedder = fathom.embedder
    active = fathom.everything.active_embedder()
    if active not in (None, embedder.fingerprint):
        advice = f"set FATHOM_EMBEDDER back, or re-embed the library with {embedder.fingerprint}"
        yield Problem(f"the library is searched with {active}: {advice}", None)
        return
    bad = StoreIntegrity(fathom.database).bad_vectors(embedder.fingerprint, embedder.dim)
    while part := list(islice(bad, CHUNKS_PER_REPAIR)):
        shown = ", ".join(f"chunk {chunk_id} {wrong}" for chunk_id, wrong in part[:3])
        more = f" and {len(part) - 3} others" if len(part) > 3 else ""
        ids = [chunk_id for chunk_id, _ in part]
        yield Problem(shown + more, partial(_embed_anew, ids, fathom))


def _vectors_in_words(fathom: Fathom) -> str:
    others = StoreIntegrity(fathom.database).num_vectors_of_others(fathom.embedder.fingerprint)
    beside = f"; {others:,} of an unfinished re-embedding lie beside them" if others else ""
    return f"every chunk has one, of unit length{beside}"


def _embed_anew(chunk_ids: list[int], fathom: Fathom) -> None:
    chunks = list(fathom.everything.chunks(chunk_ids).values())
    vectors = embed_chunks(fathom.everything, fathom.embedder, chunks)
    ids, name = [stored.id for stored in chunks], fathom.embedder.fingerprint
    fathom.everything.add_vectors(name, ids, vectors)
    OpLog(fathom.database, name).announce(changed=ids, gone=[])


def _snapshots(fathom: Fathom) -> Iterator[Problem]:
    for complaint in fathom.index.bad_snapshots():
        yield Problem(complaint, fathom.index.rebuild)


def _index(fathom: Fathom) -> Iterator[Problem]:
    index = fathom.index
    index.catch_up()
    found = index.differences()
    wrong, foreign = set(found.wrong), set(found.foreign)
    if wrong or foreign:
        # another process may have written meanwhile: what is wrong stays wrong after catching up
        index.catch_up()
        found = index.differences()
        wrong &= set(found.wrong)
        foreign &= set(found.foreign)

    def mend() -> None:
        log = OpLog(fathom.database, fathom.embedder.fingerprint)
        log.announce(changed=sorted(wrong), gone=sorted(foreign))  # for other processes
        index.rebuild()

    if wrong:
        yield Problem(f"{len(wrong)} vectors are missing or differ from the stored ones", mend)
    if foreign:
        yield Problem(f"{len(foreign)} vectors belong to no chunk", mend)


def _index_in_words(fathom: Fathom) -> str:
    index = fathom.index
    recall = "exact" if index.recall_at_10 is None else f"recall@10 {index.recall_at_10:.3f}"
    return f"{index.num_vectors:,} vectors equal the stored ones; {index.kind}, {recall}"


# ---- files ------------------------------------------------------------------------------------


def _leftovers(fathom: Fathom) -> Iterator[Problem]:
    home = fathom.settings.home
    if is_ingesting(fathom.settings):
        return
    sources = {document.source for document in fathom.everything.all(include_superseded=True)}
    for folder in ("tmp", "samples"):
        for path in (home / folder).rglob("*"):
            if not path.is_dir() and str(path.resolve()) not in sources:
                yield Problem(f"{path.relative_to(home)} was left over", path.unlink)


def _document_kv(fathom: Fathom) -> Iterator[Problem]:
    known = {document.version_key for document in fathom.everything.all(include_superseded=True)}
    for path, wrong in fathom.document_kv.strays(known):
        name = path.relative_to(fathom.settings.home)
        yield Problem(f"{name} {wrong}", partial(path.unlink, missing_ok=True))


def _is_there(document: Document, fathom: Fathom) -> bool:
    """Whether a document that looks wrong was not just deleted by another process."""
    try:
        fathom.everything.find(str(document.id))
    except DocumentNotFoundError:
        return False
    return True


def _sha256(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


_Find = Callable[[Fathom], Iterator[Problem]]
_Fine = Callable[[Fathom], str]

# In this order: what is mended above is right for what comes below.
_LIBRARY: tuple[tuple[str, _Find, _Fine], ...] = (
    ("database", _database, lambda _: "its structure is sound"),
    ("rows", _rows, lambda _: "each belongs to something, every document has a name"),
    ("lexical index", _lexical, lambda _: "equals the chunks"),
    ("original files", _originals, lambda _: "have their checksums, and none is too many"),
    (
        "texts",
        _texts,
        lambda f: f"{f.everything.num_chunks():,} chunks are the text at their places",
    ),
    ("receipts", _receipts, lambda _: "quote no deleted document"),
    ("vectors", _vectors, _vectors_in_words),
    ("index snapshots", _snapshots, lambda _: "their checksums are right"),
    ("vector index", _index, _index_in_words),
    ("document KV", _document_kv, lambda _: "every file is whole and of a document that is there"),
    ("leftover files", _leftovers, lambda _: "there are none"),
)
