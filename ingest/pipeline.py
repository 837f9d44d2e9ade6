"""The way of a document: copy, read, chunk, embed, commit."""

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ingest.chunking import chunk_text, embedded_text
from ingest.readers.guard import READERS, can_read, read_guarded
from rag.errors import (
    EmptyDocumentError,
    ReadError,
    SourceNotFoundError,
    StorageFullError,
)
from rag.retrieval.embedding import Embedder
from rag.settings import Settings
from rag.store.documents import DocumentStore, SourceFile
from rag.types import Document

COPY_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class IngestProgress:
    """`done` of `total` units of one stage: reading (files), embedding (chunks)."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class IngestResult:
    """What became of one file. `outcome` is added, new-version or known; `message` says it."""

    document: Document
    outcome: str
    message: str


OnProgress = Callable[[IngestProgress], None]


def ingest_file(
    path: Path,
    *,
    store: DocumentStore,
    embedder: Embedder,
    settings: Settings,
    source: str | None = None,
    title: str | None = None,
    on_progress: OnProgress | None = None,
) -> IngestResult:
    """Take one file into the library; when this returns it is on disk and searchable.

    Nothing is kept of a file that fails, and the same file may be given again at any time.

    Args:
        path: a regular file.
        store: where it goes.
        embedder: what its chunks are embedded with.
        settings: folders and limits.
        source: the identity whose versions are counted; by default the resolved path.
        title: the name shown; by default the file's.
        on_progress: called as the work goes on.

    Raises:
        ReadError: if it is missing, empty, encrypted, unreadable or of an unknown format.
        StorageFullError: if the disk is full.
    """
    title = title or path.name
    progress = on_progress or (lambda _: None)

    # 1. copy the bytes to the content-addressed store; known bytes stop here
    progress(IngestProgress("reading", 0, 1))
    original, file = _copy_original(path, source or str(path.resolve()), title, settings)
    known = store.recall(file)
    if known:
        return _known(known, file)
    try:
        # 2. read in a guarded process
        content = read_guarded(original, name=title, settings=settings)
        progress(IngestProgress("reading", 1, 1))

        # 3. chunk on the embedder's tokens
        chunks = chunk_text(
            content,
            title=title,
            token_offsets=embedder.token_offsets,
            max_tokens=min(settings.chunk_tokens, embedder.max_tokens),
        )

        # 4. embed
        progress(IngestProgress("embedding", 0, len(chunks)))
        vectors = embedder.embed(
            [embedded_text(title, chunk.heading_path, chunk.text) for chunk in chunks],
            on_progress=lambda done: progress(IngestProgress("embedding", done, len(chunks))),
        )

        # 5. one transaction; its commit is the acknowledgement
        document = store.save(file, content, chunks, vectors, embedder=embedder.fingerprint)
    except BaseException:
        if store.by_content(file.content_sha256) is None:
            original.unlink(missing_ok=True)
        raise
    if document.version > 1:
        message = f"{title}: version {document.version} as document {document.id}"
        return IngestResult(document, "new-version", f"{message}; older ones stay citable")
    return IngestResult(document, "added", f"{title}: added as document {document.id}")


def delete_document(document: Document, *, store: DocumentStore, settings: Settings) -> None:
    """Delete a document and its original bytes."""
    store.delete(document.id)
    original_path(settings, document.content_sha256).unlink(missing_ok=True)


def original_path(settings: Settings, content_sha256: str) -> Path:
    """Return where the bytes with this checksum lie."""
    return settings.originals_dir / content_sha256[:2] / content_sha256


def find_files(paths: list[Path]) -> Iterator[Path | ReadError]:
    """Yield each file to ingest; folders are walked in order, symbolic links are not followed.

    A path that is missing or holds nothing readable gives its error in its place, so that the
    other paths are still taken.
    """
    for path in paths:
        if path.is_dir():
            files = sorted(p for p in _walk(path) if can_read(p))
            if not files:
                yield EmptyDocumentError(
                    f"the folder {path} holds no file that can be read",
                    hint=f"expected files that end in {' '.join(READERS)}",
                )
            yield from files
        elif not path.exists():
            yield SourceNotFoundError(
                f"there is no file {path}", hint="check the spelling; expected a file or a folder"
            )
        else:
            yield path


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(root, name)
            if not name.startswith(".") and not path.is_symlink():
                yield path


def _known(known: Document, file: SourceFile) -> IngestResult:
    where = "" if known.source == file.source else f", ingested from {known.source}"
    message = f"{file.title}: same content as document {known.id} {known.title!r}{where}"
    return IngestResult(known, "known", message)


def _copy_original(
    path: Path, source: str, title: str, settings: Settings
) -> tuple[Path, SourceFile]:
    """Copy the file by its checksum; what is parsed is the copy, which cannot change any more."""
    settings.originals_dir.mkdir(parents=True, exist_ok=True)
    temporary = settings.originals_dir / f"incoming-{os.getpid()}-{os.urandom(4).hex()}"
    digest, size = hashlib.sha256(), 0
    try:
        with _open_regular(path) as reader, temporary.open("wb") as writer:
            if os.fstat(reader.fileno()).st_size > settings.max_file_bytes:
                raise ReadError(
                    f"{title} is larger than {settings.max_file_bytes // 2**20} MiB",
                    hint="raise FATHOM_MAX_FILE_BYTES, or split the file",
                )
            while block := reader.read(COPY_BYTES):
                digest.update(block)
                size += len(block)
                writer.write(block)
            writer.flush()
            os.fsync(writer.fileno())
        if size == 0:
            raise EmptyDocumentError(
                f"{title} is empty (0 bytes)", hint="give a file that holds text"
            )
        file = SourceFile(source, title, digest.hexdigest(), size)
        original = original_path(settings, file.content_sha256)
        original.parent.mkdir(exist_ok=True)
        temporary.replace(original)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFullError(
                f"the disk is full: {title} could not be copied; nothing was kept of it",
                hint="free some space or give another --home, then run the same command again",
            ) from error
        raise ReadError(
            f"{path} cannot be read: {error.strerror}", hint="check its permissions"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return original, file


def _open_regular(path: Path) -> BinaryIO:
    """Open a regular file; a pipe, a device or a folder is refused."""
    if not path.exists():
        raise SourceNotFoundError(f"there is no file {path}", hint="check the spelling")
    if not stat.S_ISREG(path.stat().st_mode):
        raise SourceNotFoundError(
            f"{path} is not a regular file", hint="give a file, or a folder of files"
        )
    return path.open("rb")
