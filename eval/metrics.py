"""Scores of one answer, and of a set of them. Pure and unrounded; no torch.

`text` is the answer without its citation markers: a "[1]" would count as the word "1".
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rag.answering.prompt import is_refusal
from rag.types import Answer

Span = tuple[int, int]

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


# ---- numbers --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number with its scale worked in, and its unit: %, a currency's sign, or "" without.

    `in_brackets` is how a balance sheet writes a loss, "$(35)": -35, or 35 where "loss" stands
    before it.
    """

    value: float
    unit: str
    in_brackets: bool = False


_SCALES = {"thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
_SHORT_SCALES = {"k": 1e3, "m": 1e6, "mn": 1e6, "bn": 1e9, "b": 1e9}
_QUANTITY = re.compile(
    r"""(?<![\w.,])
    (?P<outer>[$\u20ac\u00a3\u00a5])?(?P<open>\()?\s*(?P<sign>[-\u2212])?\s*(?P<currency>[$\u20ac\u00a3\u00a5])?\s*
    (?P<inner>[-\u2212])?
    (?P<whole>\d{1,3}(?:,\d{3})+|\d+)(?P<fraction>\.\d+)?
    (?:\s*(?P<scale>thousand|million|billion|trillion)\b|(?P<short>k|mn?|bn?)\b)?
    \s*(?P<percent>%|per\s?cent\b)?
    (?(open)\s*(?P<close>\))?)
    (?![\w]|,\d|\.\d)""",
    re.IGNORECASE | re.VERBOSE,
)


def quantities(text: str) -> list[Quantity]:
    """Return the numbers of a text: "$1.577 billion" is 1,577,000,000 with the unit $.

    A number that is part of a word, a date or a longer number is none.
    """
    found = []
    for match in _QUANTITY.finditer(unicodedata.normalize("NFKC", text)):
        value = float(match["whole"].replace(",", "") + (match["fraction"] or ""))
        if match["scale"]:
            value *= _SCALES[match["scale"].lower()]
        elif match["short"]:
            value *= _SHORT_SCALES[match["short"].lower()]
        currency = match["outer"] or match["currency"] or ""
        if match["sign"] or match["inner"]:
            value = -value
        in_brackets = bool(match["open"] and match["close"] and currency)
        found.append(Quantity(value, "%" if match["percent"] else currency, in_brackets))
    return found


def number_match(text: str, answers: Sequence[str]) -> bool:
    """Say whether the text names every number of a reference, and few others.

    Equal are "1,577", "1577.00" and "1.577 thousand"; of units only two that are both given can
    differ. A text that lists numbers until one fits is refused: it may name 5, or twice as many as
    the reference, years not counted. A reference without a number is never matched.
    """
    named = quantities(text)
    counted = {n.value for n in named if n.unit or n.value not in _YEARS}
    for answer in answers:
        wanted = quantities(answer)
        is_short = len(counted) <= max(_MOST_NUMBERS, 2 * len(wanted))
        if wanted and is_short and all(any(_same(w, n) for n in named) for w in wanted):
            return True
    return False


_MOST_NUMBERS = 5
_YEARS = range(1900, 2100)


def _same(one: Quantity, other: Quantity) -> bool:
    left, right = one.value, other.value
    if one.in_brackets or other.in_brackets:
        left, right = abs(left), abs(right)
    units = {one.unit, other.unit} - {""}
    return len(units) < 2 and math.isclose(left, right, rel_tol=1e-9, abs_tol=1e-12)


# ---- options --------------------------------------------------------------------------------

_LETTERS = re.compile(
    r"\(([A-Z])\)|^([A-Z])(?=[).:,]|\s*$)|\b(?:option|answer(?: is)?:?)\s+([A-Z])\b(?!')"
)


def chosen_option(text: str, options: Mapping[str, str]) -> str | None:
    """Return the letter that the text chooses, None where it names none, or several.

    A letter counts as "(B)", as "B." at the beginning, or after "option" or "answer"; without one,
    an option whose words stand in the text in a row does.
    """
    letters = {"".join(found) for found in _LETTERS.findall(text.strip())} & set(options)
    if not letters:
        letters = {letter for letter, words in options.items() if contains_answer(text, [words])}
    return letters.pop() if len(letters) == 1 else None


# ---- declining, and listing everything ------------------------------------------------------

# Says that the text does not hold the answer. docs/benchmarks.md has its error rate, by hand.
_DECLINES = re.compile(
    r"\b(?:does|do|did|is|are|was|were|has|have|can|could)(?: not|n't|not)\b[^.]{0,60}?"
    r"\b(?:mention|provide|contain|include|specif|discuss|state|detail|disclose|describe|address"
    r"|indicate|reference|find|found|enough|sufficient|available|determin|present|list|outline"
    r"|explain|report|given|elaborate)"
    r"|\bno (?:\w+ ){0,4}(?:mention|information|reference|detail|indication|data|evidence|record"
    r"|discussion|specific)"
    r"|\b(?:cannot|can't|unable to) (?:be )?(?:answer|find|determin|provide|locate)"
    r"|\bnot (?:\w+ ){0,3}(?:mentioned|provided|specified|included|disclosed|stated|described"
    r"|discussed|available|addressed|given|found|detailed|contained)\b"
    r"|\bthere (?:is|are|was|were) no\b",
    re.I,
)
_KNOWS_NOT = re.compile(r"\b(?:i|we) (?:do not|don't|cannot|can't) (?:know|say|tell)\b", re.I)
_TOO_SHORT_TO_CLEAR = frozenset({"no", "not", "none", "nothing"})

# A longer text is no answer in one or two sentences; it finds its target by its size.
MOST_WORDS = 150
_FEWEST_ITEMS = 4
_LONGEST_ITEM = 3  # words
_BETWEEN_ITEMS = re.compile(r"[,;/\n]|\bor\b|\band\b|^\s*[-*\u2022]", re.I | re.M)


def says_not_there(text: str) -> bool:
    """Say whether a text says, in whatever words, that the document does not hold the answer."""
    return bool(_DECLINES.search(text))


def declines(text: str, answers: Sequence[str]) -> bool:
    """Say whether a text declines a question with these references.

    The phrase that the prompt asks for always does. Other words do not where the text holds a
    reference, such as "no casualties were reported"; a reference like "no" clears none.
    """
    telling = [a for a in answers if not set(normalised(a)) <= _TOO_SHORT_TO_CLEAR]
    says_so = says_not_there(text) or bool(_KNOWS_NOT.search(text))
    return is_refusal(text) or (says_so and not contains_answer(text, telling))


def is_shotgun(text: str, answers: Sequence[str]) -> bool:
    """Say whether a text hits a reference by naming everything.

    It does if it has more words than MOST_WORDS and thrice the longest reference's; if it says both
    yes and no to a reference that is one of them; or if it is a bare list of four items or more,
    where no reference is a list.
    """
    words = normalised(text)
    longest = max((len(normalised(answer)) for answer in answers), default=0)
    if len(words) > max(MOST_WORDS, 3 * longest):
        return True
    if any(normalised(answer) in (["yes"], ["no"]) for answer in answers):
        return {"yes", "no"} <= set(words)
    items = _items(text)
    is_list = len(items) >= _FEWEST_ITEMS and all(len(i) <= _LONGEST_ITEM for i in items)
    return is_list and max((len(_items(answer)) for answer in answers), default=1) < 2


def _items(text: str) -> list[list[str]]:
    return [words for part in _BETWEEN_ITEMS.split(text) if (words := normalised(part))]


def citations_are_verbatim(answer: Answer, text_of: Callable[[int, int, int], str]) -> bool:
    """Say whether every quote is the document's text at its place: quote = text[start : end].

    An answer without citations passes, since none of them is false.

    Args:
        answer: the answer to check.
        text_of: from document id, start and end to the canonical text there.
    """
    return all(text_of(c.document, c.start, c.end) == c.quote for c in answer.citations)


# ---- where the evidence is --------------------------------------------------------------------

RANKS = (1, 3, 5, 10, 20)
_HALF = 0.5


def recall_at_ranks(
    passages: Sequence[Span], gold: Sequence[Span], *, long_spans: bool = False
) -> list[float]:
    """Return for each of RANKS whether one of the first k passages shows the evidence: 0 or 1.

    A passage does if it covers at least half of a gold span or, where gold spans are longer than
    passages, if at least half of it lies within one.
    """
    shows = [
        any(
            _overlap(passage, span)
            >= _HALF * (min(_length(span), _length(passage)) if long_spans else _length(span))
            for span in gold
        )
        for passage in passages[: max(RANKS)]
    ]
    return [float(any(shows[:k])) for k in RANKS]


def evidence_read(read: Sequence[Span], gold: Sequence[Span], *, long_spans: bool = False) -> float:
    """Return whether what was read, taken together, covers at least half of a gold span: 0 or 1.

    Where gold spans are longer than passages, return the share of the gold's characters instead.
    """
    merged: list[Span] = []
    for start, end in sorted(read):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    covered = [sum(_overlap(part, span) for part in merged) for span in gold]
    if long_spans:
        return sum(covered) / sum(map(_length, gold))
    return float(any(c >= _HALF * _length(span) for c, span in zip(covered, gold, strict=True)))


def citation_precision(cited: Sequence[Span], gold: Sequence[Span]) -> float | None:
    """Return the share of cited spans that overlap gold by at least half of the shorter; or None.

    None where nothing is cited, or no gold is known.
    """
    if not cited or not gold:
        return None
    return sum(any(_touches(span, g) for g in gold) for span in cited) / len(cited)


def citation_recall(cited: Sequence[Span], gold: Sequence[Span]) -> float | None:
    """Return the share of distinct gold places that a cited span overlaps; None without gold.

    Gold spans that overlap each other are one place, as several annotators marked it.
    """
    places: list[list[Span]] = []
    for span in sorted(gold):
        if places and span[0] < max(end for _, end in places[-1]):
            places[-1].append(span)
        else:
            places.append([span])
    if not places:
        return None
    found = sum(any(_touches(c, g) for c in cited for g in place) for place in places)
    return found / len(places)


def _touches(one: Span, other: Span) -> bool:
    shorter = min(_length(one), _length(other))
    return shorter > 0 and _overlap(one, other) >= _HALF * shorter


def _overlap(one: Span, other: Span) -> int:
    return max(0, min(one[1], other[1]) - max(one[0], other[0]))


def _length(span: Span) -> int:
    return span[1] - span[0]


# ---- a set of answers -------------------------------------------------------------------------


def balanced_accuracy(abstained: Sequence[bool], answerable: Sequence[bool]) -> float:
    """Return the mean of two rates: answering what can be answered, declining what cannot.

    NaN where all questions are of one kind.
    """
    pairs = list(zip(abstained, answerable, strict=True))
    answered = [not declined for declined, can in pairs if can]
    declined = [declined for declined, can in pairs if not can]
    if not answered or not declined:
        return float("nan")
    return (sum(answered) / len(answered) + sum(declined) / len(declined)) / 2


def crag_score(score: float, *, abstained: bool, answerable: bool) -> float:
    """Return 1 for a right answer, 0.5 for half of one, 0 for none, -1 for a wrong one.

    Declining what the document does not hold is right. Source: Yang et al., CRAG, arXiv:2406.04744.
    """
    if not answerable:
        return 1.0 if abstained else -1.0
    if abstained:
        return 0.0
    return 1.0 if score >= 1.0 else 0.5 if score >= _HALF else -1.0


def risk_coverage(confidence: Sequence[float], right: Sequence[float]) -> list[tuple[float, float]]:
    """Return (share answered, share of those wrong) as ever less sure answers are let through.

    Equal confidences are let through together. Source: El-Yaniv and Wiener, JMLR 11 (2010).
    """
    order = sorted(range(len(right)), key=lambda place: -confidence[place])
    points, wrong = [], 0.0
    for rank, place in enumerate(order, start=1):
        wrong += 1 - right[place]
        if rank == len(order) or confidence[order[rank]] != confidence[place]:
            points.append((rank / len(order), wrong / rank))
    return points


def area_under_risk(points: Sequence[tuple[float, float]]) -> float:
    """Return the mean risk over all coverages, lower is better; NaN without points."""
    if not points:
        return float("nan")
    coverage, risk = np.array([(0.0, points[0][1]), *points]).T
    return float(np.trapezoid(risk, coverage))


def _f1(words: list[str], wanted: list[str]) -> float:
    common = sum((Counter(words) & Counter(wanted)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(words), common / len(wanted)
    return 2 * precision * recall / (precision + recall)
