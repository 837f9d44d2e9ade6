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

import Stemmer

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
    stemmed = _stemmer()
    squared_idf: dict[str, float] = {}
    for word, stem in zip(words, stemmed(list(words)), strict=True):
        n = min(frequencies.get(word, 0), num_chunks)
        squared_idf[stem] = math.log(1 + (num_chunks - n + 0.5) / (n + 0.5)) ** 2
    # each form of a word is stemmed once, and only those that the question asks for are counted
    forms = list(set().union(*(candidate.words for candidate in candidates)))
    wanted = {f: stem for f, stem in zip(forms, stemmed(forms), strict=True) if stem in squared_idf}
    counts = [
        Counter(map(wanted.__getitem__, filter(wanted.__contains__, each.words)))
        for each in candidates
    ]
    lengths = [
        len(each.words)
        + NEIGHBOUR_WEIGHT * sum(len(candidates[place].words) for place in each.beside)
        for each in candidates
    ]
    mean_length = sum(lengths) / max(len(lengths), 1) or 1.0
    weights_of: dict[str, dict[str, float]] = {}
    headings: dict[str, Counter[str]] = {}
    scores = []
    for in_text, length, candidate in zip(counts, lengths, candidates, strict=True):
        if candidate.title not in weights_of:
            in_title = set(stemmed(words_in(candidate.title)))
            weights_of[candidate.title] = {
                stem: weight * (TITLE_WEIGHT if stem in in_title else 1.0)
                for stem, weight in squared_idf.items()
            }
        weights = weights_of[candidate.title]
        if candidate.heading not in headings:
            headings[candidate.heading] = Counter(stemmed(words_in(candidate.heading)))
        in_heading = headings[candidate.heading]
        dampening = K1 * (1 - B + B * length / mean_length)
        score = 0.0
        near = [counts[place] for place in candidate.beside]
        for stem, weight in weights.items():
            beside = sum([each.get(stem, 0) for each in near])
            count = in_text.get(stem, 0) + HEADING_WEIGHT * in_heading.get(stem, 0)
            count += NEIGHBOUR_WEIGHT * beside
            score += weight * count / (count + dampening)
        best = sum(weights.values())
        scores.append(score / best if best else 0.0)
    return scores


def stems_in(text: str) -> set[str]:
    """Return the distinct stems of a text's words."""
    return set(_stemmer()(words_in(text)))


def _stemmer() -> Callable[[list[str]], list[str]]:
    """Return this thread's stemmer: one remembers the words it has seen, and is not thread-safe."""
    if not hasattr(_thread, "stem_words"):
        _thread.stem_words = Stemmer.Stemmer("porter").stemWords
    stem_words: Callable[[list[str]], list[str]] = _thread.stem_words
    return stem_words
