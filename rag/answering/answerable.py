"""Whether the documents hold an answer at all: judged by the sentences, before the model reads.

The model's own likelihoods do not tell. What does, a little, is how near the best sentence comes,
and whether it lacks a name, a number or a "not" of the question: one that a text does not answer
often differs from one that it does in these.
Source: docs/decisions/0024.
"""

import math
import re
from collections.abc import Sequence

from rag.answering.sentence_choice import (
    NUM_CHUNKS,
    Sentence,
    Similarities,
    rank_sentences,
    weights,
)
from rag.retrieval.lexical_score import is_stop_word
from rag.retrieval.retriever import Hit
from rag.store.documents import DocumentStore
from rag.types import Document

# Below this probability that there is an answer, none is given. Where as many questions have one as
# have none, 0.5 would be the border; of dev questions with an answer 0.15 declines 2 in 100.
ANSWERABLE = 0.15
EVIDENCE = (
    "log_probability",  # of the best sentence
    "cosine",  # the highest
    "share",  # of the question's words, weighted by their rarity, in the best sentence
    "score",  # of the best sentence
    "denied",  # the question says "not", or the like, and the best sentence does not
    "names_missing",  # how many of its names and numbers the best sentence lacks, 2 at most
)

# A question may name the document itself, and the whole of its title.
_MOST_MISSING = 2
_NEGATION = re.compile(
    r"\b(?:not|never|no|none|nobody|nothing|neither|nor|cannot|without|except|least|fail\w*|unable"
    r"|lack\w*|rarely|seldom)\b|n't\b",
    re.I,
)
_NAME_OR_NUMBER = re.compile(r"(?<=\s)[A-Z][a-z]\w+|\d+")


def likeliest_sentences(
    question: str,
    hits: Sequence[Hit],
    documents: Sequence[Document],
    *,
    store: DocumentStore,
    similarities: Similarities,
    num_chunks: int = NUM_CHUNKS,
) -> list[Sentence]:
    """Return the sentences of the best chunks, likeliest to hold the answer first.

    Headings are among them only where no sentence seems to hold it and a heading does, as the date
    of a version, or where there is nothing else. The arguments are those of `rank_sentences`.
    """

    def ranked(with_headings: bool) -> list[Sentence]:
        return rank_sentences(
            question,
            hits,
            documents,
            store=store,
            similarities=similarities,
            num_chunks=num_chunks,
            with_headings=with_headings,
        )

    sentences = ranked(with_headings=False)
    if sentences and answer_probability(question, sentences) >= ANSWERABLE:
        return sentences
    also_headings = ranked(with_headings=True)
    if not sentences or len(also_headings) == len(sentences):
        return also_headings
    first, places = also_headings[0], {(s.document.id, s.start) for s in sentences}
    is_heading = (first.document.id, first.start) not in places
    is_answer = answer_probability(question, also_headings) >= ANSWERABLE
    return also_headings if is_heading and is_answer else sentences


def answer_probability(question: str, ranked: Sequence[Sentence]) -> float:
    """Return the probability that one of the sentences holds the answer: logistic in EVIDENCE.

    It is that of a question from a mixture of as many with an answer as without.
    """
    fitted = weights()["answerable"]
    logit = fitted["intercept"] + sum(
        fitted[name] * value
        for name, value in zip(EVIDENCE, evidence(question, ranked), strict=True)
    )
    return float(1 / (1 + math.exp(-max(-40.0, min(40.0, logit)))))


def evidence(question: str, ranked: Sequence[Sentence]) -> tuple[float, ...]:
    """Return what speaks for an answer being there, and against it: EVIDENCE.

    Args:
        question: in words.
        ranked: one sentence or more, likeliest first.
    """
    first = ranked[0]
    denied = _NEGATION.search(question) and not _NEGATION.search(first.text)
    text = first.text.casefold()
    names = [n for n in _NAME_OR_NUMBER.findall(question) if not is_stop_word(n.casefold())]
    return (
        math.log(max(first.probability, 1e-9)),
        max(sentence.cosine for sentence in ranked),
        first.share,
        first.score,
        float(bool(denied)),
        float(min(_MOST_MISSING, sum(name.casefold() not in text for name in names))),
    )
