"""Scores of one answer. Pure and unrounded; no torch."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from rag.types import Answer

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " "))


def normalised(text: str) -> list[str]:
    """Return the words of a text, lower case, without punctuation and articles.

    Source: Rajpurkar et al., SQuAD, arXiv:1606.05250, its evaluation script; punctuation becomes a
    space here, so that "30-day" holds "30".
    """
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def contains_answer(text: str, answers: Sequence[str]) -> bool:
    """Say whether any reference stands in the text as whole words in a row."""
    words = normalised(text)
    for answer in answers:
        wanted = normalised(answer)
        width = len(wanted)
        if wanted and any(words[i : i + width] == wanted for i in range(len(words) - width + 1)):
            return True
    return False


def exact_match(text: str, answers: Sequence[str]) -> bool:
    """Say whether the text is one of the references, normalised."""
    return any(normalised(text) == normalised(answer) for answer in answers)


def token_f1(text: str, answers: Sequence[str]) -> float:
    """Return the best F1 over the references, 0 to 1.

    F1 = 2PR / (P + R), where with c common words, counted with repeats, P = c / words of the text
    and R = c / words of the reference.
    """
    return max((_f1(normalised(text), normalised(answer)) for answer in answers), default=0.0)


def citations_are_verbatim(answer: Answer, text_of: Callable[[int, int, int], str]) -> bool:
    """Say whether every quote is the document's text at its place.

    Args:
        answer: the answer to check.
        text_of: from document id, start and end to the canonical text there.
    """
    return all(text_of(c.document, c.start, c.end) == c.quote for c in answer.citations)


def _f1(words: list[str], wanted: list[str]) -> float:
    common = sum((Counter(words) & Counter(wanted)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(words), common / len(wanted)
    return 2 * precision * recall / (precision + recall)
