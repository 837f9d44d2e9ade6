"""A question to chunks: dense and lexical search, fused by reciprocal rank."""

from collections.abc import Sequence
from dataclasses import dataclass

from rag.retrieval.embedding import Embedder
from rag.retrieval.lexical_index import LexicalIndex
from rag.retrieval.vector_index import VectorIndex
from rag.store.documents import DocumentStore, StoredChunk
from rag.types import Document

RRF_K = 60  # the paper's constant: how fast a rank's weight falls


@dataclass(frozen=True, slots=True)
class Hit:
    """A chunk found for a question; `score` is its fused reciprocal rank, higher is nearer."""

    chunk: StoredChunk
    score: float


class Retriever:
    """Finds the chunks nearest to a question."""

    def __init__(
        self, store: DocumentStore, vectors: VectorIndex, lexical: LexicalIndex, embedder: Embedder
    ) -> None:
        self._store = store
        self._vectors = vectors
        self._lexical = lexical
        self._embedder = embedder

    @property
    def embedder_name(self) -> str:
        """The embedder's fingerprint, for receipts."""
        return self._embedder.fingerprint

    def retrieve(
        self, question: str, documents: Sequence[Document], *, num_candidates: int
    ) -> list[Hit]:
        """Return the chunks of `documents` nearest to the question, best first.

        Both searches give `num_candidates`; a chunk's score is the sum of 1 / (60 + rank).

        Source: Cormack, Clarke and Büttcher, "Reciprocal Rank Fusion", SIGIR 2009.
        """
        self._vectors.catch_up()
        ids = [document.id for document in documents]
        among = self._store.chunk_ids(ids)
        everything = len(among) == self._vectors.num_vectors
        dense = self._vectors.search(
            self._embedder.embed([question])[0],
            top_k=num_candidates,
            among=None if everything else among,
        )
        lexical = self._lexical.search(
            question, top_k=num_candidates, document_ids=None if everything else ids
        )
        fused = reciprocal_rank_fusion([[i for i, _ in dense], [i for i, _ in lexical]])
        stored = self._store.chunks(list(fused))
        wanted = set(ids)
        return [  # joined back to the store: a deleted chunk cannot be shown
            Hit(stored[i], score)
            for i, score in fused.items()
            if i in stored and stored[i].document_id in wanted
        ]


def reciprocal_rank_fusion(rankings: Sequence[Sequence[int]]) -> dict[int, float]:
    """Return the summed 1 / (60 + rank) of each id, highest first; rank counts from 1."""
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, item in enumerate(ranking, start=1):
            scores[item] = scores.get(item, 0.0) + 1.0 / (RRF_K + rank)
    return dict(sorted(scores.items(), key=lambda pair: (-pair[1], pair[0])))
