"""The synthetic suite: facts planted at known depths in a text of known length, and questions.

A haystack is one document of neutral sentences with ten facts in it. Every question about it has
the same prefix, for the document comes first, so one prefill serves them all. Length is counted in
the model's own tokens, with the template around it, and says nothing about depth: each tenth of
the document holds one fact, at a place drawn uniformly within it, and which fact that is is drawn
as well.

Facts are of the kinds that RULER tells apart, in words of Fathom's own; the non-literal ones
follow NoLiMa's idea. Numbers are drawn anew for every haystack.

Source: Hsieh et al., RULER, arXiv:2404.06654; Modarressi et al., NoLiMa, arXiv:2502.05167.
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from random import Random

from eval.metrics import contains_answer
from eval.synthetic_words import (
    ADJECTIVES,
    ATTRIBUTES,
    BIRDS,
    FILLER,
    NAMES,
    NON_LITERAL,
    SHEDS,
    SLOTS,
    THINGS,
)
from rag.answering.prompt import is_refusal
from rag.errors import FathomError, ReadError
from rag.sentences import sentence_spans

# Changed whenever a word, a count or a rule of the suite is: results of two versions differ.
SUITE_VERSION = 1
NUM_FACTS = 10
NUM_OPTIONS = 5

_SENTENCES_PER_PARAGRAPH = 6
_COUNT_WORDS = ("two", "three", "four")
_GZIP_MAGIC = b"\x1f\x8b"
_SLOT = re.compile(r"\{(\w+)\}")


class Task(StrEnum):
    """What a question asks of the text."""

    LITERAL = "literal"  # a value, under a key in the question's own words
    MANY_KEYS = "many keys"  # the same, among facts that differ in the key alone
    NON_LITERAL = "non-literal"  # no word of the question stands in the fact
    TWO_HOP = "two hops"  # one fact leads to the other
    COMPARISON = "comparison"  # which of two values is the higher
    SEVERAL_VALUES = "several values"  # all of them are asked for
    COUNT = "count"  # how often something is told
    ABSENT = "absent"  # not in the text: the right answer is the refusal


# A lookup's evidence is one fact; the effective length of the gate is measured on these.
LOOKUPS = frozenset({Task.LITERAL, Task.MANY_KEYS, Task.NON_LITERAL})


class Mix(StrEnum):
    """Which facts a haystack holds."""

    LOOKUP = "lookup"
    REASONING = "reasoning"


@dataclass(frozen=True, slots=True)
class SyntheticQuestion:
    """One question about a haystack.

    Attributes:
        task: what it asks for.
        question: in words.
        reply_start: how the reply begins; a small model need not find the form, only the value.
        answers: the gold values, all of which must be named; for a count its two spellings, either
            of which will do; empty where the text does not hold the answer.
        options: the gold value first, then others of the same kind that the text holds as well;
            empty where none are to be chosen from.
        facts: which of the haystack's facts hold the answer.
    """

    task: Task
    question: str
    reply_start: str
    answers: tuple[str, ...]
    options: tuple[str, ...]
    facts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Haystack:
    """A document with its questions.

    `depths` are of each fact: the tokens before it over the tokens of the rest of the document, 0
    for a fact that opens it and 1 for one that ends it. `document_tokens` leaves the prompt's frame
    out.
    """

    text: str
    questions: tuple[SyntheticQuestion, ...]
    depths: tuple[float, ...]
    document_tokens: int

    def depth(self, question: SyntheticQuestion) -> float | None:
        """Return the depth of the one fact that holds the answer; None if it is not one."""
        return self.depths[question.facts[0]] if len(question.facts) == 1 else None


def build_haystack(
    mix: Mix,
    num_tokens: int,
    random: Random,
    *,
    count_tokens: Callable[[str], int],
    count_prompt: Callable[[str, SyntheticQuestion], int],
    filler: Sequence[str] = (),
) -> Haystack:
    """Return a haystack whose longest prompt has `num_tokens` tokens, or less by a few sentences.

    Args:
        mix: which facts it holds.
        num_tokens: of a whole prompt, template, question and the beginning of the reply included.
        random: decides every word and place.
        count_tokens: of a text alone.
        count_prompt: of the whole prompt that asks a question about a document.
        filler: sentences of a real text, in order, to use instead of Fathom's own, from a place
            drawn at random; one that holds a value is left out.

    Raises:
        FathomError: if not even the facts fit.
    """
    return plant(
        *_MIXES[mix](random),
        num_tokens,
        random,
        count_tokens=count_tokens,
        count_prompt=count_prompt,
        filler=filler,
    )


def plant(
    facts: Sequence[str],
    questions: tuple[SyntheticQuestion, ...],
    num_tokens: int,
    random: Random,
    *,
    count_tokens: Callable[[str], int],
    count_prompt: Callable[[str, SyntheticQuestion], int],
    filler: Sequence[str] = (),
) -> Haystack:
    """Return a haystack of these facts, each in a part of its own; see `build_haystack`."""
    longest = max(questions, key=lambda question: count_prompt(" ".join(facts), question))
    values = [value for question in questions for value in (*question.answers, *question.options)]
    source = _from_text(filler, values, random) if filler else _own_filler(random)
    order = random.sample(range(len(facts)), len(facts))  # which fact lies in which part
    wanted = [(part + random.random()) / len(facts) for part in range(len(facts))]

    fact_tokens = [count_tokens(" " + fact) for fact in facts]
    sentences: list[str] = []
    tokens: list[int] = []
    room = num_tokens - count_prompt(" ".join(facts), longest)
    while True:
        while room > 0:
            sentence = next(source)
            sentences.append(sentence)
            tokens.append(count_tokens(" " + sentence))
            room -= tokens[-1]
        places = _places(tokens, [fact_tokens[fact] for fact in order], wanted)
        text, starts = _join(
            sentences, [(place, order[n]) for n, place in enumerate(places)], facts
        )
        room = num_tokens - count_prompt(text, longest)
        if room >= 0:
            break
        if not sentences:
            raise FathomError(
                f"{num_tokens:,} tokens do not hold the {len(facts)} facts of a haystack: they and"
                f" the prompt around them take {num_tokens - room:,}",
                hint=f"give lengths of {2 * (num_tokens - room):,} tokens or more",
            )
        while room < 0 and sentences:
            sentences.pop()
            room += tokens.pop()
        room = min(room, 0)  # what is free now is less than a sentence

    total = count_tokens(text)
    depths = tuple(
        min(1.0, count_tokens(text[:start]) / max(1, total - fact_tokens[fact]))
        for fact, start in enumerate(starts)
    )
    return Haystack(text, questions, depths, total)


def load_filler(path: Path) -> tuple[str, ...]:
    """Return the sentences of a text file, or of the `passage` of each line of JSON Lines.

    Args:
        path: the file, gzipped or not; its name says which of the two it is (.jsonl).

    Raises:
        ReadError: if it cannot be read, or holds no sentence.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data.startswith(_GZIP_MAGIC) else data).decode("utf-8")
        if ".jsonl" in path.suffixes:
            lines = text.splitlines()
            text = "\n\n".join(json.loads(line)["passage"] for line in lines if line.strip())
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise ReadError(
            f"{path} cannot be read as filler: {type(error).__name__}: {error}",
            hint="give a text file in UTF-8, or JSON Lines with a passage in each line",
        ) from error
    sentences = filler_of(text)
    if not sentences:
        raise ReadError(f"{path} holds no sentence", hint="give a longer text")
    return sentences


def filler_of(text: str) -> tuple[str, ...]:
    """Return the sentences of a text, each in one line."""
    return tuple(" ".join(text[start:end].split()) for start, end in sentence_spans(text))


def exact_score(question: SyntheticQuestion, reply: str) -> float:
    """Return how right a reply is, 0 to 1: the share of the values that it names as whole words.

    A count is right if either spelling stands in it, a question without an answer if it is refused.
    """
    if question.task is Task.ABSENT:
        return float(is_refusal(reply))
    if question.task is Task.COUNT:
        return float(contains_answer(reply, question.answers))
    named = sum(contains_answer(reply, [answer]) for answer in question.answers)
    return named / len(question.answers)


# ---- facts and questions ------------------------------------------------------------------------

_Made = tuple[list[str], tuple[SyntheticQuestion, ...]]


def _lookups(random: Random) -> _Made:
    """Return four literal facts, four that differ in the key alone, two non-literal; 12 questions.

    Two questions ask for what no fact tells.
    """
    values = _numbers(8, random)
    names = _distinct(NAMES, 6, random)
    attributes = random.sample(ATTRIBUTES, 6)
    things = [
        f"{random.choice(ADJECTIVES)} {thing}".replace("-", " ")
        for thing in random.sample(THINGS, 6)
    ]
    facts, questions = [], []
    for number in range(4):
        stem = f"The {attributes[number]} of the {things[number]} is"
        facts.append(f"{stem} {values[number]}.")
        questions.append(
            SyntheticQuestion(
                Task.LITERAL,
                f"What is the {attributes[number]} of the {things[number]}?",
                stem,
                (values[number],),
                _options(values[number], values, random),
                (number,),
            )
        )
    for number in range(4, 8):
        stem = f"The locker number of {names[number - 4]} is"
        facts.append(f"{stem} {values[number]}.")
        questions.append(
            SyntheticQuestion(
                Task.MANY_KEYS,
                f"What is the locker number of {names[number - 4]}?",
                stem,
                (values[number],),
                _options(values[number], values, random),
                (number,),
            )
        )
    for number, (fact, question) in enumerate(random.sample(NON_LITERAL, 2), start=8):
        name = names[number - 4]
        facts.append(fact.format(name=name))
        stem = f"The person {question[0].lower()}{question[1:-1]} is"
        options = _options(name, names, random)
        questions.append(
            SyntheticQuestion(Task.NON_LITERAL, question, stem, (name,), options, (number,))
        )
    for number in (4, 5):
        asked = f"What is the {attributes[number]} of the {things[number]}?"
        questions.append(SyntheticQuestion(Task.ABSENT, asked, "", (), (), ()))
    return facts, tuple(questions)


def _reasoning(random: Random) -> _Made:
    """Return two chains of two facts, a key with several values, and something told several times.

    The last two take six facts together.
    """
    values = _numbers(8, random)
    names = _distinct(NAMES, 4, random)
    sheds = random.sample(SHEDS, 2)
    told = random.randrange(len(_COUNT_WORDS)) + 2
    several = values[2 : 8 - told]
    facts, questions = [], []
    for number in (0, 1):
        facts += [
            f"The crate of {names[number]} is kept in the shed called {sheds[number]}.",
            f"The lamp in the shed called {sheds[number]} has the number {values[number]}.",
        ]
        questions.append(
            SyntheticQuestion(
                Task.TWO_HOP,
                f"Which number has the lamp in the shed that holds the crate of {names[number]}?",
                "That lamp has the number",
                (values[number],),
                _options(values[number], [*values[:2], *several], random),
                (2 * number, 2 * number + 1),
            )
        )
    begin = len(facts)
    facts += [f"{names[2]} has a key to the room {value}." for value in several]
    questions.append(
        SyntheticQuestion(
            Task.SEVERAL_VALUES,
            f"Which rooms does {names[2]} have a key to? Name all of them.",
            f"{names[2]} has a key to the rooms",
            tuple(several),
            (),
            tuple(range(begin, len(facts))),
        )
    )
    begin = len(facts)
    bird = random.choice(BIRDS)
    facts += [
        f"A {bird} came down on the jetty of {name}." for name in _distinct(NAMES, told, random)
    ]
    word = _COUNT_WORDS[told - 2]
    questions.append(
        SyntheticQuestion(
            Task.COUNT,
            f"How many times does the text tell that a {bird} came down on a jetty?",
            "The number of times is",
            (word, str(told)),
            (word, *(other for other in _COUNT_WORDS if other != word)),
            tuple(range(begin, len(facts))),
        )
    )
    return facts, tuple(questions)


_MIXES: dict[Mix, Callable[[Random], _Made]] = {Mix.LOOKUP: _lookups, Mix.REASONING: _reasoning}


def _numbers(count: int, random: Random) -> list[str]:
    """Return numbers of five digits, no two with the same first digit."""
    firsts = random.sample("123456789", count)
    return [f"{first}{random.randrange(10_000):04}" for first in firsts]


def _distinct(words: Sequence[str], count: int, random: Random) -> list[str]:
    """Return words drawn at random, no two with the same initial."""
    drawn: dict[str, str] = {}
    for word in random.sample(words, len(words)):
        drawn.setdefault(word[0], word)
    return list(drawn.values())[:count]


def _options(gold: str, values: Sequence[str], random: Random) -> tuple[str, ...]:
    """Return the gold value and others, at most NUM_OPTIONS in all."""
    others = [value for value in values if value != gold]
    return (gold, *random.sample(others, min(NUM_OPTIONS - 1, len(others))))


# ---- the text -----------------------------------------------------------------------------------


def _own_filler(random: Random) -> Iterator[str]:
    """Yield neutral sentences without end."""

    def fill(slot: re.Match[str]) -> str:
        name = slot.group(1)
        word = random.choice(SLOTS[name.lower()])
        return word if name.islower() else word[0].upper() + word[1:]

    while True:
        yield _SLOT.sub(fill, random.choice(FILLER))


def _from_text(sentences: Sequence[str], values: Sequence[str], random: Random) -> Iterator[str]:
    """Yield the sentences of a real text in order, over and over, from a place drawn at random."""
    at = random.randrange(len(sentences))
    refused = 0  # in a row
    while refused < len(sentences):
        sentence = sentences[at % len(sentences)]
        at += 1
        refused = refused + 1 if contains_answer(sentence, values) else 0
        if not refused:
            yield sentence
    raise FathomError(
        "every sentence of the text given as filler holds a value that is asked for",
        hint="give another text",
    )


def _places(
    sentence_tokens: Sequence[int], fact_tokens: Sequence[int], wanted: Sequence[float]
) -> list[int]:
    """Return for each fact, in order, how many sentences stand before it.

    Args:
        sentence_tokens: of each sentence.
        fact_tokens: of each fact, in the order in which they will stand.
        wanted: depth of each fact, rising.
    """
    rest = sum(sentence_tokens) + sum(fact_tokens)
    places: list[int] = []
    at = before = facts_before = 0  # sentences, their tokens, and the facts' tokens, so far
    for own, depth in zip(fact_tokens, wanted, strict=True):
        target = depth * (rest - own) - facts_before
        while at < len(sentence_tokens) and before + sentence_tokens[at] / 2 <= target:
            before += sentence_tokens[at]
            at += 1
        places.append(at)
        facts_before += own
    return places


def _join(
    sentences: Sequence[str], placed: Sequence[tuple[int, int]], facts: Sequence[str]
) -> tuple[str, list[int]]:
    """Return the text with the facts in it, and the character at which each fact starts.

    `placed` holds, in order, how many sentences stand before a fact, and which fact it is.
    """
    units: list[tuple[str, int | None]] = []
    done = 0
    for place, fact in placed:
        units += [(sentence, None) for sentence in sentences[done:place]]
        units.append((facts[fact], fact))
        done = place
    units += [(sentence, None) for sentence in sentences[done:]]
    text = ""
    starts = [0] * len(facts)
    for number, (sentence, which) in enumerate(units):
        if number:
            text += " " if number % _SENTENCES_PER_PARAGRAPH else "\n\n"
        if which is not None:
            starts[which] = len(text)
        text += sentence
    return text, starts
