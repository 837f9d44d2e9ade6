"""The way of a document: copy, read, chunk, embed, commit.

The embedder is what takes time, so it never waits: the rest of the document is chunked, and the
next ones are copied, read and chunked, in other threads while it works; finished ones are committed
in another.
"""

import errno
import hashlib
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from threading import Event

import numpy as np

from ingest.chunking import embedded_text, iter_chunks
from ingest.readers.guard import read_guarded
from ingest.sources import SourceToRead, open_regular
from rag.errors import EmptyDocumentError, FathomError, ReadError, StorageFullError
from rag.retrieval.embedding import Embedder, FloatArray
from rag.settings import Settings
from rag.store.documents import DocumentStore, SourceFile
from rag.types import CanonicalText, Chunk, Document, IngestProgress

COPY_BYTES = 2**20
# Short documents are embedded together until they make this many chunks: a batch of one chunk
# would leave most of the processor idle. An embedder with a queue of its own is given it besides.
GROUP_CHUNKS = 256
# A document is handed over in parts, so that its first chunks are embedded while the rest is cut.
PART_CHUNKS = 64
# Documents that may lie read and chunked in memory while others are embedded; for an embedder with
# a queue also as many small ones as fill it.
READ_AHEAD = 4
# Of a file's bytes some so many make a chunk.
CHUNK_BYTES = 512
# Chunks that may wait for their commit: an embedder may be faster than a disk.
UNCOMMITTED_CHUNKS = 32_768


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


@dataclass(slots=True)
class _Taken:
    """A document on its way: read, and chunked and embedded as far as the lists go.

    Its bytes lie at `copy` until it is committed.
    """

    copy: Path
    file: SourceFile
    content: CanonicalText
    collections: tuple[str, ...]
    chunks: list[Chunk] = field(default_factory=list)
    vectors: list[FloatArray] = field(default_factory=list)  # each float32 [n, dim]


@dataclass(frozen=True, slots=True)
class _Part:
    """Neighbouring chunks of a document, the next ones to embed."""

    document: _Taken
    chunks: list[Chunk]
    is_last: bool


@dataclass(slots=True)
class _Reading:
    """A source that a reader's thread is at; what comes of it is put into `found`, in order.

    That is parts, or else a known document, or an error at any point.
    """

    source: SourceToRead | ReadError
    found: SimpleQueue[_Part | IngestResult | BaseException] = field(default_factory=SimpleQueue)
    copy: Path | None = None
    task: Future[None] | None = None
    expected_chunks: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.source, SourceToRead):
            self.expected_chunks += _num_bytes(self.source) // CHUNK_BYTES


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
    ahead: deque[_Reading] = deque()
    committing: deque[tuple[_Taken, Future[IngestResult]]] = deque()
    most_chunks = GROUP_CHUNKS + embedder.queued_texts
    stop = Event()
    with (
        ThreadPoolExecutor(settings.num_readers, "reader") as readers,
        ThreadPoolExecutor(1, "committer") as committer,
    ):
        group: list[_Part] = []
        try:
            while waiting or ahead:
                # 1-3. copy, read in a guarded process, chunk: in other threads, ahead of need
                room = embedder.queued_texts - sum(r.expected_chunks for r in ahead)
                while waiting and (len(ahead) < max(READ_AHEAD, settings.num_readers) or room > 0):
                    reading = _Reading(waiting.popleft())
                    room -= reading.expected_chunks
                    reading.task = readers.submit(
                        _prepare, reading, stop, store, embedder, settings
                    )
                    ahead.append(reading)
                other: IngestResult | IngestFailure | None = None
                num_chunks = 0
                while ahead and other is None and num_chunks < most_chunks:
                    reading = ahead[0]
                    if reading.found.empty():
                        if group:
                            break
                        counter.reading(reading.source)
                    found = reading.found.get()
                    if isinstance(found, _Part):
                        group.append(found)
                        num_chunks += len(found.chunks)
                        if found.is_last:
                            ahead.popleft()
                        continue
                    if isinstance(found, IngestResult):
                        other = found
                    elif isinstance(found, ReadError):
                        other = IngestFailure(getattr(reading.source, "title", ""), found)
                        # what was cut before goes with the rest of its document
                        group = [part for part in group if part.document.copy != reading.copy]
                    else:
                        raise found
                    ahead.popleft()

                # 4. embed
                for taken in _embed(group, embedder, counter):
                    # 5. commit in another thread; its end is the acknowledgement
                    task = committer.submit(_commit, taken, store, embedder, settings)
                    committing.append((taken, task))
                group = []

                uncommitted = sum(len(taken.chunks) for taken, _ in committing)
                while committing and (
                    other or committing[0][1].done() or uncommitted > UNCOMMITTED_CHUNKS
                ):
                    taken, task = committing.popleft()
                    uncommitted -= len(taken.chunks)
                    yield task.result()
                if other:
                    counter.skipped(reading.source)
                    yield other
            while committing:
                yield committing.popleft()[1].result()
        finally:  # a full disk, or a caller that stops: what is under way ends, the rest is dropped
            stop.set()
            _drop(ahead)
            for part in group:
                part.document.copy.unlink(missing_ok=True)


def delete_documents(
    documents: Sequence[Document], *, store: DocumentStore, settings: Settings
) -> None:
    """Delete documents, their original bytes, and their sources where those lie in the library."""
    store.delete(*(document.id for document in documents))
    remove_originals(documents, store=store, settings=settings)


def remove_originals(
    documents: Sequence[Document], *, store: DocumentStore, settings: Settings
) -> None:
    """Remove the files of documents that the store holds no more, whoever else had them."""
    for document in documents:
        original = original_path(settings, document.content_sha256)
        store.if_unheld(document.content_sha256, partial(original.unlink, missing_ok=True))
        source = Path(document.source)
        if source.is_relative_to(settings.home.resolve()):  # the sample
            source.unlink(missing_ok=True)


def original_path(settings: Settings, content_sha256: str) -> Path:
    """Return where the bytes with this checksum lie."""
    return settings.originals_dir / content_sha256[:2] / content_sha256


# ---- the steps ----------------------------------------------------------------------------------


def _prepare(
    reading: _Reading, stop: Event, store: DocumentStore, embedder: Embedder, settings: Settings
) -> None:
    """Copy, read and chunk one file, handing over parts; a known one stops after the copy."""
    try:
        if isinstance(reading.source, ReadError):
            raise reading.source
        for found in _parts(reading, reading.source, store, embedder, settings):
            if stop.is_set():
                return
            reading.found.put(found)
    except BaseException as error:  # raised again where the parts are taken
        if reading.copy:
            reading.copy.unlink(missing_ok=True)
        reading.found.put(error)


def _parts(
    reading: _Reading,
    source: SourceToRead,
    store: DocumentStore,
    embedder: Embedder,
    settings: Settings,
) -> Iterator[_Part | IngestResult]:
    copy, file = _copy(source, settings)
    reading.copy = copy
    collections = (source.collection,) if source.collection else ()
    if known := store.recall(file, collections=collections):
        _put_in_place(copy, file, settings)  # a lost or damaged original is whole again
        yield _known(known, file)
        return
    content = read_guarded(copy, name=source.title, settings=settings)
    taken = _Taken(copy, file, content, collections)
    chunks = iter_chunks(
        content,
        title=source.title,
        token_offsets=embedder.token_offsets,
        max_tokens=min(settings.chunk_tokens, embedder.max_tokens),
    )
    part = list(islice(chunks, PART_CHUNKS))
    while following := list(islice(chunks, PART_CHUNKS)):
        yield _Part(taken, part, is_last=False)
        part = following
    yield _Part(taken, part, is_last=True)


def _embed(group: list[_Part], embedder: Embedder, counter: "_Counter") -> Iterator[_Taken]:
    """Embed all parts together; yield each document that is complete with its last one."""
    if not group:
        return
    texts = [
        embedded_text(part.document.file.title, chunk.heading_path, chunk.text)
        for part in group
        for chunk in part.chunks
    ]
    counter.embedding(group, 0)
    vectors = embedder.embed(texts, on_progress=lambda done: counter.embedding(group, done))
    counter.embedded(group)
    start = 0
    for part in group:
        part.document.chunks += part.chunks
        part.document.vectors.append(vectors[start : start + len(part.chunks)])
        start += len(part.chunks)
        if part.is_last:
            yield part.document


def _commit(
    taken: _Taken, store: DocumentStore, embedder: Embedder, settings: Settings
) -> IngestResult:
    """Put the copied bytes in their place and everything else into one transaction."""
    file = taken.file
    original = original_path(settings, file.content_sha256)
    try:
        with taken.copy.open("rb") as held:
            _put_in_place(taken.copy, file, settings)
            document = store.save(
                file,
                taken.content,
                taken.chunks,
                np.concatenate(taken.vectors),
                embedder=embedder.fingerprint,
                collections=taken.collections,
            )
            if not original.exists():  # another owner deleted the same bytes meanwhile
                with taken.copy.open("wb") as again:
                    shutil.copyfileobj(held, again)
                _put_in_place(taken.copy, file, settings)
    except BaseException:
        taken.copy.unlink(missing_ok=True)
        store.if_unheld(file.content_sha256, partial(original.unlink, missing_ok=True))
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


def _drop(ahead: Iterable[_Reading]) -> None:
    """Call off what was to be read; what is being read already is waited for and thrown away."""
    for reading in ahead:
        assert reading.task is not None
        reading.task.cancel()
    for reading in ahead:
        if reading.task and not reading.task.cancelled():
            reading.task.result()
        if reading.copy:
            reading.copy.unlink(missing_ok=True)


def _num_chunks(group: Iterable[_Part]) -> int:
    return sum(len(part.chunks) for part in group)


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
        # with the share of the document that is embedded in part
        self._begun_pages = self._begun_bytes = 0.0
        self._skipped_bytes = 0  # they cost no embedding, so they say nothing of the time left

    def reading(self, source: SourceToRead | ReadError) -> None:
        if isinstance(source, SourceToRead):
            self._tell(
                "reading",
                source.title,
                self._chunks,
                round(self._begun_pages),
                round(self._begun_bytes),
            )

    def skipped(self, source: SourceToRead | ReadError) -> None:
        if isinstance(source, SourceToRead):
            self._files += 1
            self._skipped_bytes += _num_bytes(source)
            self._begun_pages, self._begun_bytes = self._pages, self._bytes

    def embedding(self, group: list[_Part], done: int) -> None:
        share = done / max(1, _num_chunks(group))
        pages, num_bytes = self._reached(group)
        self._tell(
            "embedding",
            group[0].document.file.title,
            self._chunks + done,
            round((1 - share) * self._begun_pages + share * pages),
            round((1 - share) * self._begun_bytes + share * num_bytes),
        )

    def embedded(self, group: list[_Part]) -> None:
        self._begun_pages, self._begun_bytes = self._reached(group)
        self._chunks += _num_chunks(group)
        for part in group:
            if part.is_last:
                self._files += 1
                self._pages += len(part.document.content.pages)
                self._bytes += part.document.file.num_bytes

    def _reached(self, group: list[_Part]) -> tuple[float, float]:
        """Return the pages and bytes that are done with a group; its last document may be begun."""
        complete = [part.document for part in group if part.is_last]
        pages: float = self._pages + sum(len(document.content.pages) for document in complete)
        num_bytes: float = self._bytes + sum(document.file.num_bytes for document in complete)
        end = group[-1]
        if not end.is_last:
            share = end.chunks[-1].end / len(end.document.content.text)
            pages += share * len(end.document.content.pages)
            num_bytes += share * end.document.file.num_bytes
        return pages, num_bytes

    def _tell(self, stage: str, title: str, chunks: int, pages: int, num_bytes: int) -> None:
        seconds = max(time.monotonic() - self._begun, 1e-6)
        left = max(0, self._total_bytes - self._skipped_bytes - num_bytes)
        self._on_progress(
            IngestProgress(
                stage=stage,
                title=title,
                files_done=self._files,
                num_files=self._num_files,
                pages=pages,
                chunks=chunks,
                fraction=min(1.0, (num_bytes + self._skipped_bytes) / max(1, self._total_bytes)),
                pages_per_second=pages / seconds,
                chunks_per_second=chunks / seconds,
                seconds_left=seconds * left / num_bytes if num_bytes else None,
            )
        )


def _num_bytes(source: SourceToRead) -> int:
    try:
        return source.path.stat().st_size
    except OSError:
        return 0
