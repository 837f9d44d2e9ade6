"""A question to chunks: dense and lexical candidates, scored alike, optionally reranked."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rag.retrieval.embedding import Embedder
from rag.retrieval.lexical_index import LexicalIndex
from rag.retrieval.lexical_score import lexical_scores, question_words
from rag.retrieval.reranker import Reranker
from rag.retrieval.vector_index import VectorIndex
from rag.store.documents import HEADING_SEPARATOR, DocumentStore, StoredChunk
from rag.types import Document

COSINE_WEIGHT = 0.75  # tuned with everything else here on dev questions: docs/decisions/0014
SAME_WORDS = 0.9  # two chunks that share this much of their words say the same
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Hit:
    """A chunk found for a question, with the evidence for it.

    `cosine` compares meanings, -1 to 1; `lexical` is the share of the question's words that the
    chunk holds, weighted by their rarity, 0 to 1; `score` orders the hits, higher is nearer. It is
    the weighted sum of both, or the reranker's where there is one.
    """

    chunk: StoredChunk
    score: float
    cosine: float
    lexical: float


class Retriever:
    """Finds the chunks nearest to a question."""

    def __init__(
        self,
        store: DocumentStore,
        vectors: VectorIndex,
        lexical: LexicalIndex,
        embedder: Embedder,
        reranker: Reranker | None = None,
    ) -> None:
        self._store = store
        self._vectors = vectors
        self._lexical = lexical
        self._embedder = embedder
        self._reranker = reranker

    @property
    def embedder_name(self) -> str:
        """The embedder's fingerprint, for receipts."""
        return self._embedder.fingerprint

    def retrieve(
        self, question: str, documents: Sequence[Document], *, num_candidates: int
    ) -> list[Hit]:
        """Return the chunks of `documents` nearest to the question, best first.

        Each search gives `num_candidates`; every candidate then gets both scores, whichever
        search found it. Of chunks with the same words only the best is kept, the first in the
        document among equals. A reranker reorders the best `num_candidates`.
        """
        # 1. candidates from both indexes
        self._vectors.catch_up()
        ids = [document.id for document in documents]
        among = self._store.chunk_ids(ids)
        everything = len(among) == self._vectors.num_vectors
        query = self._embedder.embed([question])[0]
        words = question_words(question)
        scope = None if everything else ids
        dense = self._vectors.search(
            query, top_k=num_candidates, among=None if everything else among
        )
        lexical = self._lexical.search(" ".join(words), top_k=num_candidates, document_ids=scope)

        # 2. joined back to the store: a deleted chunk cannot be shown
        found = self._store.chunks(sorted({i for i, _ in dense} | {i for i, _ in lexical}))
        wanted = set(ids)
        candidates = [stored for stored in found.values() if stored.document_id in wanted]
        if not candidates:
            return []

        # 3. both scores for each of them
        cosines = dict(
            self._vectors.search(
                query, top_k=len(candidates), among=[stored.id for stored in candidates]
            )
        )
        shares = lexical_scores(
            words,
            [(c.chunk.text, HEADING_SEPARATOR.join(c.chunk.heading_path)) for c in candidates],
            frequencies=self._lexical.frequencies(words, document_ids=scope),
            num_chunks=len(among),
        )
        hits = [
            Hit(stored, COSINE_WEIGHT * cosine + share, cosine, share)
            for stored, share in zip(candidates, shares, strict=True)
            if (cosine := cosines.get(stored.id)) is not None
        ]
        hits.sort(key=lambda hit: (-hit.score, hit.chunk.id))
        hits = _without_repeats(hits)

        # 4. the reranker reads question and chunk together
        if self._reranker is None:
            return hits
        best = hits[:num_candidates]
        reranked = self._reranker.scores(question, [hit.chunk.chunk.text for hit in best])
        best = [replace(hit, score=score) for hit, score in zip(best, reranked, strict=True)]
        return sorted(best, key=lambda hit: (-hit.score, hit.chunk.id))


def _without_repeats(hits: Sequence[Hit]) -> list[Hit]:
    """Return the hits without those whose words a better one already has.

    Two chunks repeat each other if |A & B| >= 0.9 |A | B| for their sets of words. A file that
    holds one text several times would otherwise fill the list with it.
    """
    kept: list[tuple[Hit, set[str]]] = []
    for hit in hits:
        words = set(_WORD.findall(hit.chunk.chunk.text.lower()))
        if not any(len(words & w) >= SAME_WORDS * len(words | w) for _, w in kept):
            kept.append((hit, words))
    return [hit for hit, _ in kept]
