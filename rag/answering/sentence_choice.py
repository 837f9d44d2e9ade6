"""Which sentence of what was found holds the answer: a probability for each, without a model.

What is known of a sentence (its meaning and words, those beside it, the chunk it stands in, whether
it holds the kind of thing that is asked for) is weighed by what answered questions of the dev
splits have taught: docs/decisions/0024.
"""

import json
import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rag.retrieval.lexical_score import question_words, stems
from rag.retrieval.retriever import Hit
from rag.sentences import (
    LONGEST_SENTENCE_CHARS,
    Span,
    cell_spans,
    row_spans,
    sentence_spans,
)
from rag.store.documents import DocumentStore
from rag.types import Document, Section

Similarities = Callable[[str, Sequence[str]], list[float]]

# Of the chunks found, so many of the best are cut into sentences.
NUM_CHUNKS = 12
FEATURES = (
    "cosine",  # of the sentence's meaning to the question's
    "chunk_cosine",
    "chunk_lexical",
    "share",  # of the question's words, weighted by their rarity, that the sentence holds
    "share_before",  # what the sentence before it adds to that
    "share_after",
    "log_length",
    *("number", "date", "who", "where", "why"),  # it holds something new of the kind asked for
)

_WEIGHTS_PATH = Path(__file__).with_name("quotation_weights.json")
_WORD = re.compile(r"[\w'-]+")
# Signs and white space that may stand around the words of a heading: "## ", "1.2  ".
_MARK_CHARS = 8
_NUMBER = re.compile(
    r"\d|\b(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|forty"
    r"|fifty|hundred|thousand|million|billion|half|third|quarter|dozen|twice)\b",
    re.I,
)
_DATE = re.compile(
    r"\b1\d{3}\b|\b20\d\d\b|\b\d{2,4} ?(?:BC|AD|BCE|CE)\b|\bcentur(?:y|ies)\b|\bdays?\b|\bweeks?\b"
    r"|\b\d0s\b|\b(?:January|February|March|April|May|June|July|August|September|October|November"
    r"|December)\b"
)
_NAME = re.compile(r"\b[A-Z][a-z]\w+")
_PLACE = re.compile(r"\b(?:in|at|near|from|to|of|on)\s+(?:the\s+)?[A-Z]\w+")
_REASON = re.compile(r"\b(?:because|due to|so that|in order|by|to)\b")
# Tried in order: the first that is found in the question, in lower case, names what it asks for.
_KINDS = (
    (
        "date",
        re.compile(r"\bwhen\b|\b(?:what|which) (?:year|date|month|day|century|decade|time)\b"),
    ),
    (
        "number",
        re.compile(
            r"\bhow (?:many|much|long|old|large|big|far|tall|high|fast|often)\b|\bpercentage\b"
            r"|\bwhat (?:percent\w*|number|amount|age|proportion|rate|size)\b|\bincidence\b"
        ),
    ),
    ("who", re.compile(r"\bwho(?:m|se)?\b")),
    (
        "where",
        re.compile(
            r"\bwhere\b|\b(?:what|which) (?:city|country|state|place|region|location|town|county)\b"
        ),
    ),
    ("why", re.compile(r"\bwhy\b|\bhow\b")),
)


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence `[start, end)` of a document that may hold the answer.

    `score` weighs what is known of it; `probability` is that it holds the answer, given that one
    of those compared does; `cosine` and `share` are its own evidence. `columns` is the line above
    a row of a table that may name its cells, "" if it is not known, and None for what is no row.
    """

    document: Document
    start: int
    end: int
    text: str
    score: float
    probability: float
    cosine: float
    share: float
    columns: str | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sentence with its neighbours and the chunk that led to it; `columns` as of a Sentence.

    The rows beside a row tell of something else than it does: they are no neighbours.
    """

    document_id: int
    start: int
    end: int
    text: str
    before: str
    after: str
    hit: Hit
    columns: str | None = None


def rank_sentences(
    question: str,
    hits: Sequence[Hit],
    documents: Sequence[Document],
    *,
    store: DocumentStore,
    similarities: Similarities,
    num_chunks: int = NUM_CHUNKS,
    with_headings: bool = False,
) -> list[Sentence]:
    """Return the sentences of the best chunks, likeliest to hold the answer first.

    Args:
        question: in words.
        hits: the chunks found, best first.
        documents: those that were asked.
        store: where the text is read.
        similarities: the cosines of a question to texts.
        num_chunks: of the hits, so many of the best are cut into sentences.
        with_headings: take headings for sentences, too.
    """
    found = candidates(hits[:num_chunks], store, with_headings=with_headings)
    if not found:
        return []
    features = sentence_features(question, found, similarities)
    fitted = np.array([weights()["sentence"][name] for name in FEATURES])
    return rank(found, features, fitted, documents)


def rank(
    found: Sequence[Candidate],
    features: npt.NDArray[np.float64],
    fitted: npt.NDArray[np.float64],
    documents: Sequence[Document],
) -> list[Sentence]:
    """Return the candidates as sentences, likeliest first, by their features and the weights."""
    logits = features @ fitted
    odds = np.exp(logits - logits.max())
    probabilities = odds / odds.sum()
    by_id = {document.id: document for document in documents}
    ranked = sorted(range(len(found)), key=lambda n: -probabilities[n])
    return [
        Sentence(
            by_id[found[n].document_id],
            found[n].start,
            found[n].end,
            found[n].text,
            score=float(logits[n]),
            probability=float(probabilities[n]),
            cosine=float(features[n, 0]),
            share=float(features[n, FEATURES.index("share")]),
            columns=found[n].columns,
        )
        for n in ranked
    ]


def candidates(
    hits: Sequence[Hit], store: DocumentStore, *, with_headings: bool = False
) -> list[Candidate]:
    """Return the sentences of the chunks, in reading order.

    A heading is none unless it is asked for, though it may stand beside one.
    """
    return _sentences_of(hits, store, with_headings=with_headings)


def sentence_features(
    question: str, found: Sequence[Candidate], similarities: Similarities
) -> npt.NDArray[np.float64]:
    """Return what is known of each sentence: [sentences, FEATURES]."""
    words = [stems(sentence.text) for sentence in found]
    held = [frozenset(own) for own in words]
    asked = list(dict.fromkeys(stems(" ".join(question_words(question)))))
    counts = Counter(word for own in held for word in own)
    rarity = {
        word: math.log(1 + (len(found) - counts[word] + 0.5) / (counts[word] + 0.5))
        for word in asked
    }
    whole = sum(rarity.values()) or 1.0

    def share(words_held: frozenset[str]) -> float:
        return sum(weight for word, weight in rarity.items() if word in words_held) / whole

    in_question = frozenset(stems(question))
    kind = kind_asked_for(question)
    rows = []
    for sentence, own, length, cosine in zip(
        found, held, map(len, words), similarities(question, [f.text for f in found]), strict=True
    ):
        is_kind = holds_kind(kind, sentence.text, in_question)
        rows.append(
            [
                cosine,
                sentence.hit.cosine,
                sentence.hit.lexical,
                share(own),
                share(frozenset(stems(sentence.before)) - own),
                share(frozenset(stems(sentence.after)) - own),
                math.log(1 + length),
                *(float(is_kind and kind == name) for name in FEATURES[-5:]),
            ]
        )
    return np.array(rows)


def kind_asked_for(question: str) -> str | None:
    """Return what a question asks for, by rules on its English wording; None if none applies."""
    lowered = question.lower()
    return next((kind for kind, pattern in _KINDS if pattern.search(lowered)), None)


def holds_kind(kind: str | None, text: str, in_question: frozenset[str]) -> bool:
    """Say whether a text holds something of the kind that the question does not say itself.

    Args:
        kind: from `kind_asked_for`.
        text: a sentence, or part of one.
        in_question: the stems of the question's words.
    """
    own = _WORD.findall(text)
    new = " ".join(word for word in own if not in_question.issuperset(stems(word)))
    if kind == "number":
        return bool(_NUMBER.search(new))
    if kind == "date":
        return bool(_DATE.search(new))
    if kind == "who":
        return bool(_NAME.search(new.partition(" ")[2]))
    if kind == "where":
        return bool(_PLACE.search(text) and _NAME.search(new))
    return kind == "why" and bool(_REASON.search(text))


@cache
def weights() -> Mapping[str, Any]:
    """Return the weights that `fathom bench quotation --fit` wrote."""
    loaded: dict[str, Any] = json.loads(_WEIGHTS_PATH.read_text(encoding="utf-8"))
    return loaded


def _sentences_of(
    hits: Sequence[Hit], store: DocumentStore, *, with_headings: bool
) -> list[Candidate]:
    """Return each sentence whose middle lies in a chunk, with the sentences beside it."""
    chunks_of: dict[int, list[Hit]] = {}
    for hit in hits:
        chunks_of.setdefault(hit.chunk.document_id, []).append(hit)
    found = []
    for document_id, own in chunks_of.items():
        own.sort(key=lambda hit: hit.chunk.chunk.start)
        sections = store.sections(document_id)
        for start, end in _windows([(h.chunk.chunk.start, h.chunk.chunk.end) for h in own]):
            text = store.text(document_id, start, end)
            spans, columns = sentence_spans(text), _columns(document_id, start, text, store)
            texts = ["", *(text[a:b] for a, b in spans), ""]
            for number, (a, b) in enumerate(spans, start=1):
                if not with_headings and _is_heading(start + a, texts[number], sections):
                    continue
                middle = start + (a + b) // 2
                for hit in own:
                    if hit.chunk.chunk.start <= middle < hit.chunk.chunk.end:
                        around = texts[number - 1 : number + 2]
                        own_columns = columns.get(a)
                        if own_columns is not None:
                            around = ["", around[1], ""]
                        found.append(
                            Candidate(
                                document_id,
                                start + a,
                                start + b,
                                text=around[1],
                                before=around[0],
                                after=around[2],
                                hit=hit,
                                columns=own_columns,
                            )
                        )
                        break
    return [sentence for sentence in found if _WORD.search(sentence.text)]


def _columns(document_id: int, start: int, text: str, store: DocumentStore) -> dict[int, str]:
    """Return for the start of each row of a window what may name its cells: its table's first row.

    Where the window begins within the table, that is the first line of the document, if that is a
    row of as many cells, as in CSV; else it is not known.
    """
    rows = row_spans(text)
    first = _first_row(document_id, store) if rows and start else ""
    columns: dict[int, str] = {}
    last, top = -2, ""
    for a, b in rows:
        row = text[a:b]
        if a != last + 1:  # the first of its table, unless what stands before it is half a row
            top = row if not start or "\n" in text[: max(0, a - 1)] else ""
        is_alike = len(cell_spans(first)) == len(cell_spans(row))
        names = top or (first if is_alike else "")
        columns[b - len(row.lstrip())] = names if len(names) <= LONGEST_SENTENCE_CHARS else ""
        last = b
    return columns


def _first_row(document_id: int, store: DocumentStore) -> str:
    """Return the first line of a document where that is a row, else ""."""
    head = store.text(document_id, 0, LONGEST_SENTENCE_CHARS)
    start, end = next(iter(row_spans(head)), (0, 0))
    return "" if start else head[:end]


def _is_heading(start: int, text: str, sections: Sequence[Section]) -> bool:
    """Say whether a stretch that begins at `start` is the heading of a section, or a part of it."""
    at = bisect_right(sections, start + _MARK_CHARS, key=lambda section: section.start) - 1
    if at < 0:
        return False
    title, offset = sections[at].title, start - sections[at].start
    words = _WORD.findall(text.casefold())
    in_title = " ".join(words) in " ".join(_WORD.findall(title.casefold()))
    return bool(words) and in_title and offset + len(text) <= len(title) + 2 * _MARK_CHARS


def _windows(chunks: Sequence[Span]) -> list[Span]:
    """Return the stretches of text around chunks, in order, that hold their sentences whole."""
    windows: list[Span] = []
    for start, end in chunks:
        start, end = max(0, start - LONGEST_SENTENCE_CHARS), end + LONGEST_SENTENCE_CHARS
        if windows and start <= windows[-1][1]:
            windows[-1] = (windows[-1][0], max(windows[-1][1], end))
        else:
            windows.append((start, end))
    return windows
