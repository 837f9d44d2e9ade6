"""The way of a document: copy, read, chunk, embed, commit.

The embedder is what takes time, so it never waits: the next documents are copied, read and chunked
in other threads while it works, and finished ones are committed in another.
"""

import errno
import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ingest.chunking import chunk_text, embedded_text
from ingest.readers.guard import read_guarded
from ingest.sources import SourceToRead, open_regular
from rag.errors import EmptyDocumentError, FathomError, ReadError, StorageFullError
from rag.retrieval.embedding import Embedder, FloatArray
from rag.settings import Settings
from rag.store.documents import DocumentStore, SourceFile
from rag.types import CanonicalText, Chunk, Document, IngestProgress

COPY_BYTES = 2**20
# Short documents are embedded together until they make this many chunks: a batch of one chunk
# would leave most of the processor idle.
GROUP_CHUNKS = 256
# Documents that may lie read and chunked in memory while others are embedded.
READ_AHEAD = 4


@dataclass(frozen=True, slots=True)
class IngestResult:
    """What became of one file. `outcome` is added, new-version or known; `message` says it."""

    document: Document
    outcome: str
    message: str


@dataclass(frozen=True, slots=True)
class IngestFailure:
    """A file that could not be taken, and why; nothing of it was kept."""

    title: str
    error: FathomError


OnProgress = Callable[[IngestProgress], None]


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A document that is read and chunked; its bytes lie at `copy` until it is committed."""

    copy: Path
    file: SourceFile
    content: CanonicalText
    chunks: list[Chunk]
    collections: tuple[str, ...]


def ingest_files(
    sources: Sequence[SourceToRead | ReadError],
    *,
    store: DocumentStore,
    embedder: Embedder,
    settings: Settings,
    on_progress: OnProgress = lambda _: None,
) -> Iterator[IngestResult | IngestFailure]:
    """Take files into the library, yielding what became of each, in order.

    When a result is yielded, its document is on disk and searchable. Nothing is kept of a file that
    fails, and the same files may be given again at any time: what is stored is known, so an ingest
    that was killed goes on where it was.

    Args:
        sources: the files, and in their places the errors of those that could not be found.
        store: where they go.
        embedder: what their chunks are embedded with.
        settings: folders and limits.
        on_progress: called as the work goes on.

    Raises:
        StorageFullError: if the disk is full; what was yielded before is kept.
        StoreError: if the library cannot be written.
    """
    counter = _Counter(sources, on_progress)
    waiting = deque(sources)
    ahead: deque[tuple[SourceToRead | ReadError, Future[_Prepared | IngestResult]]] = deque()
    committing: deque[Future[IngestResult]] = deque()
    with (
        ThreadPoolExecutor(settings.num_readers, "reader") as readers,
        ThreadPoolExecutor(1, "committer") as committer,
    ):
        try:
            while waiting or ahead:
                # 1-3. copy, read in a guarded process, chunk: in other threads, ahead of need
                while waiting and len(ahead) < max(READ_AHEAD, settings.num_readers):
                    source = waiting.popleft()
                    task = readers.submit(_prepare, source, store, embedder, settings)
                    ahead.append((source, task))
                group: list[_Prepared] = []
                other: IngestResult | IngestFailure | None = None
                while ahead and other is None and _num_chunks(group) < GROUP_CHUNKS:
                    source, task = ahead[0]
                    if not task.done():
                        if group:
                            break
                        counter.reading(source)
                    try:
                        ready = task.result()
                    except ReadError as error:
                        other = IngestFailure(getattr(source, "title", ""), error)
                    else:
                        if isinstance(ready, _Prepared):
                            group.append(ready)
                        else:
                            other = ready
                    ahead.popleft()

                # 4. embed
                for prepared, vectors in _embed(group, embedder, counter):
                    # 5. commit in another thread; its end is the acknowledgement
                    committing.append(
                        committer.submit(_commit, prepared, vectors, store, embedder, settings)
                    )

                while committing and (other or committing[0].done()):
                    yield committing.popleft().result()
                if other:
                    counter.skipped(source)
                    yield other
            while committing:
                yield committing.popleft().result()
        finally:  # a full disk, or a caller that stops: what is under way ends, the rest is dropped
            _drop(ahead)


def delete_documents(
    documents: Sequence[Document], *, store: DocumentStore, settings: Settings
) -> None:
    """Delete documents, their original bytes, and their sources where those lie in the library."""
    for document in documents:
        store.delete(document.id)
    remove_originals(documents, settings)


def remove_originals(documents: Sequence[Document], settings: Settings) -> None:
    """Remove the files of documents that the store holds no more."""
    for document in documents:
        original_path(settings, document.content_sha256).unlink(missing_ok=True)
        source = Path(document.source)
        if source.is_relative_to(settings.home.resolve()):  # the sample
            source.unlink(missing_ok=True)


def original_path(settings: Settings, content_sha256: str) -> Path:
    """Return where the bytes with this checksum lie."""
    return settings.originals_dir / content_sha256[:2] / content_sha256


# ---- the steps ----------------------------------------------------------------------------------


def _prepare(
    source: SourceToRead | ReadError, store: DocumentStore, embedder: Embedder, settings: Settings
) -> _Prepared | IngestResult:
    """Copy, read and chunk one file; a known one stops after the copy."""
    if isinstance(source, ReadError):
        raise source
    copy, file = _copy(source, settings)
    collections = (source.collection,) if source.collection else ()
    try:
        if known := store.recall(file, collections=collections):
            _put_in_place(copy, file, settings)  # a lost or damaged original is whole again
            return _known(known, file)
        content = read_guarded(copy, name=source.title, settings=settings)
        chunks = chunk_text(
            content,
            title=source.title,
            token_offsets=embedder.token_offsets,
            max_tokens=min(settings.chunk_tokens, embedder.max_tokens),
        )
    except BaseException:
        copy.unlink(missing_ok=True)
        raise
    return _Prepared(copy, file, content, chunks, collections)


def _embed(
    group: list[_Prepared], embedder: Embedder, counter: "_Counter"
) -> Iterator[tuple[_Prepared, FloatArray]]:
    """Yield each document with its vectors, float32 [its chunks, dim], all embedded together."""
    if not group:
        return
    texts = [
        embedded_text(prepared.file.title, chunk.heading_path, chunk.text)
        for prepared in group
        for chunk in prepared.chunks
    ]
    counter.embedding(group, 0)
    vectors = embedder.embed(texts, on_progress=lambda done: counter.embedding(group, done))
    counter.embedded(group)
    start = 0
    for prepared in group:
        yield prepared, vectors[start : start + len(prepared.chunks)]
        start += len(prepared.chunks)


def _commit(
    prepared: _Prepared,
    vectors: FloatArray,
    store: DocumentStore,
    embedder: Embedder,
    settings: Settings,
) -> IngestResult:
    """Put the copied bytes in their place and everything else into one transaction."""
    file = prepared.file
    try:
        _put_in_place(prepared.copy, file, settings)
        document = store.save(
            file,
            prepared.content,
            prepared.chunks,
            vectors,
            embedder=embedder.fingerprint,
            collections=prepared.collections,
        )
    except BaseException:
        prepared.copy.unlink(missing_ok=True)
        if store.by_content(file.content_sha256) is None:
            original_path(settings, file.content_sha256).unlink(missing_ok=True)
        raise
    if document.source != file.source:  # the same content came under another name meanwhile
        return _known(document, file)
    if document.version > 1:
        message = f"{file.title}: version {document.version} as document {document.id}"
        return IngestResult(document, "new-version", f"{message}; older ones stay citable")
    return IngestResult(document, "added", f"{file.title}: added as document {document.id}")


def _put_in_place(copy: Path, file: SourceFile, settings: Settings) -> None:
    original = original_path(settings, file.content_sha256)
    original.parent.mkdir(exist_ok=True)
    copy.replace(original)


def _drop(
    ahead: Iterable[tuple[SourceToRead | ReadError, Future[_Prepared | IngestResult]]],
) -> None:
    """Call off what was to be read; what is being read already is waited for and thrown away."""
    for _, task in ahead:
        task.cancel()
    for _, task in ahead:
        if not task.cancelled() and task.exception() is None:
            left = task.result()
            if isinstance(left, _Prepared):
                left.copy.unlink(missing_ok=True)


def _num_chunks(group: Iterable[_Prepared]) -> int:
    return sum(len(prepared.chunks) for prepared in group)


def _known(known: Document, file: SourceFile) -> IngestResult:
    same_name = known.source == file.source
    where = f", version {known.version}" if same_name else f", ingested from {known.source}"
    message = f"{file.title}: same content as document {known.id} {known.title!r}{where}"
    return IngestResult(known, "known", message)


def _copy(source: SourceToRead, settings: Settings) -> tuple[Path, SourceFile]:
    """Copy the bytes; what is parsed is the copy, which cannot change any more."""
    copy = settings.originals_dir / f"incoming-{os.getpid()}-{os.urandom(4).hex()}"
    digest, size = hashlib.sha256(), 0
    try:
        settings.originals_dir.mkdir(parents=True, exist_ok=True)
        with open_regular(source.path) as reader, copy.open("wb") as writer:
            while block := reader.read(COPY_BYTES):
                size += len(block)
                if size > settings.max_file_bytes:
                    raise ReadError(
                        f"{source.title} is larger than {settings.max_file_bytes // 2**20} MiB",
                        hint="raise FATHOM_MAX_FILE_BYTES, or split the file",
                    )
                digest.update(block)
                writer.write(block)
            writer.flush()
            os.fsync(writer.fileno())
        if size == 0:
            raise EmptyDocumentError(
                f"{source.title} is empty (0 bytes)", hint="give a file that holds text"
            )
    except BaseException as error:
        copy.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFullError(
                f"the disk is full: {source.title} could not be copied; nothing was kept of it",
                hint="free some space or give another --home, then run the same command again",
            ) from error
        raise ReadError(
            f"{source.title} cannot be read: {error.strerror}", hint="check its permissions"
        ) from error
    return copy, SourceFile(source.source, source.title, digest.hexdigest(), size)


class _Counter:
    """Turns what the steps report into IngestProgress."""

    def __init__(
        self, sources: Iterable[SourceToRead | ReadError], on_progress: OnProgress
    ) -> None:
        found = [source for source in sources if isinstance(source, SourceToRead)]
        self._total_bytes = sum(_num_bytes(source) for source in found)
        self._num_files = len(found)
        self._on_progress = on_progress
        self._begun = time.monotonic()
        self._files = self._pages = self._chunks = self._bytes = 0
        self._skipped_bytes = 0  # they cost no embedding, so they say nothing of the time left

    def reading(self, source: SourceToRead | ReadError) -> None:
        if isinstance(source, SourceToRead):
            self._tell("reading", source.title, 0, 0, 0)

    def skipped(self, source: SourceToRead | ReadError) -> None:
        if isinstance(source, SourceToRead):
            self._files += 1
            self._skipped_bytes += _num_bytes(source)

    def embedding(self, group: list[_Prepared], done: int) -> None:
        share = done / max(1, _num_chunks(group))
        pages = sum(len(prepared.content.pages) for prepared in group)
        num_bytes = sum(prepared.file.num_bytes for prepared in group)
        title = group[0].file.title
        self._tell("embedding", title, done, round(share * pages), round(share * num_bytes))

    def embedded(self, group: list[_Prepared]) -> None:
        self._files += len(group)
        self._chunks += _num_chunks(group)
        self._pages += sum(len(prepared.content.pages) for prepared in group)
        self._bytes += sum(prepared.file.num_bytes for prepared in group)

    def _tell(self, stage: str, title: str, chunks: int, pages: int, num_bytes: int) -> None:
        seconds = max(time.monotonic() - self._begun, 1e-6)
        done = self._bytes + num_bytes
        left = max(0, self._total_bytes - self._skipped_bytes - done)
        self._on_progress(
            IngestProgress(
                stage=stage,
                title=title,
                files_done=self._files,
                num_files=self._num_files,
                pages=self._pages + pages,
                chunks=self._chunks + chunks,
                fraction=min(1.0, (done + self._skipped_bytes) / max(1, self._total_bytes)),
                pages_per_second=(self._pages + pages) / seconds,
                chunks_per_second=(self._chunks + chunks) / seconds,
                seconds_left=seconds * left / done if done else None,
            )
        )


def _num_bytes(source: SourceToRead) -> int:
    try:
        return source.path.stat().st_size
    except OSError:
        return 0
