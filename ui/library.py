"""What one owner can do: his documents, his answers, and what others share with him."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING

from ingest.originals import ingesting
from ingest.pipeline import (
    IngestFailure,
    IngestResult,
    delete_documents,
    ingest_files,
    original_path,
    remove_originals,
)
from ingest.readers.guard import render_page, span_boxes, start_ahead
from ingest.sources import SourceToRead
from rag.answering.conversation import Turn
from rag.answering.service import AnswerEvent, AnsweringService, AnswerReady
from rag.errors import DocumentNotFoundError, QuotaError, ReadError
from rag.retrieval.retriever import Retriever
from rag.settings import Settings
from rag.store.conversations import ConversationStore
from rag.store.documents import DocumentStore
from rag.store.receipts import ReceiptStore
from rag.types import AnswerMode, Document, IngestProgress, Page, Route
from ui.batches import OwnBatches
from ui.comparing import Comparisons
from ui.fair_queue import Waiting
from ui.formatting import plural

if TYPE_CHECKING:
    from ui.assembly import Fathom

PAGE_SCALE = 1.5  # pixels to the point: 108 to the inch
MAX_PAGE_SCALE = 4.0
_KEPT_PAGES = 32  # pictures of pages, of all owners together
_PDF = "application/pdf"


class Library:
    """One owner's view of a library; `Fathom.for_owner` makes it.

    Everything that answers to a person goes through one of these, so that nothing can show him
    what he may not read: store, receipts and service are his own.
    """

    def __init__(self, fathom: Fathom, owner: str) -> None:
        self._fathom = fathom
        self.settings: Settings = fathom.settings
        self.owner = owner
        self.comparisons = Comparisons(fathom, self)

    @cached_property
    def store(self) -> DocumentStore:
        """The owner's documents."""
        return DocumentStore(self._fathom.database, self.owner)

    @cached_property
    def receipts(self) -> ReceiptStore:
        """The answers given to the owner so far."""
        return ReceiptStore(self._fathom.database, self.owner)

    @cached_property
    def retriever(self) -> Retriever:
        """Finds the chunks nearest to a question."""
        fathom = self._fathom
        return Retriever(self.store, fathom.index, fathom.lexical, fathom.embedder, fathom.reranker)

    @cached_property
    def conversations(self) -> ConversationStore:
        """The owner's conversations so far."""
        return ConversationStore(self._fathom.database, self.owner)

    @cached_property
    def batches(self) -> OwnBatches:
        """The owner's tables of questions, and what they were answered."""
        return OwnBatches(self._fathom.batch_runs, self)

    @property
    def document_kv_held_bytes(self) -> int:
        """Bytes that the caches of documents read before take in memory now, of all owners."""
        return self._fathom.document_kv.memory_used_bytes

    @cached_property
    def _service(self) -> AnsweringService:
        fathom = self._fathom
        return AnsweringService(
            self.store,
            self.receipts,
            self.retriever,
            fathom.engine,
            self.settings,
            fathom.calibrations,
        )

    def service(self) -> AnsweringService:
        """Return the one door to answers. Among several people, `stream` waits for its turn."""
        with self._fathom.building:
            return self._service

    def stream(
        self,
        question: str,
        *,
        document_ids: Sequence[int] | None = None,
        route: Route | None = None,
        mode: AnswerMode | None = None,
        history: Sequence[Turn] = (),
        thrift: float | None = None,
        stop: Event | None = None,
    ) -> Iterator[Waiting | AnswerEvent]:
        """Answer a question when it is its turn; see `AnsweringService.stream`.

        Until then each `Waiting` says how many are before it. `stop` ends the waiting, too, and
        nothing more is yielded then.

        Raises:
            QuotaError: if too many wait already.
        """
        stop = stop or Event()
        with self._fathom.queue.join(self.owner) as turn:
            yield from turn.wait(stop)
            if stop.is_set():
                return
            try:
                for event in self.service().stream(
                    question,
                    document_ids=document_ids,
                    route=route,
                    mode=mode,
                    history=history,
                    thrift=thrift,
                    stop=stop,
                ):
                    if isinstance(event, AnswerReady):
                        self._fathom.metrics.count(event.answer)
                    yield event
            except Exception as error:
                self._fathom.metrics.count_error(error)
                raise

    def documents(self, collection: str | None = None) -> list[Document]:
        """Return the latest version of every document, or of those in a collection."""
        return self.store.all(collection=collection)

    def text(self, document_id: int, start: int, end: int) -> str:
        """Return characters `[start, end)` of a document."""
        return self.store.text(document_id, start, end)

    def page_image(self, document_id: int, number: int, scale: float = PAGE_SCALE) -> bytes:
        """Return a page of a PDF as PNG, `scale` pixels to the point.

        Raises:
            DocumentNotFoundError: if there is no such document or page, or it has no pictures.
            ReadError: if the page cannot be drawn.
        """
        document, _ = self._pdf_page(document_id, number)
        path = original_path(self.settings, document.content_sha256)
        scale = min(max(scale, 0.1), MAX_PAGE_SCALE)
        return self._fathom.pages.get(
            (document.content_sha256, number, scale),
            lambda: render_page(
                path,
                name=document.title,
                page=number,
                scale=scale,
                settings=self.settings,
            ),
        )

    def page_boxes(
        self, document_id: int, number: int, start: int, end: int
    ) -> list[tuple[float, float, float, float]]:
        """Return where characters `[start, end)` of a document stand on a page's picture.

        One box a line: left, top, right, bottom, as fractions of the picture. Of a stretch that
        goes beyond the page, the boxes are of the part on it; text that cannot be placed has none.

        Raises:
            DocumentNotFoundError: if there is no such document or page, or it has no pictures.
            ReadError: if the page cannot be read.
        """
        document, page = self._pdf_page(document_id, number)
        first, last = max(start, page.start), min(end, page.end)
        if first >= last:
            return []
        return span_boxes(
            original_path(self.settings, document.content_sha256),
            name=document.title,
            page=number,
            start=first - page.start,
            end=last - page.start,
            settings=self.settings,
        )

    def ingest_files(
        self,
        sources: Sequence[SourceToRead | ReadError],
        *,
        on_progress: Callable[[IngestProgress], None] = lambda _: None,
    ) -> Iterator[IngestResult | IngestFailure]:
        """Take files into the library and the index; see `ingest.pipeline.ingest_files`.

        Raises:
            QuotaError: if they are more than the owner may keep; none was taken.
        """
        self._require_room(sources)
        start_ahead()  # beside the loading of the embedder
        index = self._fathom.index
        index.catch_up()  # says at once where the library has another embedder
        with ingesting(self.settings):
            yield from ingest_files(
                sources,
                store=self.store,
                embedder=self._fathom.embedder,
                settings=self.settings,
                on_progress=on_progress,
            )
            index.catch_up()

    def ingest(self, path: Path, *, source: str | None = None) -> IngestResult:
        """Take one file into the library; `source` is its identity, by default its path.

        Raises:
            ReadError: if it cannot be read; nothing of it was kept.
        """
        named = SourceToRead(path, source or str(path.resolve()), path.name)
        (outcome,) = self.ingest_files([named])
        if isinstance(outcome, IngestFailure):
            raise outcome.error
        return outcome

    def delete(self, *document_ids: int) -> None:
        """Delete documents from the store, the originals, the indexes and what was kept of them.

        Raises:
            DocumentNotFoundError: if one is gone.
            StoreError: if one is another's; none was deleted.
        """
        documents = self.store.with_ids(document_ids)
        delete_documents(documents, store=self.store, settings=self.settings)
        self._fathom.erase_deleted(documents)

    def delete_collection(self, name: str) -> list[Document]:
        """Delete a collection with every version of its documents, and return those deleted.

        A document that another collection holds as well stays.
        """
        documents = self.store.delete_collection(name)
        remove_originals(documents, store=self.store, settings=self.settings)
        self._fathom.erase_deleted(documents)
        return documents

    def delete_everything(self) -> None:
        """Delete every document, conversation, comparison, batch and answer of the owner."""
        self.comparisons.delete_all()
        self.batches.delete_all()
        mine = [
            document.id
            for document in self.store.all(include_superseded=True)
            if document.owner == self.owner
        ]
        if mine:
            self.delete(*mine)
        for conversation in self.conversations.all():
            self.conversations.delete(conversation.id)
        self.receipts.delete_all()

    def _pdf_page(self, document_id: int, number: int) -> tuple[Document, Page]:
        document = self.store.find(str(document_id))
        if document.media_type != _PDF:
            raise DocumentNotFoundError(
                f"document {document_id} is {document.media_type} and has no pictures of pages",
                hint="its text is at its place: fathom text",
            )
        for page in self.store.pages(document_id):
            if page.number == number:
                return document, page
        raise DocumentNotFoundError(
            f"document {document_id} has no page {number}; it has {document.num_pages}",
            hint="pages count from 1",
        )

    def _require_room(self, sources: Sequence[SourceToRead | ReadError]) -> None:
        settings = self.settings
        files = [source.path for source in sources if isinstance(source, SourceToRead)]
        if not self.owner or not files:  # whoever runs the machine has all of it
            return
        num_documents, num_bytes = self.store.usage()
        more_bytes = sum(path.stat().st_size for path in files if path.is_file())
        if num_documents + len(files) > settings.max_documents_per_user:
            raise QuotaError(
                f"you have {plural(num_documents, 'document')} and may keep"
                f" {settings.max_documents_per_user:,}; {len(files):,} more do not fit",
                hint="delete some, or ask for a higher FATHOM_MAX_DOCUMENTS_PER_USER",
            )
        if num_bytes + more_bytes > settings.max_bytes_per_user:
            raise QuotaError(
                f"you have {num_bytes / 2**20:,.0f} MiB of files and may keep"
                f" {settings.max_bytes_per_user / 2**20:,.0f}; {more_bytes / 2**20:,.0f} more do"
                " not fit",
                hint="delete some, or ask for a higher FATHOM_MAX_BYTES_PER_USER",
            )


class PageCache:
    """The pictures drawn last; whoever asks has been let in to the document before."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, int, float], bytes] = OrderedDict()
        self._lock = Lock()

    def get(self, key: tuple[str, int, float], draw: Callable[[], bytes]) -> bytes:
        """Return the picture of (content, page, scale), drawn if it is not kept."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        picture = draw()
        with self._lock:
            self._kept[key] = picture
            while len(self._kept) > _KEPT_PAGES:
                self._kept.popitem(last=False)
        return picture

    def forget(self, contents: set[str]) -> None:
        """Drop the pictures of these contents."""
        with self._lock:
            for key in [key for key in self._kept if key[0] in contents]:
                del self._kept[key]
