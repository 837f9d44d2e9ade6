"""The synthetic suite: exact lengths, uniform depths, and answers where they should stand alone."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest
from scipy.stats import ks_2samp, kstest
from Stemmer import Stemmer

from conftest import SHARED_DATA
from eval.metrics import contains_answer
from eval.synthetic import (
    LOOKUPS,
    NUM_FACTS,
    Haystack,
    Mix,
    SyntheticQuestion,
    Task,
    build_haystack,
    exact_score,
    load_filler,
)
from eval.synthetic_words import FILLER, NAMES, NON_LITERAL, SLOTS
from rag.answering.prompt import CANNOT_ANSWER
from rag.errors import FathomError, ReadError

LENGTHS = (512, 2048, 6144)
FRAME = 90  # tokens of a prompt around document, question and the beginning of the reply
LONGEST_SENTENCE = 30

PASSAGES = SHARED_DATA / "nq_passages" / "passages.jsonl.gz"


def count(text: str) -> int:
    """Stand for a tokenizer: words and punctuation."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def count_prompt(text: str, question: SyntheticQuestion) -> int:
    return FRAME + count(text) + count(question.question) + count(question.reply_start)


def build(mix: Mix, tokens: int, seed: int, filler: tuple[str, ...] = ()) -> Haystack:
    return build_haystack(
        mix,
        tokens,
        Random(f"{mix} {tokens} {seed}"),
        count_tokens=count,
        count_prompt=count_prompt,
        filler=filler,
    )


@pytest.fixture(scope="module")
def many() -> dict[int, list[Haystack]]:
    return {tokens: [build(Mix.LOOKUP, tokens, seed) for seed in range(80)] for tokens in LENGTHS}


@pytest.mark.parametrize("mix", Mix)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_the_longest_prompt_has_the_length_asked_for(mix: Mix, tokens: int) -> None:
    for seed in range(5):
        haystack = build(mix, tokens, seed)
        longest = max(count_prompt(haystack.text, question) for question in haystack.questions)
        assert tokens - LONGEST_SENTENCE < longest <= tokens


def test_depth_is_uniform_at_every_length_and_for_every_task(
    many: dict[int, list[Haystack]],
) -> None:
    """C0.7, for the depths of the facts."""
    for tokens, haystacks in many.items():
        depths = [depth for haystack in haystacks for depth in haystack.depths]
        assert kstest(depths, "uniform").pvalue > 0.05, tokens
        # A generator that leaned to one end by as little as this would be seen.
        assert kstest(np.array(depths) ** 1.25, "uniform").pvalue < 0.001
        for task in LOOKUPS:
            of_task = [
                haystack.depth(question)
                for haystack in haystacks
                for question in haystack.questions
                if question.task is task
            ]
            assert kstest(of_task, "uniform").pvalue > 0.01, (tokens, task)


def test_length_says_nothing_about_depth(many: dict[int, list[Haystack]]) -> None:
    """As it does where a benchmark shuffles with one seed: its gold lies at one depth a length."""
    by_length = {
        tokens: [depth for haystack in haystacks for depth in haystack.depths]
        for tokens, haystacks in many.items()
    }
    for tokens in LENGTHS[1:]:
        assert ks_2samp(by_length[LENGTHS[0]], by_length[tokens]).pvalue > 0.05
    lengths = np.repeat(np.log(LENGTHS), [len(by_length[tokens]) for tokens in LENGTHS])
    assert abs(np.corrcoef(lengths, np.concatenate(list(by_length.values())))[0, 1]) < 0.05


def test_each_tenth_of_a_haystack_holds_a_fact(many: dict[int, list[Haystack]]) -> None:
    for haystack in many[6144]:
        tenths = Counter(min(9, int(depth * 10)) for depth in haystack.depths)
        assert len(tenths) >= 9  # a sentence may move one over a border


def test_equal_seeds_give_equal_haystacks_and_others_do_not() -> None:
    assert build(Mix.LOOKUP, 512, 1) == build(Mix.LOOKUP, 512, 1)
    first, second = build(Mix.LOOKUP, 512, 1), build(Mix.LOOKUP, 512, 2)
    assert first.text != second.text
    assert first.questions[0].answers != second.questions[0].answers


def test_every_value_stands_once_and_every_option_stands_in_the_text() -> None:
    for seed in range(20):
        haystack = build(Mix.LOOKUP, 1024, seed)
        assert len(haystack.depths) == NUM_FACTS
        words = Counter(re.findall(r"\w+", haystack.text))
        for question in haystack.questions:
            if question.task is Task.ABSENT:
                assert not question.answers
                key = re.sub(r"^What is the |\?$", "", question.question)
                assert key not in haystack.text
                assert key.split(" of the ")[0] not in haystack.text
                continue
            (gold,) = question.answers
            assert words[gold] == 1
            assert question.options[0] == gold
            assert len({option[0] for option in question.options}) == 5
            assert all(words[option] == 1 for option in question.options)


def test_reasoning_needs_more_than_one_fact() -> None:
    for seed in range(20):
        haystack = build(Mix.REASONING, 1024, seed)
        assert len(haystack.depths) == NUM_FACTS
        for question in haystack.questions:
            assert haystack.depth(question) is None
            if question.task is Task.TWO_HOP:
                name = re.search(r"crate of (\w+)", question.question)
                assert name is not None
                sentences = re.split(r"(?<=\.)\s+", haystack.text)
                (with_name,) = [s for s in sentences if f"crate of {name.group(1)} " in s]
                assert question.answers[0] not in with_name
            if question.task is Task.COUNT:
                told = len(re.findall(r"came down on the jetty", haystack.text))
                assert question.answers == (("two", "three", "four")[told - 2], str(told))
            if question.task is Task.SEVERAL_VALUES:
                assert all(haystack.text.count(value) == 1 for value in question.answers)
                assert len(question.answers) >= 2


def test_filler_holds_nothing_that_could_be_an_answer() -> None:
    words = " ".join([*FILLER, *(word for words in SLOTS.values() for word in words)])
    assert not re.search(r"\d", words)
    assert not contains_answer(words, [*NAMES, "two", "three", "four"])


def test_a_non_literal_question_shares_no_word_with_its_fact() -> None:
    stemmer = Stemmer("english")
    small = set("who is a an the in at near has been to of and not on with it was".split())

    def stems(text: str) -> set[str]:
        words = re.findall(r"[a-z]+", text.replace("{name}", "").lower())
        return set(stemmer.stemWords([word for word in words if word not in small]))

    assert len(NON_LITERAL) >= 30
    for fact, question in NON_LITERAL:
        assert not stems(fact) & stems(question), question


def question_of(task: Task, *answers: str) -> SyntheticQuestion:
    return SyntheticQuestion(task, "?", "", answers, (), ())


@pytest.mark.parametrize(
    ("question", "reply", "score"),
    [
        (question_of(Task.LITERAL, "48173"), " 48173. The road", 1),
        (question_of(Task.LITERAL, "48173"), "48,173", 1),
        (question_of(Task.LITERAL, "48173"), " 481733", 0),
        (question_of(Task.LITERAL, "48173"), "148173 or 4817", 0),
        (question_of(Task.LITERAL, "48173"), "", 0),
        (question_of(Task.NON_LITERAL, "Yuki"), "It is Yuki's.", 1),
        (question_of(Task.SEVERAL_VALUES, "10", "20", "30", "40"), "20 and 40, not 400", 0.5),
        (question_of(Task.COUNT, "three", "3"), " 3.", 1),
        (question_of(Task.COUNT, "three", "3"), "Three times", 1),
        (question_of(Task.COUNT, "three", "3"), "13", 0),
        (question_of(Task.ABSENT), CANNOT_ANSWER, 1),
        (question_of(Task.ABSENT), "48173", 0),
        (question_of(Task.LITERAL, "48173"), CANNOT_ANSWER, 0),
    ],
)
def test_scores_are_of_whole_words(question: SyntheticQuestion, reply: str, score: float) -> None:
    assert exact_score(question, reply) == score


def test_a_length_that_does_not_hold_the_facts_is_an_error() -> None:
    with pytest.raises(FathomError, match="do not hold the 10 facts") as found:
        build(Mix.LOOKUP, 150, 1)
    needed = re.search(r"lengths of ([\d,]+)", found.value.hint)
    assert needed is not None
    build(Mix.LOOKUP, int(needed.group(1).replace(",", "")), 1)


def test_a_real_text_hides_the_facts_without_the_sentences_that_hold_a_value(
    tmp_path: Path,
) -> None:
    kept = [f"Sentence {word} stands here." for word in ("alpha", "beta", "gamma", "delta")]
    # An equal seed draws equal facts, so this sentence names a value of the haystack below.
    spoiled = f"It was {build(Mix.LOOKUP, 512, 1).questions[0].answers[0]} that stood there."
    plain = tmp_path / "plain.txt"
    plain.write_text(" ".join(kept))
    packed = tmp_path / "passages.jsonl.gz"
    lines = [json.dumps({"passage": sentence}) for sentence in kept]
    packed.write_bytes(gzip.compress("\n".join(lines).encode()))
    assert load_filler(plain) == load_filler(packed) == tuple(kept)

    haystack = build(Mix.LOOKUP, 512, 1, (*kept, spoiled))
    assert "Sentence beta stands here. Sentence gamma" in " ".join(haystack.text.split())
    assert spoiled not in haystack.text
    with pytest.raises(FathomError, match="every sentence"):
        build(Mix.LOOKUP, 512, 1, (spoiled,))
    with pytest.raises(ReadError, match="holds no sentence"):
        load_filler(_written(tmp_path / "empty.txt", ""))
    with pytest.raises(ReadError, match="KeyError"):
        load_filler(_written(tmp_path / "other.jsonl", '{"text": "a"}'))


@pytest.mark.skipif(not PASSAGES.is_file(), reason="../shared/data/nq_passages is not here")
def test_real_passages_are_filler_of_any_length() -> None:
    filler = load_filler(PASSAGES)
    haystack = build(Mix.LOOKUP, 6144, 1, filler)
    assert 6000 < count_prompt(haystack.text, haystack.questions[0]) <= 6144
    for question in haystack.questions:
        assert all(haystack.text.count(answer) == 1 for answer in question.answers)


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path
