"""Scores and intervals against numbers worked by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from eval.compare import Row, compare, summarise
from eval.examples import EvalExample, load_examples
from eval.metrics import contains_answer, exact_match, token_f1
from rag.errors import ReadError
from rag.types import Route
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
        ("anything", ["the"], False),
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


GOOD: dict[str, Any] = {
    "id": "1",
    "question": "q",
    "document": "d",
    "answers": ["a"],
    "answerable": True,
}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"id": 7}, "id is 7; expected str"),
        ({"answers": "a"}, "answers is 'a'; expected list"),
        ({"answers": [" "]}, "not a word"),
        ({"answers": []}, "answerable is True with 0 answers"),
        ({"answerable": False}, "answerable is False with 1 answers"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, change: dict[str, Any], fault: str) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(GOOD | change) + "\n")
    with pytest.raises(ReadError, match="line 3") as caught:
        load_examples(path)
    assert fault in caught.value.message


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match="cannot be read"):
        load_examples(tmp_path / "none.jsonl")
    path = tmp_path / "examples.jsonl"
    path.write_text("{")
    with pytest.raises(ReadError, match="line 1: is not a JSON object"):
        load_examples(path)


def _rows(only_full: int, only_retrieval: int, both: int) -> list[Row]:
    outcomes = [(True, False)] * only_full + [(False, True)] * only_retrieval
    outcomes += [(True, True)] * both
    return [
        Row(str(n), route, route, correct, 0.0, False, True, 1, 1.0)
        for n, pair in enumerate(outcomes)
        for route, correct in zip((Route.FULL, Route.RETRIEVAL), pair, strict=True)
    ]


def test_mcnemar_by_hand() -> None:
    verdict = summarise(_rows(1, 5, 4))
    assert verdict.p_value == pytest.approx(2 * 7 / 64)  # 2 (C(6,0) + C(6,1)) / 2^6
    assert verdict.words.startswith("no difference shown")
    assert (verdict.shares[Route.FULL].correct, verdict.shares[Route.RETRIEVAL].correct) == (5, 9)
    assert summarise(_rows(0, 10, 0)).words.startswith("retrieval is better")
    assert summarise(_rows(10, 0, 3)).words.startswith("full is better")


def test_wilson_by_hand() -> None:
    share = summarise(_rows(5, 5, 0)).shares[Route.FULL]
    assert (share.low, share.high) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_a_route_that_was_not_taken_does_not_count() -> None:
    rows = [
        Row("1", Route.FULL, Route.RETRIEVAL, True, 1.0, False, True, 1, 1.0),
        Row("1", Route.RETRIEVAL, Route.RETRIEVAL, True, 1.0, False, True, 1, 1.0),
    ]
    assert summarise(rows).words.startswith("not measurable")


def test_compare_asks_each_question_both_ways(small_fathom: Fathom) -> None:
    examples = [EvalExample("1", "What is the fee?", "handbook.md", ("35",), True)]
    rows = list(compare(examples, small_fathom.service(), small_fathom.store))
    assert [row.asked for row in rows] == list(Route)
    assert [row.taken for row in rows] == list(Route)
    assert all(row.verbatim for row in rows)
