"""Fathom put together: settings to a library and a service. The only place that builds both."""

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from ingest.originals import ingesting
from ingest.pipeline import (
    IngestFailure,
    IngestResult,
    delete_documents,
    ingest_files,
    remove_originals,
)
from ingest.readers.guard import start_ahead
from ingest.reindex import reembed_library
from ingest.sources import SourceToRead
from rag.answering.service import AnsweringService
from rag.errors import DocumentNotFoundError, ReadError
from rag.lm.document_kv import DocumentKV
from rag.lm.engine import Engine
from rag.retrieval.embedding import Embedder
from rag.retrieval.lexical_index import LexicalIndex, open_lexical_index
from rag.retrieval.reranker import Reranker
from rag.retrieval.retriever import Retriever
from rag.retrieval.vector_index import VectorIndex
from rag.routing.model_plan import ContextRanges, context_ranges
from rag.settings import Settings
from rag.store.calibrations import CalibrationStore
from rag.store.database import Database
from rag.store.documents import DocumentStore
from rag.store.oplog import OpLog
from rag.store.receipts import ReceiptStore
from rag.types import Document, IngestProgress


class Fathom:
    """One library with its models; each part is built when it is first needed.

    Tests hand in a small `embedder` and `engine`; otherwise they come from the settings.
    """

    def __init__(
        self, settings: Settings, *, embedder: Embedder | None = None, engine: Engine | None = None
    ) -> None:
        self.settings = settings
        self._given_embedder = embedder
        self._given_engine = engine
        self._building = threading.RLock()

    @cached_property
    def database(self) -> Database:
        """The library's database, its schema brought up to date."""
        return Database(self.settings.resolved_database_url)

    @cached_property
    def store(self) -> DocumentStore:
        """The library's documents."""
        return DocumentStore(self.database)

    @cached_property
    def receipts(self) -> ReceiptStore:
        """The answers given so far."""
        return ReceiptStore(self.database)

    @cached_property
    def calibrations(self) -> CalibrationStore:
        """What was measured here: prefill rates, effective lengths."""
        return CalibrationStore(self.database)

    @cached_property
    def lexical(self) -> LexicalIndex:
        """The full-text index."""
        return open_lexical_index(self.database, self.settings.lexical_dir)

    @property
    def embedder(self) -> Embedder:
        """The embedder, loaded once."""
        with self._building:
            if self._given_embedder is None:
                from rag.lm.catalog import resolve_model
                from rag.lm.device import choose_device
                from rag.retrieval.embedding import SentenceTransformerEmbedder

                name = self.settings.embedder
                folder = resolve_model(name, self.settings)
                device = choose_device(self.settings).type
                self._given_embedder = SentenceTransformerEmbedder(folder, name=name, device=device)
            return self._given_embedder

    @cached_property
    def reranker(self) -> Reranker | None:
        """The cross-encoder named in the settings, None by default."""
        name = self.settings.reranker
        if name is None:
            return None
        from rag.lm.catalog import resolve_model
        from rag.lm.device import choose_device
        from rag.retrieval.reranker import CrossEncoderReranker

        folder = resolve_model(name, self.settings)
        return CrossEncoderReranker(folder, name=name, device=choose_device(self.settings).type)

    @property
    def engine(self) -> Engine:
        """The language model: of a server if one is set, else of this process.

        Its weights are loaded, or the server is asked, when it first reads.
        """
        with self._building:
            if self._given_engine is None and self.settings.remote_url is not None:
                from rag.lm.remote_engine import RemoteEngine

                self._given_engine = RemoteEngine(self.settings)
            if self._given_engine is None:
                from rag.lm.local_engine import LocalEngine

                self._given_engine = LocalEngine.load(
                    self.settings.model,
                    self.settings,
                    calibrations=self.calibrations,
                    document_kv=self.document_kv,
                )
            return self._given_engine

    def context_ranges(self) -> ContextRanges | None:
        """Return how long a context the model is made for and was measured to use well.

        None where a server runs it.
        """
        spec = self.engine.spec
        found = self.calibrations.effective_length(self.engine.model_id)
        return context_ranges(spec, found.tokens if found else None) if spec else None

    @cached_property
    def document_kv(self) -> DocumentKV:
        """The caches of documents that the language model has read."""
        documents = DocumentKV(
            self.settings.document_kv_dir,
            memory_bytes=self.settings.document_kv_memory_bytes,
            disk_bytes=self.settings.document_kv_disk_bytes,
            is_there=self._are_there,
        )
        documents.shrink()
        return documents

    @cached_property
    def index(self) -> VectorIndex:
        """The FAISS index over the library."""
        embedder = self.embedder
        return VectorIndex(
            OpLog(self.database, embedder.fingerprint),
            self.settings.index_dir,
            dim=embedder.dim,
            embedder=embedder.fingerprint,
        )

    @cached_property
    def retriever(self) -> Retriever:
        """Finds the chunks nearest to a question."""
        return Retriever(self.store, self.index, self.lexical, self.embedder, self.reranker)

    @cached_property
    def _service(self) -> AnsweringService:
        return AnsweringService(
            self.store,
            self.receipts,
            self.retriever,
            self.engine,
            self.settings,
            self.calibrations,
        )

    def service(self) -> AnsweringService:
        """Return the one door to answers."""
        with self._building:
            return self._service

    def warm_up(self) -> None:
        """Load both models and measure the prefill rate, which the first question needs."""
        self.service()
        self.engine.warm_up()
        self.engine.predicted_prefill_seconds(1)

    def documents(self, collection: str | None = None) -> list[Document]:
        """Return the latest version of every document, or of those in a collection."""
        return self.store.all(collection=collection)

    def text(self, document_id: int, start: int, end: int) -> str:
        """Return characters `[start, end)` of a document."""
        return self.store.text(document_id, start, end)

    def ingest_files(
        self,
        sources: Sequence[SourceToRead | ReadError],
        *,
        on_progress: Callable[[IngestProgress], None] = lambda _: None,
    ) -> Iterator[IngestResult | IngestFailure]:
        """Take files into the library and the index; see `ingest.pipeline.ingest_files`."""
        start_ahead()  # beside the loading of the embedder
        self.index.catch_up()  # says at once where the library has another embedder
        with ingesting(self.settings):
            yield from ingest_files(
                sources,
                store=self.store,
                embedder=self.embedder,
                settings=self.settings,
                on_progress=on_progress,
            )
            self.index.catch_up()

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
        """Delete documents from the store, the originals, the indexes and what was kept of them."""
        documents = [self.store.find(str(number)) for number in document_ids]
        delete_documents(documents, store=self.store, settings=self.settings)
        self._erase_deleted(documents)

    def delete_collection(self, name: str) -> list[Document]:
        """Delete a collection with every version of its documents, and return those deleted.

        A document that another collection holds as well stays.
        """
        documents = self.store.delete_collection(name)
        remove_originals(documents, store=self.store, settings=self.settings)
        self._erase_deleted(documents)
        return documents

    def reembed(self, *, on_progress: Callable[[int, int], None] = lambda done, total: None) -> int:
        """Change the library to the embedder of the settings; return the chunks embedded."""
        return reembed_library(self.database, self.embedder, self.settings, on_progress=on_progress)

    def _are_there(self, version_keys: tuple[str, ...]) -> bool:
        try:
            return all(
                self.store.find(key.split(":")[0]).version_key == key for key in version_keys
            )
        except DocumentNotFoundError:
            return False

    def _erase_deleted(self, documents: Sequence[Document]) -> None:
        self.document_kv.forget({document.version_key for document in documents})
        if self._given_engine is not None:
            self._given_engine.forget()
        self.lexical.erase_deleted()
        self.index.snapshot(keep=1, wait=True)
