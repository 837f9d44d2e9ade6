"""Fathom put together: settings to a library and a service. The only place that builds both."""

import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from ingest.reindex import reembed_library
from rag.errors import DocumentNotFoundError
from rag.lm.document_kv import DocumentKV
from rag.lm.engine import Engine
from rag.retrieval.embedding import Embedder
from rag.retrieval.lexical_index import LexicalIndex, open_lexical_index
from rag.retrieval.reranker import Reranker
from rag.retrieval.vector_index import VectorIndex
from rag.routing.model_plan import ContextRanges, context_ranges
from rag.runtime import without_collecting
from rag.settings import Settings
from rag.store.access import EVERY_OWNER
from rag.store.accounts import AccountStore
from rag.store.calibrations import CalibrationStore
from rag.store.database import Database
from rag.store.documents import DocumentStore
from rag.store.oplog import OpLog
from rag.types import Document
from ui.batch_runs import BatchRuns
from ui.comparing import forget_deleted
from ui.fair_queue import FairQueue
from ui.given_tables import GivenTables
from ui.library import Library, PageCache
from ui.metrics import Metrics


class Fathom(Library):
    """A library with its models, as whoever runs the machine sees it: the owner of the settings.

    Each part is built when it is first needed, and serves every owner; see `for_owner`. Tests hand
    in a small `embedder` and `engine`; otherwise they come from the settings.
    """

    def __init__(
        self, settings: Settings, *, embedder: Embedder | None = None, engine: Engine | None = None
    ) -> None:
        self.settings = settings
        super().__init__(self, settings.user)
        self.queue = FairQueue()
        self.pages = PageCache()
        self.metrics = Metrics()
        self.building = threading.RLock()
        self._libraries: dict[str, Library] = {}
        self._given_embedder = embedder
        self._given_engine = engine

    @cached_property
    def database(self) -> Database:
        """The library's database, its schema brought up to date."""
        return Database(self.settings.resolved_database_url)

    @cached_property
    def everything(self) -> DocumentStore:
        """The documents of all owners, for what looks after the library: never for a person."""
        return DocumentStore(self.database, EVERY_OWNER)

    @cached_property
    def accounts(self) -> AccountStore:
        """Who may sign in."""
        return AccountStore(self.database)

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
        with self.building:
            if self._given_embedder is None:
                with without_collecting():
                    self._given_embedder = self._open_embedder()
            return self._given_embedder

    def _open_embedder(self) -> Embedder:
        from rag.lm.catalog import resolve_model
        from rag.lm.device import choose_device
        from rag.retrieval.embedding import open_embedder

        name = self.settings.embedder
        return open_embedder(
            resolve_model(name, self.settings),
            name=name,
            device=choose_device(self.settings).type,
            num_threads=self.settings.num_threads,
        )

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
        with self.building:
            if self._given_engine is None:
                with without_collecting():
                    self._given_engine = self._open_engine()
            return self._given_engine

    def _open_engine(self) -> Engine:
        if self.settings.remote_url is not None:
            from rag.lm.remote_engine import RemoteEngine

            return RemoteEngine(self.settings)
        from rag.lm.local_engine import LocalEngine

        return LocalEngine.load(
            self.settings.model,
            self.settings,
            calibrations=self.calibrations,
            document_kv=self.document_kv,
        )

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
    def given_tables(self) -> GivenTables:
        """The tables given to Compare that are not asked yet."""
        return GivenTables()

    @cached_property
    def batch_runs(self) -> BatchRuns:
        """The batches of all owners that are being answered."""
        return BatchRuns(self)

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

    def warm_up(self) -> None:
        """Load both models and measure the prefill rate, which the first question needs."""
        self.service()
        self.engine.warm_up()
        self.engine.predicted_prefill_seconds(1)

    def for_owner(self, owner: str) -> Library:
        """Return the library as an account sees it; "" is who needs no login."""
        if owner == self.owner:
            return self
        with self.building:
            return self._libraries.setdefault(owner, Library(self, owner))

    def for_user(self, request: Any) -> Library:  # noqa: ANN401 - Starlette's or Gradio's
        """Return the library as whoever sent this request may see it.

        The door has let him in and written his name into the request; without that there is none.
        """
        return self.for_owner(getattr(request, "request", request).scope["fathom_owner"])

    def remove_account(self, name: str) -> None:
        """Remove an account with everything that belongs to it.

        Raises:
            AccountError: if there is no such account.
        """
        self.accounts.remove(name)  # before the rest, so that nothing is added meanwhile
        self.for_owner(name).delete_everything()

    def reembed(self, *, on_progress: Callable[[int, int], None] = lambda done, total: None) -> int:
        """Change the library to the embedder of the settings; return the chunks embedded."""
        return reembed_library(self.database, self.embedder, self.settings, on_progress=on_progress)

    def _are_there(self, version_keys: tuple[str, ...]) -> bool:
        try:
            return all(
                self.everything.find(key.split(":")[0]).version_key == key for key in version_keys
            )
        except DocumentNotFoundError:
            return False

    def erase_deleted(self, documents: Sequence[Document]) -> None:
        """Take what was kept of deleted documents out of caches, indexes and comparisons."""
        forget_deleted(self, documents)
        self.document_kv.forget({document.version_key for document in documents})
        if self._given_engine is not None:
            self._given_engine.forget()
        self.pages.forget({document.content_sha256 for document in documents})
        self.batch_runs.redact()
        self.lexical.erase_deleted()
        self.index.snapshot(keep=1, wait=True)
