"""Every sentence of the documents that holds what a question asks to count or to list.

No model reads: each sentence is compared with the words of the question, and those that hold nearly
all of them, the rare ones first, are quoted, all of them. It is said that this is what was done.
What is told in other words is not among them; where nothing is, a model has to read.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import log
from operator import itemgetter
from threading import Event

from rag.answering.citations import without_markers
from rag.answering.counting import MOST_CITATIONS, cite_items
from rag.answering.structures.item import Item
from rag.retrieval.lexical_score import question_words, stems, words_in
from rag.routing.question_class import DOCUMENT, PARTS, comparatives
from rag.sentences import sentence_spans
from rag.store.documents import DocumentStore
from rag.types import Citation, Document

# Share of the question's words, weighted by rarity, that a sentence must hold: docs/decisions/0023.
MIN_SHARE = 0.7
# One word alone is rarely what is asked for: "companies" stands beside few of them.
LEAST_WORDS = 2

# How counts and lists are asked for, "the number of" among it; "lamp numbers" are a matter.
_ASKING = frozenset(
    stems(
        "list enumerate name give show tell count find how many often time every all each say"
        " mention state tell describe record total different various please there following"
        " sentence statement passage contain"
    )
)
_NUMBER_OF = re.compile(r"\bnumber of\b", re.I)
# "in the whole text", "does the text say"
_SCOPE = re.compile(rf"\b(?:this|the|these|all|my|our) (?:whole |entire )?{DOCUMENT}\b", re.I)
# What narrows a question without a word to look for.
_LIMITS = re.compile(
    r"\b(?:not|no|never|neither|nor|without|except|besides|unless|other than|only|between|above"
    r"|below|under|over|least|most)\b|n't\b",
    re.I,
)
_WORD = re.compile(r"\w+")
_ONLY_PARTS = re.compile(rf"(?:{PARTS} ?)+", re.I)


@dataclass(frozen=True, slots=True)
class Extracted:
    """The sentences found: `words` are those looked for, `num_compared` all that were looked at.

    `unread` are documents that a stop left out.
    """

    words: tuple[str, ...]
    citations: tuple[Citation, ...]
    num_found: int
    num_compared: int
    unread: tuple[Document, ...]


def matter_of(question: str) -> dict[str, str]:
    """Return the words that say what is to be counted or listed: stem to the word as asked."""
    words = question_words(_SCOPE.sub(" ", _NUMBER_OF.sub(" ", question)))
    as_asked = {word.lower(): word for word in _WORD.findall(question)}
    named = zip(stems(" ".join(words)), words, strict=True)
    return {stem: as_asked.get(word, word) for stem, word in named if stem not in _ASKING}


def can_extract(question: str) -> bool:
    """Say whether a question's words tell enough of what it asks for to look for them.

    They do not where it leaves something out ("not", "above"), nor for the parts of a document,
    which its sentences do not name: see `rag.answering.counting`.
    """
    if _LIMITS.search(question) or comparatives(question):
        return False
    words = matter_of(question).values()
    return len(words) >= LEAST_WORDS and not _ONLY_PARTS.fullmatch(" ".join(words))


def extract(
    question: str, documents: Sequence[Document], *, store: DocumentStore, stop: Event
) -> Extracted:
    """Return the sentences that hold what a question asks for, in the order of the text.

    With n of N sentences holding a word, its weight is ln(1 + (N - n + 0.5) / (n + 0.5)); a word
    that none holds weighs most, so that what the documents do not speak of is not found in them.

    Args:
        question: in words.
        documents: read one after the other.
        store: where their text lies.
        stop: ends it between two documents.
    """
    matter = matter_of(question)
    held: list[tuple[int, Item, frozenset[str]]] = []
    num_compared = num_read = 0
    for number, document in enumerate(documents):
        if stop.is_set():
            break
        num_read += 1
        text = store.text(document.id)
        forms = {form for form in set(words_in(text)) if not matter.keys().isdisjoint(stems(form))}
        for start, end in sentence_spans(text):
            num_compared += 1
            if own := forms.intersection(words_in(text[start:end])):
                held.append((number, Item(start, end, end), frozenset(stems(" ".join(own)))))
    counts = Counter(stem for *_, own in held for stem in own)
    weights = {
        stem: log(1 + (num_compared - counts[stem] + 0.5) / (counts[stem] + 0.5)) for stem in matter
    }
    least = MIN_SHARE * sum(weights.values())
    found = [(n, item) for n, item, own in held if sum(weights[stem] for stem in own) >= least]
    citations: list[Citation] = []
    for number, places in groupby(found, key=itemgetter(0)):
        if len(citations) == MOST_CITATIONS:
            break
        document, items, first = documents[number], [item for _, item in places], len(citations) + 1
        citations += cite_items(document, store.text(document.id), items, store, first=first)
    return Extracted(
        words=tuple(matter.values()),
        citations=tuple(citations),
        num_found=len(found),
        num_compared=num_compared,
        unread=tuple(documents[num_read:]),
    )


def extracted_text(found: Extracted) -> str:
    """Return what was found in words, a sentence a line with its marker."""
    verb = "sentence holds" if found.num_found == 1 else "sentences hold"
    head = (
        f"{found.num_found:,} {verb} the words asked for ({', '.join(found.words)}), or nearly all"
        " of them: every sentence was compared; what is said in other words is not among them."
    )
    if found.num_found > len(found.citations):
        head += f" The first {len(found.citations):,} are quoted."
    lines = [f"{without_markers(' '.join(c.quote.split()))} [{c.marker}]" for c in found.citations]
    return "\n".join([head, *lines])
