"""Scores and intervals against numbers worked by hand."""

from dataclasses import replace

import pytest

from eval.compare import Row, compare, score, summarise
from eval.examples import EvalExample
from eval.metrics import (
    abstained_rightly,
    citations_are_verbatim,
    contains_answer,
    exact_match,
    token_f1,
)
from rag.answering.prompt import CANNOT_ANSWER
from rag.errors import DocumentNotFoundError
from rag.types import Answer, Citation, Route
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


def test_only_an_unanswerable_question_is_rightly_declined() -> None:
    assert abstained_rightly(True, answerable=False)
    assert abstained_rightly(False, answerable=True)
    assert not abstained_rightly(True, answerable=True)
    assert not abstained_rightly(False, answerable=False)


def _row(name: str, asked: Route, taken: Route, *, correct: bool) -> Row:
    return Row(
        example_id=name,
        asked=asked,
        taken=taken,
        correct=correct,
        exact=correct,
        f1=float(correct),
        abstained=False,
        abstained_rightly=True,
        verbatim=True,
        num_citations=1,
        prompt_tokens=1,
        cached_tokens=0,
        new_tokens=1,
        seconds=1.0,
    )


def _rows(only_full: int, only_retrieval: int, both: int, neither: int = 0) -> list[Row]:
    outcomes = [(True, False)] * only_full + [(False, True)] * only_retrieval
    outcomes += [(True, True)] * both + [(False, False)] * neither
    return [
        _row(str(n), route, route, correct=correct)
        for n, pair in enumerate(outcomes)
        for route, correct in zip((Route.FULL, Route.RETRIEVAL), pair, strict=True)
    ]


@pytest.mark.parametrize(
    ("only_full", "only_retrieval", "p_value", "words"),
    [
        (1, 5, 2 * 7 / 64, "no difference shown"),  # 2 (C(6,0) + C(6,1)) / 2^6
        (0, 5, 2 / 32, "no difference shown"),  # 0.0625: five to nothing is not enough
        (0, 6, 2 / 64, "retrieval is better"),
        (6, 0, 2 / 64, "full is better"),
        (4, 4, 1.0, "no difference shown"),
        (0, 0, 1.0, "no difference shown"),
    ],
)
def test_mcnemar_by_hand(only_full: int, only_retrieval: int, p_value: float, words: str) -> None:
    verdict = summarise(_rows(only_full, only_retrieval, both=4, neither=3))
    assert verdict.p_value == pytest.approx(p_value)
    assert verdict.words.startswith(words)
    assert (verdict.only_full, verdict.only_retrieval) == (only_full, only_retrieval)
    assert verdict.shares[Route.FULL].correct == 4 + only_full
    assert verdict.shares[Route.RETRIEVAL].correct == 4 + only_retrieval
    assert verdict.taken == verdict.shares


def test_published_counts_give_the_published_p_value() -> None:
    """FinanceBench, GPT-4, 150 questions: 75 right by retrieval, 37 in full; discordant 52 : 14."""
    verdict = summarise(_rows(only_full=14, only_retrieval=52, both=23, neither=61))
    retrieval, full = verdict.shares[Route.RETRIEVAL], verdict.shares[Route.FULL]
    assert verdict.p_value == pytest.approx(2.8e-6, abs=5e-8)
    assert (retrieval.correct, full.correct) == (75, 37)
    assert (retrieval.low, retrieval.high) == pytest.approx((0.421, 0.579), abs=5e-4)
    assert (full.low, full.high) == pytest.approx((0.185, 0.321), abs=5e-4)


def test_wilson_by_hand() -> None:
    share = summarise(_rows(5, 5, 0)).shares[Route.FULL]
    assert (share.low, share.high) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    none = summarise(_rows(0, 10, 0)).shares[Route.FULL]
    assert (none.low, none.high) == pytest.approx((0.0, 0.2775), abs=1e-4)  # z^2 / (n + z^2)


def test_a_route_that_was_not_taken_does_not_count() -> None:
    rows = [
        _row("1", Route.FULL, Route.RETRIEVAL, correct=True),
        _row("1", Route.RETRIEVAL, Route.RETRIEVAL, correct=True),
    ]
    verdict = summarise(rows)
    assert verdict.words.startswith("not measurable")
    assert verdict.p_value is None
    assert (verdict.taken[Route.FULL].total, verdict.taken[Route.RETRIEVAL].total) == (0, 1)
    assert verdict.shares[Route.RETRIEVAL].total == 0
    assert summarise([]).p_value is None


def test_a_question_asked_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        summarise(_rows(1, 0, 0) * 2)


ANSWERABLE = EvalExample("1", "What is the fee?", "handbook.md", ("35",), True)
UNANSWERABLE = EvalExample("2", "Who owns the quay?", "handbook.md", (), False)


def test_compare_asks_each_question_both_ways(small_fathom: Fathom) -> None:
    seen: list[Row] = []
    examples = [ANSWERABLE, replace(UNANSWERABLE, document="1")]
    rows = list(compare(examples, small_fathom.service(), small_fathom.store, on_row=seen.append))
    assert [(row.example_id, row.asked) for row in rows] == [
        (name, route) for name in "12" for route in (Route.RETRIEVAL, Route.FULL)
    ]
    assert [row.taken for row in rows] == [row.asked for row in rows]
    assert all(row.verbatim for row in rows)
    assert all(row.prompt_tokens > (row.cached_tokens or 0) >= 0 for row in rows)
    assert all(row.new_tokens > 0 and row.seconds > 0 for row in rows)
    assert seen == rows
    assert summarise(rows).p_value is not None


def test_compare_looks_documents_up_before_it_asks(small_fathom: Fathom) -> None:
    examples = [ANSWERABLE, replace(UNANSWERABLE, document="none")]
    rows = compare(examples, small_fathom.service(), small_fathom.store, routes=[Route.RETRIEVAL])
    with pytest.raises(DocumentNotFoundError):
        next(rows)


@pytest.fixture
def answer(small_fathom: Fathom) -> Answer:
    """Return an answer with its receipt, to put other words in."""
    return replace(small_fathom.service().answer("What is the fee?"), abstained=False, citations=())


def test_markers_and_refusals_score_nothing(small_fathom: Fathom, answer: Answer) -> None:
    text_of = small_fathom.store.text
    said = replace(answer, answer="35 [1] [unverified]")
    row = score(ANSWERABLE, Route.FULL, said, text_of)
    assert (row.correct, row.exact, row.f1) == (True, True, 1.0)
    for word in ("1", "unverified"):
        row = score(replace(ANSWERABLE, answers=(word,)), Route.FULL, said, text_of)
        assert (row.correct, row.exact, row.f1) == (False, False, 0.0)

    refused = replace(answer, answer=CANNOT_ANSWER, abstained=True)
    row = score(replace(ANSWERABLE, answers=("documents",)), Route.FULL, refused, text_of)
    assert (row.correct, row.f1, row.abstained_rightly) == (False, 0.0, False)
    row = score(UNANSWERABLE, Route.FULL, refused, text_of)
    assert (row.correct, row.exact, row.f1, row.abstained_rightly) == (True, True, 1.0, True)
    row = score(UNANSWERABLE, Route.FULL, said, text_of)
    assert (row.correct, row.exact, row.f1, row.abstained_rightly) == (False, False, 0.0, False)


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
