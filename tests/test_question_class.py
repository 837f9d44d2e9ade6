"""What a question asks for: rules, the shipped weights, and the reason that is shown."""

import pytest

from conftest import SHARED_DATA
from eval.fit_question_class import confusion, labelled_questions
from rag.routing.question_class import (
    FEATURES,
    NEEDS_EVERYTHING,
    _weights,
    classify_by_rule,
    classify_question,
    offers_options,
)
from rag.types import QuestionClass


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("How many records are in this file?", QuestionClass.AGGREGATE),
        ("How many articles does the treaty have?", QuestionClass.AGGREGATE),
        ("how many messages did Alice send?", QuestionClass.AGGREGATE),
        ("How often is the harbour mentioned?", QuestionClass.AGGREGATE),
        ("list all chapters", QuestionClass.AGGREGATE),
        ("Give me an overview of the contract.", QuestionClass.SUMMARY),
        ("What are the main themes?", QuestionClass.SUMMARY),
        ("What is the difference between plan A and plan B?", QuestionClass.COMPARISON),
        ("How many times does the report say that it rained?", QuestionClass.AGGREGATE),
        ("Which mill is older, the red one or the green one?", QuestionClass.COMPARISON),
        ("Is the red mill older than the green one?", QuestionClass.COMPARISON),
        ("What is the fee of the berth in the harbour where Ann lives?", QuestionClass.MULTI_HOP),
    ],
)
def test_a_rule_decides_and_quotes_its_words(question: str, expected: QuestionClass) -> None:
    found = classify_by_rule(question)
    assert found is not None
    assert found.question_class is expected
    words = found.reason.split('"')[1]
    assert words in " ".join(question.split())


@pytest.mark.parametrize(
    "question",
    [
        "How many people live in Warsaw?",
        "How many days did the uprising last?",
        "What was the total revenue in 2023?",
        "Who signs the contract?",
    ],
)
def test_a_number_that_a_sentence_states_is_looked_up(question: str) -> None:
    found = classify_question(question)
    assert found.question_class not in NEEDS_EVERYTHING
    assert "%" in found.reason


@pytest.mark.parametrize(
    "question",
    [
        "What is the effective date of the Todos agreement?",
        "What is the governing law of the agreement between Xencor and Aimmune?",
        "What is the term of the lease between Smith and Jones?",
        "What is the distance between Warsaw and Krakow?",
    ],
)
def test_to_name_a_document_or_its_parties_compares_nothing(question: str) -> None:
    assert classify_question(question).question_class is QuestionClass.LOOKUP


def test_what_two_differ_in_or_what_is_between_two_dates_is_compared() -> None:
    for question in ("What changed between 2010 and 2012?", "Between 2010 and 2012, what changed?"):
        assert classify_question(question).question_class is QuestionClass.COMPARISON


@pytest.mark.parametrize(
    ("question", "offers"),
    [
        ("Which is it?\n(A) red\n(B) green", True),
        ("Which is it?\nA. all of them\nB. none\nC. one\n", True),
        ("What stands in section (A) of the contract?", False),
        ("Which is it?\n(B) green\n(C) red", False),
        ("Which is it?\n(A) red", False),
    ],
)
def test_options_are_seen_and_say_nothing_of_the_class(question: str, offers: bool) -> None:
    assert offers_options(question) is offers
    if offers:
        stem = question.partition("\n")[0]
        assert classify_question(question) == classify_question(stem)


def test_the_weights_are_those_of_the_features_and_classes() -> None:
    weights = _weights()
    assert list(weights["features"]) == list(FEATURES)
    classes = {label.value for label in QuestionClass}
    assert set(weights["bias"]) == classes
    assert all(set(row) == classes for row in weights["features"].values())


def test_a_long_question_of_one_character_costs_nothing() -> None:
    assert classify_question("a " * 50_000).question_class is QuestionClass.LOOKUP
    assert classify_question("how many " * 5_000)
    assert classify_question("which is more, " * 2_000)
    assert not offers_options("(A) x\n" * 5_000)
    assert classify_question("between-" * 2_500)
    assert classify_question("a-" * 25_000)


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="no shared data beside the project")
def test_few_lookups_of_the_test_split_are_taken_for_more() -> None:
    table = confusion(list(labelled_questions(SHARED_DATA, "test")))
    lookups = table["lookup"]
    wrong = sum(lookups.get(label.value, 0) for label in NEEDS_EVERYTHING)
    assert wrong < 0.01 * sum(lookups.values())
    assert table["summary"]["summary"] >= 0.85 * sum(table["summary"].values())
