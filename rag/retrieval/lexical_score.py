"""How much of a question's words a chunk holds: BM25 as a share of the best that is possible.

An index finds the candidates; this scores them, so that the score means the same whichever index
found them, and can stand beside a cosine.
"""

import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import Stemmer

FloatArray = npt.NDArray[np.float64]
K1, B = 0.9, 0.4  # Anserini's BM25 constants; others were no better: docs/decisions/0014
HEADING_WEIGHT = 0.5  # a word of the heading says what a chunk is about, if less than its text
NEIGHBOUR_WEIGHT = 0.3  # of a word in the chunk before or after: a table's head is often there
TITLE_WEIGHT = 0.3  # of a word of the question that stands in the document's title

_WORD = re.compile(r"\w+")
# English words that carry the grammar of a question, not its matter.
_STOP_WORDS = frozenset(
    "a about also an and any are as at be been being between by can could did do does during"
    " for from had has have he her his how i if in into is it its may many might much must no"
    " not of on or our please shall she should so such than that the their them then there these"
    " they this those to was we were what when where which who whom whose why will with would"
    " you your".split()
)
_thread = threading.local()


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is scored: a chunk's words, its heading path as one string, its document's title.

    `beside` are the places among the candidates of the chunks before and after it.
    """

    words: Sequence[str]  # from `words_in`
    heading: str
    title: str
    beside: tuple[int, ...] = ()


def words_in(text: str) -> list[str]:
    """Return the words of a text in order, lower case."""
    return _WORD.findall(text.lower())


def question_words(question: str) -> list[str]:
    """Return the distinct words of a question that carry matter, in order; all if none does."""
    words = list(dict.fromkeys(words_in(question)))
    return [word for word in words if word not in _STOP_WORDS] or words


def is_stop_word(word: str) -> bool:
    """Say whether a word, lower case, carries the grammar of a question, not its matter."""
    return word in _STOP_WORDS


def stems(text: str) -> list[str]:
    """Return the words of a text in order, lower case, each as the stem that words are found by."""
    return _stemmer()(words_in(text))


def lexical_scores(
    words: Sequence[str],
    candidates: Sequence[Candidate],
    *,
    frequencies: Mapping[str, int],
    num_chunks: int,
) -> list[float]:
    """Return the BM25 score of each candidate over the highest possible one: 0 to 1.

    With f the count of a word in a chunk of length l, L the candidates' mean length, n the chunks
    that hold the word and N all of them:

        idf = ln(1 + (N - n + 0.5) / (n + 0.5))
        score = sum idf^2 * f / (f + k1 * (1 - b + b * l / L)) / sum idf^2

    The square is that of question and chunk both weighted by idf, as in cosines of tf-idf vectors:
    six words of a date, common in a filing, do not outweigh the two that say what is asked. f and l
    count the heading and the chunks beside with less weight, as fields of one text. A question
    whose rare words are nowhere in the documents gets low scores throughout, and a ranking by
    meaning can overrule them. Words of the document's own title weigh less: they say which document
    is meant, and within it they lead to whatever repeats its name.

    Args:
        words: from `question_words`.
        candidates: the chunks to score.
        frequencies: word -> number of chunks that hold it, among the documents asked about.
        num_chunks: number of chunks of these documents.

    Source: Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond",
    2009, section 3, with 3.6 on fields; idf as in Lucene, which is never negative.
    """
    if not candidates:
        return []
    stemmed = _stemmer()
    squared_idf: dict[str, float] = {}
    for word, stem in zip(words, stemmed(list(words)), strict=True):
        n = min(frequencies.get(word, 0), num_chunks)
        squared_idf[stem] = math.log(1 + (num_chunks - n + 0.5) / (n + 0.5)) ** 2
    in_text = _counts_in([each.words for each in candidates], list(squared_idf))
    lengths = np.array([len(each.words) for each in candidates], dtype=np.float64)
    places = [each.beside for each in candidates]
    lengths += NEIGHBOUR_WEIGHT * _sums_beside(lengths, places)
    mean_length = sum(lengths.tolist()) / len(candidates) or 1.0
    dampening = K1 * (1 - B + B * lengths / mean_length)

    in_heading = {each.heading: Counter[str]() for each in candidates}
    for heading in in_heading:
        in_heading[heading] = Counter(stemmed(words_in(heading)))
    in_title = {each.title: frozenset[str]() for each in candidates}
    for title in in_title:
        in_title[title] = frozenset(stemmed(words_in(title)))

    # one word after the other, each for all candidates at once
    in_beside = _sums_beside(in_text, places)
    scores, best = np.zeros(len(candidates)), np.zeros(len(candidates))
    for column, (stem, whole) in enumerate(squared_idf.items()):
        in_name = whole * TITLE_WEIGHT
        weights = np.array([in_name if stem in in_title[c.title] else whole for c in candidates])
        counts = in_text[:, column] + HEADING_WEIGHT * np.array(
            [in_heading[c.heading][stem] for c in candidates]
        )
        counts += NEIGHBOUR_WEIGHT * in_beside[:, column]
        scores += weights * counts / (counts + dampening)
        best += weights
    found: list[float] = np.divide(scores, best, out=np.zeros_like(scores), where=best > 0).tolist()
    return found


def _counts_in(texts: Sequence[Sequence[str]], stems: Sequence[str]) -> FloatArray:
    """Return how often each text, cut into words, has a form of each stem, [texts, stems]."""
    columns = {stem: column for column, stem in enumerate(stems)}
    # each form of a word is stemmed once, and only those that the question asks for are counted
    forms = list(set().union(*texts))
    wanted = {
        form: columns[stem]
        for form, stem in zip(forms, _stemmer()(forms), strict=True)
        if stem in columns
    }
    counts = np.zeros((len(texts), len(columns)))
    for row, words in enumerate(texts):
        for word in filter(wanted.__contains__, words):
            counts[row, wanted[word]] += 1
    return counts


def _sums_beside(values: FloatArray, places: Sequence[tuple[int, ...]]) -> FloatArray:
    """Return for each row of `values` the sum of the rows at its places."""
    sums = np.zeros_like(values)
    for nth in range(max(map(len, places))):
        rows = [row for row, own in enumerate(places) if len(own) > nth]
        sums[rows] += values[[places[row][nth] for row in rows]]
    return sums


def stems_in(text: str) -> set[str]:
    """Return the distinct stems of a text's words."""
    return set(_stemmer()(words_in(text)))


def _stemmer() -> Callable[[list[str]], list[str]]:
    """Return this thread's stemmer: one remembers the words it has seen, and is not thread-safe."""
    if not hasattr(_thread, "stem_words"):
        _thread.stem_words = Stemmer.Stemmer("porter").stemWords
    stem_words: Callable[[list[str]], list[str]] = _thread.stem_words
    return stem_words
