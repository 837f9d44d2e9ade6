"""What the router is judged on: questions of every class, and the slices of what came of them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import SHARED_DATA
from eval.arms import Arm
from eval.bench.router_slices import judge_slices, slices_card
from eval.evidence_sets import SPLITS, ExampleSet
from eval.examples import EvalExample, load_examples
from eval.journal import ANSWERED, DOES_NOT_FIT, Journal, Row
from eval.metrics import contains_answer, number_match
from eval.router_suite import LENGTHS, of_classes, router_suite
from eval.scoring import score_row
from rag.types import (
    Answer,
    AnswerMode,
    KVBytes,
    QuestionClass,
    ReadExtent,
    Receipt,
    Route,
    Seconds,
)

HAS_DATA = pytest.mark.skipif(not SHARED_DATA.exists(), reason="no shared data beside the project")


@pytest.fixture(scope="module")
def suites() -> dict[str, ExampleSet]:
    return {split: router_suite(SHARED_DATA, split, size=1) for split in SPLITS}


@HAS_DATA
@pytest.mark.parametrize("split", SPLITS)
def test_every_class_is_asked_and_the_text_holds_the_answers(
    suites: dict[str, ExampleSet], split: str, tmp_path: Path
) -> None:
    suite = suites[split]
    texts = {document.id: document.text for document in suite.documents}
    assert {example.document for example in suite.examples} == set(texts)
    asked = {e.question_class for e in suite.examples if e.document.startswith("register")}
    assert asked == set(QuestionClass) - {QuestionClass.SUMMARY}
    for example in suite.examples:
        text = texts[example.document]
        for start, end in example.evidence if example.answerable else ():
            if example.metric == "contains":
                assert contains_answer(text[start:end], example.answers)
        if example.document.startswith("register") and example.metric == "number":
            (values,) = example.answers
            assert all(text.count(value) == 1 for value in values.split(", "))
            assert number_match(f"They are {values}.", example.answers)
    path = tmp_path / "examples.jsonl"
    path.write_text("\n".join(json.dumps(example.to_json()) for example in suite.examples))
    assert tuple(load_examples(path)) == suite.examples


@HAS_DATA
def test_dev_and_test_share_no_words_and_lengths_are_those_asked_for(
    suites: dict[str, ExampleSet],
) -> None:
    dev, test = (
        {e.question for e in suites[s].examples if e.document.startswith("register")}
        for s in SPLITS
    )
    assert not dev & test
    for suite in suites.values():
        registers = [d for d in suite.documents if d.id.startswith("register")]
        assert [round(len(d.text) / 4.3, -2) for d in registers] == pytest.approx(LENGTHS, rel=0.1)
    again = router_suite(SHARED_DATA, "dev", size=2)
    assert again.documents[: len(suites["dev"].documents)] == suites["dev"].documents


@HAS_DATA
def test_questions_of_one_class_are_asked_of_the_documents_that_have_any(
    suites: dict[str, ExampleSet],
) -> None:
    part = of_classes(suites["dev"], [QuestionClass.COMPARISON])
    registers = [e for e in part.examples if e.document.startswith("register")]
    assert {e.question_class for e in registers} == {QuestionClass.COMPARISON}
    assert len(registers) == 3 * len(LENGTHS)
    assert {d.id for d in part.documents} == {e.document for e in part.examples}
    assert {e.id for e in part.examples} < {e.id for e in suites["dev"].examples}
    (summary,) = {e.document for e in of_classes(suites["dev"], [QuestionClass.SUMMARY]).examples}
    assert not summary.startswith("register")


# ---- slices -------------------------------------------------------------------------------------


def _example(name: str, question_class: str) -> EvalExample:
    return EvalExample(
        name, "Which?", f"document {name[-1]}", ("yes",), True, question_class=question_class
    )


def _row(example: EvalExample, arm: Arm, *, right: bool, tokens: int, length: int = 3_000) -> Row:
    receipt = Receipt(
        id="r",
        route=Route.FULL,
        reason="",
        question_class=QuestionClass.LOOKUP,
        gates=(),
        read=ReadExtent(1, 1, 1, 1, ""),
        prompt_tokens=tokens,
        cached_tokens=tokens // 2,
        new_tokens=1,
        kv_bytes=KVBytes(0, 0),
        seconds=Seconds(0.0, 0.0, None, 0.0, 0.0),
        escalations=(),
        model="m",
        embedder="e",
        prompt_sha256="",
        mode=AnswerMode.WRITTEN,
    )
    answer = Answer("yes" if right else "red", abstained=False, citations=(), receipt=receipt)
    return Row(
        example_id=example.id,
        arm=arm,
        outcome=ANSWERED,
        reason="",
        document=example.document,
        document_tokens=length,
        num_chars=9,
        num_chunks=1,
        gold=(),
        shown=None,
        ranked=(),
        prompt="",
        answer=answer,
        verbatim=True,
        seconds=1.0,
    )


def _journal(scores: dict[str, dict[Arm, bool]], examples: dict[str, EvalExample]) -> Journal:
    """Return rows that are right as told; the router's prompts are a quarter of full's."""
    tokens = {Arm.HYBRID: 1_000, Arm.FULL: 4_000, Arm.ROUTER: 1_000}
    rows = [
        _row(examples[name], arm, right=right, tokens=tokens[arm])
        for name, by_arm in scores.items()
        for arm, right in by_arm.items()
    ]
    return Journal((), tuple(rows))


def test_the_router_is_compared_with_the_better_route_of_each_slice() -> None:
    names = [f"{kind}{n}" for kind in ("a", "b") for n in range(20)]
    examples = {name: _example(name, "lookup" if name[0] == "a" else "multi-hop") for name in names}
    # Of lookups full is right and the router with it; of chains hybrid is, and the router never.
    scores = {
        name: {Arm.HYBRID: name[0] == "b", Arm.FULL: name[0] == "a", Arm.ROUTER: name[0] == "a"}
        for name in names
    }
    slices = judge_slices(list(examples.values()), _journal(scores, examples))
    by_place = {(part.length, part.question_class): part for part in slices}
    assert set(by_place) == {
        ("", ""),
        ("2-4k tokens", ""),
        *((length, kind) for length in ("", "2-4k tokens") for kind in ("lookup", "multi-hop")),
    }
    lookups, chains = by_place["", "lookup"], by_place["", "multi-hop"]
    assert (lookups.full, lookups.hybrid, lookups.router) == (1.0, 0.0, 1.0)
    assert lookups.router_less_better.mean == 0.0
    assert lookups.words == "no difference shown"  # twenty questions cannot show a point
    assert chains.router_less_better.mean == -1.0
    assert chains.words == "below"
    assert (chains.num_questions, chains.num_documents) == (20, 10)
    assert (chains.router_prompt_tokens, chains.full_computed_tokens) == (1_000, 2_000)
    assert "below" in slices_card(slices)
    assert slices_card(slices).splitlines()[1].split()[-1] == "shown"


def test_a_question_counts_once_every_way_has_answered_it() -> None:
    examples = {name: _example(name, "lookup") for name in ("a1", "a2")}
    arms = dict.fromkeys((Arm.HYBRID, Arm.FULL, Arm.ROUTER), True)
    journal = _journal({"a1": arms, "a2": arms}, examples)
    last = replace(journal.rows[-2], outcome=DOES_NOT_FIT, answer=None)
    rows = (*journal.rows[:-2], last, journal.rows[-1])
    (whole, *_) = judge_slices(list(examples.values()), Journal((), rows))
    assert whole.num_questions == 1


def test_the_class_that_is_known_goes_before_the_wording() -> None:
    example = _example("a1", "aggregate")
    row = _row(example, Arm.FULL, right=True, tokens=1)
    classes = [
        scored.question_class
        for one in (example, replace(example, question_class=""))
        if (scored := score_row(one, row))
    ]
    assert classes == ["aggregate", "lookup"]
