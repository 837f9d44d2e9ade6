"""From files to passages: Fathom beside what people would take instead, with the same embedder.

Each framework is used as its own documentation shows it, with chunks as long as our passages. One
that is not installed (the extra `peers`) has a row that says so.
"""

from __future__ import annotations

import random
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from eval.bench.corpus import QUESTIONS
from eval.bench.machine import Machine, this_machine
from eval.bench.rounds import Seconds, middle, ratio, seconds_of
from ingest.pipeline import IngestFailure, ingest_files
from ingest.sources import SourceToRead
from rag.retrieval.embedding import Embedder
from rag.retrieval.lexical_index import open_lexical_index
from rag.retrieval.retriever import Retriever
from rag.retrieval.vector_index import VectorIndex
from rag.settings import Settings
from rag.store.database import Database
from rag.store.documents import DocumentStore
from rag.store.oplog import OpLog

TOP_K = 5
CHUNK_CHARS, OVERLAP_CHARS = 1000, 200
CHUNK_TOKENS, OVERLAP_TOKENS = 220, 40
CHUNK_WORDS, OVERLAP_WORDS = 180, 30
_SOUGHT = 20
_SENTENCE = re.compile(r"[A-Z][\w ,'-]{60,160}\.")
Ask = Callable[[str], list[str]]  # question -> texts of the TOP_K nearest passages


class Framework(Protocol):
    """Reads files into an index in memory or in a folder."""

    def ingest(self, paths: Sequence[Path], folder: Path) -> Ask:
        """Read, chunk, embed and index the files; return what asks them until `close`."""

    def close(self) -> None:
        """Let go of what was ingested."""


@dataclass(frozen=True, slots=True)
class FrameworkRow:
    """One framework: medians over the rounds, and its seconds to ours; None where it is absent.

    `found` is the share of sentences of the files whose passage is among the nearest five.
    """

    name: str
    ingest: Seconds | None = None
    ask: Seconds | None = None
    ingest_ratio: Seconds | None = None
    ask_ratio: Seconds | None = None
    found: float | None = None


@dataclass(frozen=True, slots=True)
class FrameworksBench:
    """What `fathom bench frameworks` shows."""

    machine: Machine
    chars: int
    files: int
    rounds: int
    rows: tuple[FrameworkRow, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the object that `fathom bench frameworks` prints last."""
        return {"bench": "frameworks", **asdict(self)}


def bench_frameworks(
    texts: Sequence[str],
    frameworks: Mapping[str, Callable[[], Framework] | None],
    *,
    device: Any,  # noqa: ANN401 - a torch device
    rounds: int = 1,
    on_progress: Callable[[str], None] = lambda _: None,
) -> FrameworksBench:
    """Let each framework ingest the texts and answer the questions, in turn.

    Args:
        texts: written into files of their own first.
        frameworks: the first is ours; what is called returns one with its model loaded, None
            stands for one that is not installed.
        device: where all run.
        rounds: how often.
        on_progress: is told what is measured.
    """
    sought = _sentences(texts)
    loaded = {name: load() for name, load in frameworks.items() if load}
    ingested: dict[str, list[Seconds]] = {name: [] for name in loaded}
    asked: dict[str, list[Seconds]] = {name: [] for name in loaded}
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="fathom-bench-") as folder:
        paths = [Path(folder) / f"{number:04}.txt" for number in range(len(texts))]
        for path, text in zip(paths, texts, strict=True):
            path.write_text(text, encoding="utf-8")
        for number, name in product(range(rounds), loaded):
            on_progress(f"round {number + 1} of {rounds}: {name}")
            with tempfile.TemporaryDirectory(prefix="fathom-bench-") as home:
                into = _Into(loaded[name], paths, Path(home))
                ingested[name].append(seconds_of(into.ingest))
                into.ask(QUESTIONS[0])
                each = [seconds_of(partial(into.ask, question)) for question in QUESTIONS]
                asked[name].append(
                    Seconds(median(s.wall for s in each), median(s.cpu for s in each))
                )
                held = [any(s in _plain(text) for text in into.ask(s)) for s in sought]
                found[name] = sum(held) / len(held) if held else 0.0
                loaded[name].close()
    ours = next(iter(loaded))
    rows = [
        FrameworkRow(
            name=name,
            ingest=middle(ingested, name),
            ask=middle(asked, name),
            ingest_ratio=ratio(ingested, name, ours),
            ask_ratio=ratio(asked, name, ours),
            found=found[name],
        )
        if name in loaded
        else FrameworkRow(name)
        for name in frameworks
    ]
    chars = sum(map(len, texts))
    return FrameworksBench(this_machine(device), chars, len(texts), rounds, tuple(rows))


class _Into:
    """One ingest, so that it can be timed, and what asks it afterwards."""

    def __init__(self, framework: Framework, paths: Sequence[Path], folder: Path) -> None:
        self._framework, self._paths, self._folder = framework, paths, folder
        self.ask: Ask

    def ingest(self) -> None:
        self.ask = self._framework.ingest(self._paths, self._folder)


def installed_frameworks(
    embedder: Embedder, folder: Path, settings: Settings
) -> dict[str, Callable[[], Framework] | None]:
    """Return ours and the four others, None for each whose packages are not there."""
    needs: dict[str, tuple[Callable[[], Framework], tuple[str, ...]]] = {
        "llama-index": (
            lambda: LlamaIndex(folder),
            ("llama_index.core", "llama_index.embeddings.huggingface"),
        ),
        "langchain": (
            lambda: LangChain(folder),
            ("langchain_huggingface", "langchain_community", "langchain_text_splitters"),
        ),
        "haystack": (
            lambda: Haystack(folder),
            ("haystack", "haystack_integrations.components.embedders.sentence_transformers"),
        ),
        "txtai": (lambda: Txtai(folder), ("txtai",)),
    }
    return {"fathom": lambda: Ours(embedder, settings)} | {
        name: load if all(map(_is_installed, packages)) else None
        for name, (load, packages) in needs.items()
    }


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # its parent is not there
        return False


class Ours:
    """Fathom: everything on disk, in both indexes."""

    def __init__(self, embedder: Embedder, settings: Settings) -> None:
        self._embedder, self._settings = embedder, settings
        self._database: Database | None = None

    def close(self) -> None:
        """Close the library."""
        if self._database:
            self._database.close()

    def ingest(self, paths: Sequence[Path], folder: Path) -> Ask:
        """Read, chunk, embed and commit the files; return a retrieval among all of them."""
        settings = self._settings.model_copy(update={"home": folder, "database_url": None})
        database = self._database = Database(settings.resolved_database_url)
        store, embedder = DocumentStore(database), self._embedder
        sources = [SourceToRead(path, str(path), path.name) for path in paths]
        for outcome in ingest_files(sources, store=store, embedder=embedder, settings=settings):
            if isinstance(outcome, IngestFailure):
                raise outcome.error
        log = OpLog(database, embedder.fingerprint)
        index = VectorIndex(
            log, settings.index_dir, dim=embedder.dim, embedder=embedder.fingerprint
        )
        index.catch_up()
        lexical = open_lexical_index(database, settings.lexical_dir)
        retriever, documents = Retriever(store, index, lexical, embedder), store.all()

        def ask(question: str) -> list[str]:
            num = settings.num_candidates
            hits = retriever.retrieve(question, documents, num_candidates=num)
            return [hit.chunk.chunk.text for hit in hits[:TOP_K]]

        return ask


class _InMemory:
    """A framework whose index goes with what asks it."""

    def close(self) -> None:
        """Nothing is held."""


class LlamaIndex(_InMemory):
    """LlamaIndex with its own splitter and vector store."""

    def __init__(self, folder: Path) -> None:
        from llama_index.embeddings.huggingface import HuggingFaceEmbedding

        self._model = HuggingFaceEmbedding(model_name=str(folder), device="cpu")
        self._model.get_text_embedding("warm up")

    def ingest(self, paths: Sequence[Path], folder: Path) -> Ask:
        """As its starter example: a directory reader, an index, a retriever."""
        from llama_index.core import SimpleDirectoryReader, VectorStoreIndex
        from llama_index.core.node_parser import SentenceSplitter

        read = SimpleDirectoryReader(input_files=list(map(str, paths))).load_data()
        splitter = SentenceSplitter(chunk_size=CHUNK_TOKENS, chunk_overlap=OVERLAP_TOKENS)
        index = VectorStoreIndex.from_documents(
            read, transformations=[splitter], embed_model=self._model
        )
        retriever = index.as_retriever(similarity_top_k=TOP_K)
        return lambda question: [node.get_content() for node in retriever.retrieve(question)]


class LangChain(_InMemory):
    """LangChain with its recursive splitter and FAISS."""

    def __init__(self, folder: Path) -> None:
        from langchain_huggingface import HuggingFaceEmbeddings

        self._model = HuggingFaceEmbeddings(model_name=str(folder), model_kwargs={"device": "cpu"})
        self._model.embed_query("warm up")

    def ingest(self, paths: Sequence[Path], folder: Path) -> Ask:
        """As its tutorial on retrieval."""
        from langchain_community.vectorstores import FAISS
        from langchain_text_splitters import RecursiveCharacterTextSplitter

        splitter = RecursiveCharacterTextSplitter(
            chunk_size=CHUNK_CHARS, chunk_overlap=OVERLAP_CHARS
        )
        chunks = splitter.create_documents([path.read_text(encoding="utf-8") for path in paths])
        store = FAISS.from_documents(chunks, self._model)
        return lambda question: [
            found.page_content for found in store.similarity_search(question, k=TOP_K)
        ]


class Haystack(_InMemory):
    """Haystack with its word splitter and its store in memory."""

    def __init__(self, folder: Path) -> None:
        from haystack.utils import ComponentDevice
        from haystack_integrations.components.embedders.sentence_transformers import (
            SentenceTransformersDocumentEmbedder,
            SentenceTransformersTextEmbedder,
        )

        cpu = ComponentDevice.from_str("cpu")
        self._documents = SentenceTransformersDocumentEmbedder(
            model=str(folder), device=cpu, progress_bar=False
        )
        self._questions = SentenceTransformersTextEmbedder(
            model=str(folder), device=cpu, progress_bar=False
        )
        self._documents.warm_up()
        self._questions.warm_up()

    def ingest(self, paths: Sequence[Path], folder: Path) -> Ask:
        """As its tutorial on a first pipeline, its parts called in order."""
        from haystack import Document
        from haystack.components.preprocessors import DocumentSplitter
        from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
        from haystack.document_stores.in_memory import InMemoryDocumentStore

        splitter = DocumentSplitter(
            split_by="word", split_length=CHUNK_WORDS, split_overlap=OVERLAP_WORDS
        )
        if hasattr(splitter, "warm_up"):
            splitter.warm_up()
        whole = [Document(content=path.read_text(encoding="utf-8")) for path in paths]
        store = InMemoryDocumentStore(embedding_similarity_function="cosine")
        store.write_documents(self._documents.run(splitter.run(whole)["documents"])["documents"])
        retriever = InMemoryEmbeddingRetriever(store, top_k=TOP_K)

        def ask(question: str) -> list[str]:
            vector = self._questions.run(question)["embedding"]
            return [found.content for found in retriever.run(query_embedding=vector)["documents"]]

        return ask


class Txtai(_InMemory):
    """txtai with its index and its database of contents."""

    def __init__(self, folder: Path) -> None:
        from txtai import Embeddings

        self._embeddings = Embeddings(path=str(folder), content=True, gpu=False)
        self._embeddings.transform("warm up")

    def ingest(self, paths: Sequence[Path], folder: Path) -> Ask:
        """As its first example, on windows of characters: it has no splitter with overlap."""
        step = CHUNK_CHARS - OVERLAP_CHARS
        texts = [path.read_text(encoding="utf-8") for path in paths]
        chunks = [t[i : i + CHUNK_CHARS] for t in texts for i in range(0, len(t), step)]
        self._embeddings.index(chunks)
        return lambda question: [
            found["text"] for found in self._embeddings.search(question, TOP_K)
        ]


def _sentences(texts: Sequence[str]) -> list[str]:
    """Return sentences that stand in the texts, the same ones at each call."""
    every = [s for text in texts for s in _SENTENCE.findall(_plain(text))]
    return random.Random(0).sample(every, min(_SOUGHT, len(every)))


def _plain(text: str) -> str:
    return " ".join(text.split())


def card(bench: FrameworksBench) -> str:
    """Return the table for people."""
    lines = [
        bench.machine.describe(),
        f"{bench.chars:,} characters in {bench.files} files; CPU seconds, medians of"
        f" {bench.rounds}; ratio: theirs to ours",
        f"{'':14}{'ingest':>10}{'(wall)':>10}{'ratio':>7}{'a question':>13}{'(wall)':>10}"
        f"{'ratio':>7}{'found':>7}",
    ]
    for row in bench.rows:
        if (
            row.ingest is None
            or row.ask is None
            or row.ingest_ratio is None
            or row.ask_ratio is None
        ):
            lines.append(f"{row.name:14}  not installed: pip install 'fathom-qa[peers]'")
            continue
        lines.append(
            f"{row.name:14}{row.ingest.cpu:>8.1f} s{row.ingest.wall:>8.1f} s"
            f"{row.ingest_ratio.cpu:>7.2f}{row.ask.cpu * 1e3:>10.1f} ms"
            f"{row.ask.wall * 1e3:>7.1f} ms{row.ask_ratio.cpu:>7.2f}{row.found:>7.2f}"
        )
    return "\n".join(lines)
