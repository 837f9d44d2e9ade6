"""Scores against numbers worked by hand."""

from dataclasses import replace

import pytest

from eval.metrics import citations_are_verbatim, contains_answer, exact_match, token_f1
from rag.types import Answer, Citation
from ui.assembly import Fathom


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("The fee is 35 crowns.", ["35"], True),
        ("The fee is 135 crowns.", ["35"], False),
        ("I do not know", ["no"], False),
        ("No.", ["no"], True),
        ("within a 30-day period", ["30"], True),
        ("The harbour master", ["harbour  Master!"], True),
        ("master of the harbour", ["harbour master"], False),
        ("The fee is 35.", ["35"], True),
        ("The fee is 35.5 crowns.", ["35"], False),
        ("1,577 ships", ["577"], False),
        ("1,577 ships", ["1577"], True),
        ("in 2012,2013", ["2013"], True),
        ("It is $35, or 35%.", ["35"], True),
        ("the “red” beacon’s light", ["red beacon"], True),
        ("caf\u00e9", ["cafe\u0301"], True),
        ("nothing", ["no"], False),
        ("harbour", ["harbour master"], False),
        ("", ["35"], False),
        ("the fee", ["the"], False),
        ("anything", [], False),
    ],
)
def test_contains_answer(text: str, answers: list[str], expected: bool) -> None:
    assert contains_answer(text, answers) is expected


def test_f1_counts_repeats_and_takes_the_best_reference() -> None:
    assert token_f1("red red beacon", ["red beacon"]) == pytest.approx(0.8)
    assert token_f1("red beacon", ["green light", "a red beacon"]) == 1.0
    assert token_f1("", ["x"]) == token_f1("x", []) == 0.0
    assert exact_match("The Red beacon.", ["red beacon"])
    assert not exact_match("red", ["red beacon"])
    assert not exact_match("", ["the"])


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("red", "red", 1.0),
        ("red green", "red blue", 0.5),  # P = 1/2, R = 1/2
        ("red", "red red", 2 / 3),  # P = 1, R = 1/2
        ("red red red red", "red", 0.4),  # P = 1/4, R = 1
        ("green every four seconds", "four", 0.4),
        ("red", "green", 0.0),
        ("the", "an", 0.0),
    ],
)
def test_f1_by_hand(text: str, reference: str, expected: float) -> None:
    assert token_f1(text, [reference]) == pytest.approx(expected, abs=1e-15)


@pytest.fixture
def answer(small_fathom: Fathom) -> Answer:
    """Return an answer with its receipt, to put other words in."""
    return replace(small_fathom.service().answer("What is the fee?"), abstained=False, citations=())


def test_a_quote_that_is_not_in_its_place_is_seen(small_fathom: Fathom, answer: Answer) -> None:
    text = small_fathom.store.text(1)
    start = text.index("35 crowns")
    citation = Citation(
        marker=1,
        document=1,
        title="handbook.md",
        version=1,
        page=None,
        section=None,
        start=start,
        end=start + 9,
        quote="35 crowns",
        verified=True,
    )
    for cited, expected in (
        (citation, True),
        (replace(citation, start=start + 1), False),
        (replace(citation, quote="53 crowns"), False),
        (replace(citation, document=2), False),
    ):
        quoted = replace(answer, citations=(cited,))
        assert citations_are_verbatim(quoted, small_fathom.store.text) is expected
    assert citations_are_verbatim(answer, small_fathom.store.text)
