"""The floor that retrieval must beat: BM25 over overlapping windows of words, nothing else."""

import math
import re
from collections import Counter

import numpy as np

from eval.evidence_sets import Span

WINDOW_WORDS, OVERLAP_WORDS = 180, 30
_K1, _B = 1.5, 0.75
_WORD = re.compile(r"\w+")


class BM25Floor:
    """One document in windows of 180 words, 30 of them shared with the window before.

    Source: Robertson and Zaragoza 2009, with Lucene's idf; k1 = 1.5, b = 0.75; lower-cased words,
    no stemming, no stop words; the statistics are the document's own.
    """

    def __init__(self, text: str) -> None:
        self.windows = word_windows(text)
        counts = [Counter(_WORD.findall(text[a:b].lower())) for a, b in self.windows]
        lengths = np.array([count.total() for count in counts], dtype=np.float64)  # [N]
        self._dampening = _K1 * (1 - _B + _B * lengths / max(lengths.mean(), 1.0))  # [N]
        self._postings: dict[str, list[tuple[int, int]]] = {}
        for number, count in enumerate(counts):
            for word, times in count.items():
                self._postings.setdefault(word, []).append((number, times))

    def ranked(self, question: str) -> list[Span]:
        """Return the windows, nearest first; equal ones in the order of the text."""
        scores = np.zeros(len(self.windows))  # [N]
        for word in set(_WORD.findall(question.lower())):
            found = self._postings.get(word, [])
            idf = math.log(1 + (len(self.windows) - len(found) + 0.5) / (len(found) + 0.5))
            for number, times in found:
                scores[number] += idf * times * (_K1 + 1) / (times + self._dampening[number])
        return [self.windows[i] for i in np.argsort(-scores, kind="stable")]


def word_windows(text: str) -> list[Span]:
    """Return the `[start, end)` of each window; the last one ends with the text's last word."""
    words = [match.span() for match in re.finditer(r"\S+", text)]
    windows: list[Span] = []
    for first in range(0, len(words), WINDOW_WORDS - OVERLAP_WORDS):
        last = min(first + WINDOW_WORDS, len(words))
        windows.append((words[first][0], words[last - 1][1]))
        if last == len(words):
            break
    return windows
