"""C0.8: Answers made to fool a scorer, and right ones that a careless scorer would miss."""

import pytest

from eval.metrics import (
    area_under_risk,
    balanced_accuracy,
    chosen_option,
    citation_precision,
    citation_recall,
    contains_answer,
    crag_score,
    declines,
    evidence_read,
    exact_match,
    is_shotgun,
    number_match,
    quantities,
    recall_at_ranks,
    risk_coverage,
    token_f1,
)
from rag.answering.prompt import CANNOT_ANSWER


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("I do not know", ["no"], False),  # as a substring, full marks
        ("It cannot be known.", ["no"], False),
        ("No, it is not.", ["no"], True),
        ("13 ships", ["3"], False),
        ("3rd of May", ["3"], False),
        ("in 1066", ["10"], False),
        ("It is UK law.", ["UK"], True),
        ("Ukraine", ["UK"], False),
        ("an ox", ["x"], False),
        ("II. Abschnitt", ["II"], True),
        ("World War II", ["I"], False),
        ("C++ and C", ["C"], True),
        ("Zu\u0308rich", ["Z\u00fcrich"], True),  # decomposed and composed
        ("STRASSE", ["Stra\u00dfe"], True),
        ("\u6771\u4eac", ["\u4eac"], False),  # a word of a script without spaces is one word
        ("the \u201cred\u201d\u00a0beacon", ["red beacon"], True),
        ("\U0001f600", ["\U0001f600"], False),  # a symbol is no word
        ("", [""], False),
    ],
)
def test_contains_keeps_word_boundaries(text: str, answers: list[str], expected: bool) -> None:
    assert contains_answer(text, answers) is expected


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("Paris, London, Rome, Berlin, Madrid", ["Paris"], True),
        ("- red\n- green\n- blue\n- black", ["blue"], True),
        ("Paris or London or Rome or Berlin", ["Rome"], True),
        ("yes and no", ["no"], True),
        ("Yes.", ["yes"], False),
        ("They came from Denmark, Iceland and Norway.", ["Denmark, Iceland and Norway"], False),
        ("Denmark, Iceland, Norway, Sweden", ["Denmark, Iceland and Norway"], False),
        ("The Normans came from Denmark, Iceland, and Norway, says the text.", ["Denmark"], False),
        ("The fee is 35 crowns a night.", ["35"], False),
        (" ".join(f"word{n}" for n in range(400)), ["word7"], True),
        (" ".join(f"word{n}" for n in range(400)), ["w " * 200], False),
    ],
)
def test_naming_everything_is_seen(text: str, answers: list[str], expected: bool) -> None:
    assert is_shotgun(text, answers) is expected


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("1577.00", "1,577", True),
        ("$1.577 billion", "$1,577 million", True),
        ("$1.577bn", "1,577,000,000", True),
        ("1.577 thousand", "1577", True),
        ("1,577", "$1,577", True),  # a unit left out
        ("35%", "35 percent", True),
        ("35%", "$35", False),  # two units that differ
        ("\u20ac35", "$35", False),
        ("135", "35", False),
        ("3.5", "35", False),
        ("1,577,000", "1,577", False),
        ("-35", "35", False),
        ("$(35)", "-$35", True),  # how a balance sheet writes a loss
        ("($35)", "-35", True),
        ("a net loss of $(35)", "$35", True),
        ("the year (2024)", "2024", True),  # brackets around what is no money
        ("1 2 3 4 5 6 7 8 9", "7", False),  # until one fits
        ("revenue of $12.5 million in 2023, up 3%", "12.5 million", True),
        ("from 10 to 20", "20 and 10", True),
        ("10", "20 and 10", False),
        ("ten", "10", False),
        ("A4", "4", False),
        ("10-K", "10", True),
        ("no number", "none", False),
        ("\uff11\uff12", "12", True),  # full-width digits
    ],
)
def test_numbers_with_units_and_scales(text: str, reference: str, expected: bool) -> None:
    assert number_match(text, [reference]) is expected


def test_quantities_of_a_sentence() -> None:
    found = quantities("Sales were $1.2 billion (up 3.5%), a loss of ($4,000) in 2023.")
    assert [(q.value, q.unit, q.in_brackets) for q in found] == [
        (1.2e9, "$", False),
        (3.5, "%", False),
        (4000.0, "$", True),
        (2023.0, "", False),
    ]


OPTIONS = {"A": "red", "B": "the green one", "C": "blue", "D": "none of these"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(B)", "B"),
        ("B.", "B"),
        ("The answer is C because B is wrong", "C"),
        ("(A) or (B)", None),
        ("(A) (B) (C) (D)", None),
        ("It is the green one.", "B"),
        ("red and blue", None),
        ("A green light was seen", None),  # an article
        ("A", "A"),
        ("D) none", "D"),
        ("(E)", None),
        ("I'm not sure", None),
        ("", None),
    ],
)
def test_an_option_is_one_letter(text: str, expected: str | None) -> None:
    assert chosen_option(text, OPTIONS) == expected


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        (CANNOT_ANSWER, ["35"], True),
        (
            f"{CANNOT_ANSWER} The fee is 35 crowns.",
            ["35"],
            True,
        ),  # refused, and answered all the same
        ("I don't know.", ["know"], False),  # the reference stands there
        ("I don't know.", ["35"], True),
        ("The passages do not mention the fee.", ["35"], True),
        ("There is no information about it.", ["no"], True),  # "no" clears nothing
        ("There were no casualties.", ["no casualties"], False),
        ("The fee is 35 crowns.", ["35"], False),
        ("", ["35"], False),
    ],
)
def test_declining_is_told_from_answering(text: str, answers: list[str], expected: bool) -> None:
    assert declines(text, answers) is expected


def test_empty_and_articles_score_nothing() -> None:
    for text in ("", " ", "the", "[]", "..."):
        assert token_f1(text, ["the fee"]) == 0.0
        assert not exact_match(text, ["the"])
        assert not contains_answer(text, ["the"])
        assert not number_match(text, ["35"])


def test_aliases_count_once() -> None:
    assert token_f1("UK", ["United Kingdom", "UK"]) == 1.0
    assert number_match("2 million", ["two", "2,000,000"])


def test_evidence_must_be_half_covered() -> None:
    gold = [(100, 120)]
    assert recall_at_ranks([(0, 109), (105, 115)], gold) == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert evidence_read([(95, 105), (115, 130)], gold) == 1.0  # two quarters
    assert evidence_read([(95, 104)], gold) == 0.0


def test_citations_by_hand() -> None:
    gold = [(100, 120), (110, 130), (500, 510)]  # two places, the first marked twice
    assert citation_recall([(90, 140)], gold) == 0.5
    assert citation_recall([(90, 140), (505, 520)], gold) == 1.0
    assert citation_recall([(0, 10)], gold) == 0.0
    assert citation_recall([(0, 10)], []) is None
    assert citation_precision([(90, 140), (0, 10)], gold) == 0.5
    assert citation_precision([(112, 114)], gold) == 1.0  # inside the gold
    assert citation_precision([(0, 105)], gold) == 0.0  # a quarter of the shorter
    assert citation_precision([], gold) is None
    assert citation_precision([(0, 100_000)], gold) == 1.0  # recall's twin: see the tokens cited


def test_abstention_by_hand() -> None:
    answerable = [True, True, True, True, False, False]
    assert balanced_accuracy([False] * 6, answerable) == 0.5  # never declines
    assert balanced_accuracy([True] * 6, answerable) == 0.5  # always declines
    assert balanced_accuracy([False, False, False, True, True, False], answerable) == 0.625
    assert balanced_accuracy([True], [True]) != balanced_accuracy([True], [True])  # NaN
    assert crag_score(1.0, abstained=False, answerable=True) == 1.0
    assert crag_score(0.6, abstained=False, answerable=True) == 0.5
    assert crag_score(0.0, abstained=False, answerable=True) == -1.0
    assert crag_score(0.0, abstained=True, answerable=True) == 0.0
    assert crag_score(1.0, abstained=True, answerable=False) == 1.0
    assert crag_score(0.0, abstained=False, answerable=False) == -1.0


def test_risk_and_coverage_by_hand() -> None:
    points = risk_coverage([0.9, 0.8, 0.8, 0.1], [1, 0, 1, 0])
    assert points == [(0.25, 0.0), (0.75, pytest.approx(1 / 3)), (1.0, 0.5)]
    assert risk_coverage([0.5] * 4, [1, 0, 1, 0]) == [(1.0, 0.5)]  # equal: no order to gain from
    assert area_under_risk([(1.0, 0.5)]) == 0.5
    assert area_under_risk(points) == pytest.approx(0 + 0.5 / 6 + 0.25 * (1 / 3 + 0.5) / 2)
    assert area_under_risk([]) != area_under_risk([])
