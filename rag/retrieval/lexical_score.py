"""How much of a question's words a chunk holds: BM25 as a share of the best that is possible.

An index finds the candidates; this scores them, so that the score means the same whichever index
found them, and can stand beside a cosine.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import Stemmer

K1, B = 1.2, 0.75  # the usual BM25 constants; others were no better: docs/decisions/0014
HEADING_WEIGHT = 0.5  # a word of the heading says what a chunk is about, if less than its text

_WORD = re.compile(r"\w+")
# English words that carry the grammar of a question, not its matter.
_STOP_WORDS = frozenset(
    "a about also an and any are as at be been being between by can could did do does during for"
    " from had has have he her his how i if in into is it its may might must no not of on or our"
    " please shall she should so such than that the their them then there these they this those"
    " to was we were what when where which who whom whose why will with would you your".split()
)


def question_words(question: str) -> list[str]:
    """Return the distinct words of a question that carry matter, in order; all if none does."""
    words = list(dict.fromkeys(_WORD.findall(question.lower())))
    return [word for word in words if word not in _STOP_WORDS] or words


def lexical_scores(
    words: Sequence[str],
    candidates: Sequence[tuple[str, str]],
    *,
    frequencies: Mapping[str, int],
    num_chunks: int,
) -> list[float]:
    """Return the BM25 score of each candidate over the highest possible one: 0 to 1.

    With f the count of a word in a chunk of length l, L the candidates' mean length, n the chunks
    that hold the word and N all of them:

        idf = ln(1 + (N - n + 0.5) / (n + 0.5))
        score = sum idf * f / (f + k1 * (1 - b + b * l / L)) / sum idf

    A question whose rare words are nowhere in the documents thus gets low scores throughout, and
    a ranking by meaning can overrule them.

    Args:
        words: from `question_words`.
        candidates: text and heading of each chunk.
        frequencies: word -> number of chunks that hold it, among the documents asked about.
        num_chunks: number of chunks of these documents.

    Source: Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond",
    2009, section 3; idf as in Lucene, which is never negative.
    """
    stem_words = Stemmer.Stemmer("porter").stemWords  # one for each call: it is not thread-safe
    idf: dict[str, float] = {}
    for word, stem in zip(words, stem_words(list(words)), strict=True):
        n = min(frequencies.get(word, 0), num_chunks)
        idf[stem] = math.log(1 + (num_chunks - n + 0.5) / (n + 0.5))
    best = sum(idf.values())
    texts = [stem_words(_WORD.findall(text.lower())) for text, _ in candidates]
    headings = [stem_words(_WORD.findall(heading.lower())) for _, heading in candidates]
    mean_length = sum(map(len, texts)) / max(len(texts), 1) or 1.0
    scores = []
    for text, heading in zip(texts, headings, strict=True):
        in_text, in_heading = Counter(text), Counter(heading)
        dampening = K1 * (1 - B + B * len(text) / mean_length)
        score = 0.0
        for stem, weight in idf.items():
            count = in_text[stem] + HEADING_WEIGHT * in_heading[stem]
            score += weight * count / (count + dampening)
        scores.append(score / best if best else 0.0)
    return scores
