"""A question to chunks: dense and lexical candidates, scored alike, optionally reranked."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from rag.retrieval.embedding import Embedder
from rag.retrieval.lexical_index import LexicalIndex
from rag.retrieval.lexical_score import Candidate, lexical_scores, question_words, words_in
from rag.retrieval.reranker import Reranker
from rag.retrieval.vector_index import VectorIndex
from rag.store.documents import HEADING_SEPARATOR, DocumentStore, StoredChunk
from rag.types import Document

NEIGHBOUR_COSINE = 0.1  # tuned with everything else here on dev questions: docs/decisions/0014
SAME_WORDS = 0.9  # share of the words of two chunks that say the same


@dataclass(frozen=True, slots=True)
class Hit:
    """A chunk found for a question, with the evidence for it.

    `cosine` compares meanings, -1 to 1; `lexical` is the share of the question's words that the
    chunk and, with less weight, its neighbours hold, weighted by their rarity, 0 to 1. `score`
    orders the hits, higher is nearer: of both by `_either`, or the reranker's.
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

    def with_embedder(self, embedder: Embedder) -> "Retriever":
        """Return this retriever with another way to the same vectors, e.g. one that keeps them."""
        return Retriever(self._store, self._vectors, self._lexical, embedder, self._reranker)

    def similarities(self, question: str, texts: Sequence[str]) -> list[float]:
        """Return the cosine of the question's meaning to that of each text, -1 to 1."""
        if not texts:
            return []
        query = self._embedder.embed([question])[0]
        return [float(cosine) for cosine in self._embedder.embed(texts) @ query]

    def retrieve(
        self, question: str, documents: Sequence[Document], *, num_candidates: int
    ) -> list[Hit]:
        """Return the chunks of `documents` nearest to the question, best first.

        Each search gives `num_candidates`, to which their neighbours in the text are added; every
        one gets both scores, whichever search found it. Of chunks that repeat each other only the
        best is kept, the first among equals: a file that holds one text several times would fill
        the list with it. A reranker reorders the best `num_candidates`.
        """
        # 1. candidates from both indexes
        self._vectors.catch_up()
        by_id = {document.id: document for document in documents}
        num_chunks = sum(document.num_chunks for document in documents)
        everything = num_chunks == self._vectors.num_vectors
        among = None if everything else self._store.chunk_ids(list(by_id))
        scope = None if everything else list(by_id)
        query = self._embedder.embed([question])[0]
        words = question_words(question)
        dense = self._vectors.search(query, top_k=num_candidates, among=among)
        lexical = self._lexical.search(" ".join(words), top_k=num_candidates, document_ids=scope)

        # 2. joined back to the store, so that a deleted chunk cannot be shown; the ids of a
        # document's chunks follow the text, so the neighbours are one away
        found = {i for i, _ in dense} | {i for i, _ in lexical}
        stored = self._store.chunks(sorted({i + step for i in found for step in (-1, 0, 1)}))
        candidates = [chunk for chunk in stored.values() if chunk.document_id in by_id]
        if not candidates:
            return []

        # 3. both scores of each, seen with the chunks before and after it
        cosines = dict(
            self._vectors.search(query, top_k=len(candidates), among=[c.id for c in candidates])
        )
        candidates = [c for c in candidates if c.id in cosines]
        beside = _beside(candidates)
        texts = [words_in(c.chunk.text) for c in candidates]
        shares = lexical_scores(
            words,
            [
                Candidate(
                    words=text,
                    heading=HEADING_SEPARATOR.join(c.chunk.heading_path),
                    title=by_id[c.document_id].title,
                    beside=places,
                )
                for c, text, places in zip(candidates, texts, beside, strict=True)
            ],
            frequencies=self._lexical.frequencies(words, document_ids=scope),
            num_chunks=num_chunks,
        )
        nearness = _smoothed([cosines[c.id] for c in candidates], beside)
        hits = [
            Hit(stored, _either(near, share), cosines[stored.id], share)
            for stored, near, share in zip(candidates, nearness, shares, strict=True)
        ]
        words_of = {c.id: text for c, text in zip(candidates, texts, strict=True)}
        hits = _without_repeats(sorted(hits, key=_nearest_first), words_of)

        # 4. the reranker reads question and chunk together
        if self._reranker is None:
            return hits
        best = hits[:num_candidates]
        reranked = self._reranker.scores(question, [hit.chunk.chunk.text for hit in best])
        best = [replace(hit, score=score) for hit, score in zip(best, reranked, strict=True)]
        return sorted(best, key=_nearest_first)


def _either(nearness: float, share: float) -> float:
    """Return both scores joined as two probabilities are of which either may hold.

    What is near in one way gains less from the other; a sum would prefer what is half near in both.
    """
    return 1 - (1 - nearness) * (1 - share)


def _beside(candidates: Sequence[StoredChunk]) -> list[tuple[int, ...]]:
    """Return for each candidate the places in the list of the chunks before and after it."""
    places = {(c.document_id, c.chunk.ordinal): place for place, c in enumerate(candidates)}
    around = [
        [places.get((c.document_id, c.chunk.ordinal + step)) for step in (-1, 1)]
        for c in candidates
    ]
    return [tuple(place for place in found if place is not None) for found in around]


def _smoothed(cosines: Sequence[float], beside: Sequence[tuple[int, ...]]) -> list[float]:
    """Return the mean of each cosine and, with less weight, those of the chunks beside."""
    return [
        (own + NEIGHBOUR_COSINE * sum(cosines[place] for place in places))
        / (1 + NEIGHBOUR_COSINE * len(places))
        for own, places in zip(cosines, beside, strict=True)
    ]


def _without_repeats(hits: Sequence[Hit], words_of: Mapping[int, Sequence[str]]) -> list[Hit]:
    """Return the hits without those that repeat one before them.

    Two chunks A and B, as sets of words, repeat each other if |A & B| >= 0.9 |A | B| and they hold
    the same numbers: rows of a table may differ in one number only, and say another thing.

    Such sets share one of each one's rarest words, a tenth of them and one, in an order common to
    all: only those that do are compared. Source: Chaudhuri, Ganti and Kaushik, "A Primitive
    Operator for Similarity Joins in Data Cleaning", 2006, section 4. So a set with as many words
    that no other has, as most have, repeats none and is repeated by none.
    """
    sets = [set(words_of[hit.chunk.id]) for hit in hits]
    frequencies = Counter(chain.from_iterable(sets))
    own = {word for word, frequency in frequencies.items() if frequency == 1}
    by_rarity = sorted(frequencies.keys() - own, key=frequencies.__getitem__)
    rank = {word: number for number, word in enumerate(by_rarity)}
    kept: list[Hit] = []
    holders: dict[int, list[set[str]]] = {}  # of a rare word: the sets kept that hold it
    for hit, words in zip(hits, sets, strict=True):
        shared = words - own
        num_rare = len(words) - math.ceil(SAME_WORDS * len(words)) + 1
        num_rare -= len(words) - len(shared)
        if num_rare <= 0:
            kept.append(hit)
            continue
        rare = sorted(map(rank.__getitem__, shared))[:num_rare] or [-1]  # without words, all alike
        rivals = chain.from_iterable(holders.get(word, ()) for word in rare)
        if not any(_repeats(words, other) for other in rivals):
            kept.append(hit)
            for word in rare:
                holders.setdefault(word, []).append(words)
    return kept


def _repeats(words: set[str], others: set[str]) -> bool:
    if len(words & others) < SAME_WORDS * len(words | others):
        return False
    return not any(map(_has_digit, words ^ others))


def _has_digit(word: str) -> bool:
    return any(map(str.isdigit, word))


def _nearest_first(hit: Hit) -> tuple[float, int]:
    return -hit.score, hit.chunk.id
