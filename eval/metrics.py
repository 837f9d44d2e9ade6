"""Scores of one answer. Pure and unrounded; no torch.

`text` is the answer without its citation markers: a "[1]" would count as the word "1".
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

from rag.types import Answer

_ARTICLES = frozenset({"a", "an", "the"})
_GROUPED = re.compile(r"\b\d{1,3}(?:,\d{3})+\b")
_DECIMAL_POINT = re.compile(r"(?<=\d)\.(?=\d)")


def normalised(text: str) -> list[str]:
    """Return the words of a text, lower case, without punctuation, symbols and articles.

    Source: Rajpurkar et al., SQuAD, arXiv:1606.05250, its evaluation script, with two departures.
    Punctuation becomes a space, so that "30-day" holds "30"; a number stays one word, so that
    neither "1,577" (which is "1577") nor "577.5" holds "577".
    """
    lowered = unicodedata.normalize("NFC", text).casefold()
    joined = _GROUPED.sub(lambda number: number.group().replace(",", ""), lowered)
    points = {match.start() for match in _DECIMAL_POINT.finditer(joined)}
    spaced = "".join(
        " " if unicodedata.category(sign)[0] in "PS" and place not in points else sign
        for place, sign in enumerate(joined)
    )
    return [word for word in spaced.split() if word not in _ARTICLES]


def contains_answer(text: str, answers: Sequence[str]) -> bool:
    """Say whether any reference stands in the text as whole words in a row.

    With w the words of the text and r those of a reference, both normalised: there is an i with
    w[i : i + |r|] = r. A reference without words is never contained. A text that lists everything
    scores too; `exact_match` and `token_f1` beside it show that.
    """
    words = normalised(text)
    for answer in answers:
        wanted = normalised(answer)
        width = len(wanted)
        if wanted and any(words[i : i + width] == wanted for i in range(len(words) - width + 1)):
            return True
    return False


def exact_match(text: str, answers: Sequence[str]) -> bool:
    """Say whether the text is one of the references: w = r, normalised, and not empty."""
    words = normalised(text)
    return bool(words) and any(words == normalised(answer) for answer in answers)


def token_f1(text: str, answers: Sequence[str]) -> float:
    """Return the best F1 over the references, 0 to 1; 0 without references.

    F1 = 2PR / (P + R), where with c common words, counted with repeats, P = c / words of the text
    and R = c / words of the reference.
    """
    words = normalised(text)
    return max((_f1(words, normalised(answer)) for answer in answers), default=0.0)


def abstained_rightly(abstained: bool, answerable: bool) -> bool:
    """Say whether the answer declined exactly when it should: abstained = not answerable."""
    return abstained is not answerable


def citations_are_verbatim(answer: Answer, text_of: Callable[[int, int, int], str]) -> bool:
    """Say whether every quote is the document's text at its place: quote = text[start : end].

    An answer without citations passes, since none of them is false.

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
