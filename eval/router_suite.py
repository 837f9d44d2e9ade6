"""Questions of every class on documents of several lengths: what the router is judged on.

No public set here asks for counts, lists or comparisons on documents that a CPU can read whole.
So each length has registers, real passages in which twelve facts are planted, with fifteen
questions of four classes; beside them stand real documents: articles (lookups), stories (four
options) and meetings (summaries). Many questions on one document: reading it whole is paid once.

A register of dev shares no passage and no fact with one of test.
"""

from collections.abc import Sequence
from pathlib import Path
from random import Random

from eval.evidence_sets import (
    SPLITS,
    EvidenceDocument,
    ExampleSet,
    load_example_set,
    load_passages,
)
from eval.examples import EvalExample, choose
from eval.metrics import Span
from eval.synthetic import Haystack, SyntheticQuestion, Task, filler_of, plant
from eval.synthetic_words import BIRDS, NAMES, SHEDS
from rag.routing.question_class import classify_question
from rag.types import QuestionClass

# Tokens of a register, about; reckoned in characters, so that it is the same for every model.
LENGTHS = (1_500, 3_000, 6_000)
SETS = ("nq_passages", "qmsum", "quality_mc", "squad2_articles")
_CHARS_PER_TOKEN = 4.3
# Documents of each real set for a register of each length, and the questions asked of one.
_QUESTIONS_OF = {"squad2_articles": 8, "quality_mc": 6, "qmsum": 4}

_CLASSES = {
    Task.LITERAL: QuestionClass.LOOKUP,
    Task.ABSENT: QuestionClass.LOOKUP,
    Task.TWO_HOP: QuestionClass.MULTI_HOP,
    Task.COMPARISON: QuestionClass.COMPARISON,
    Task.COUNT: QuestionClass.AGGREGATE,
    Task.SEVERAL_VALUES: QuestionClass.AGGREGATE,
}
_LETTERS = "AB"


def router_suite(data: Path, split: str, *, size: int = 2) -> ExampleSet:
    """Return the documents of one split and their questions, each with its class.

    Args:
        data: the folder that holds a folder for each of SETS.
        split: dev or test.
        size: how many registers of each length, and documents of each real set.

    Raises:
        ReadError: if a set is missing or damaged.
    """
    passages = filler_of(
        "\n\n".join(row["passage"] for row in load_passages(data / SETS[0], split))
    )
    documents: list[EvidenceDocument] = []
    examples: list[EvalExample] = []
    real = [_real_documents(data / name, split) for name in SETS[1:]]
    for number in range(size):  # so that a run that is ended early has some of everything
        found = [_register(num_tokens, number, split, passages) for num_tokens in LENGTHS]
        for document, asked in found + [one[number] for one in real if number < len(one)]:
            documents.append(document)
            examples += asked
    return ExampleSet(tuple(documents), tuple(examples))


def of_classes(suite: ExampleSet, classes: Sequence[QuestionClass]) -> ExampleSet:
    """Return the questions of these classes, and the documents that they are asked of.

    The wording tells the class of a question that comes without one.
    """
    asked = [
        example
        for example in suite.examples
        if (example.question_class or classify_question(example.question).question_class) in classes
    ]
    about = {example.document for example in asked}
    return ExampleSet(tuple(d for d in suite.documents if d.id in about), tuple(asked))


def _real_documents(
    folder: Path, split: str
) -> list[tuple[EvidenceDocument, Sequence[EvalExample]]]:
    """Return a set's documents, shortest first, each with some questions; of meetings summaries."""
    whole = load_example_set(folder, split)
    by_document: dict[str, list[EvalExample]] = {}
    for example in whole.examples:
        question_class = classify_question(example.question).question_class
        if folder.name != "qmsum" or question_class is QuestionClass.SUMMARY:
            by_document.setdefault(example.document, []).append(example)
    limit = _QUESTIONS_OF[folder.name]
    return [
        (document, choose(by_document[document.id], documents=None, limit=limit, seed=0))
        for document in sorted(whole.documents, key=lambda document: len(document.text))
        if document.id in by_document
    ]


# ---- registers ----------------------------------------------------------------------------------

# The questions of dev, and those of test in other words: what is tuned to the wording of one shows.
_WORDS = (
    {
        "crate": "Where is the crate of {0} kept?",
        "lamp": "What is the number of the lamp in {0}?",
        "chain": "What is the number of the lamp in the shed where the crate of {0} is kept?",
        "compare": "Which lamp has the higher number, the one in {0} or the one in {1}?",
        "rooms": "Which rooms does {0} have a key to? Name all of them.",
        "lamps": "List all lamp numbers in the text.",
        "count": "How many times does the text say that a {0} came down on a jetty?",
    },
    {
        "crate": "In which shed is the crate of {0}?",
        "lamp": "Which number has the lamp in {0}?",
        "chain": "Which number has the lamp of the shed that the crate of {0} is in?",
        "compare": "Is the lamp number of {0} higher than that of {1}, or is that of {1} higher?",
        "rooms": "Name every room to which {0} has a key.",
        "lamps": "What are all the numbers of lamps in the text?",
        "count": "How often did a {0} come down on a jetty, according to the text?",
    },
)


def _register(
    num_tokens: int, number: int, split: str, passages: Sequence[str]
) -> tuple[EvidenceDocument, Sequence[EvalExample]]:
    """Return a document of about so many tokens, and its questions."""
    name = f"register-{num_tokens}-{number}"
    random = Random(f"{split} {name}")
    facts, questions = _facts_and_questions(random, SPLITS.index(split))
    register = plant(
        facts,
        questions,
        num_tokens,
        random,
        count_tokens=_about_tokens,
        count_prompt=lambda text, question: _about_tokens(text + question.question),
        filler=passages,
    )
    asked = [
        _as_example(f"{name}-{n}", name, question, _span(register, facts, question), random)
        for n, question in enumerate(questions)
    ]
    return EvidenceDocument(name, name, register.text), asked


def _facts_and_questions(
    random: Random, half: int
) -> tuple[list[str], tuple[SyntheticQuestion, ...]]:
    """Return four chains of two facts, two keys and two or three landings, and what they answer.

    Args:
        random: decides every word.
        half: of the words, 0 or 1: dev and test have no name in common.
    """
    words = _WORDS[half]
    names = random.sample(NAMES[half::2], 9)
    sheds = random.sample(SHEDS[half::2], 4)
    numbers = [f"{first}{random.randrange(1_000):03}" for first in random.sample("123456789", 6)]
    bird, landings = random.choice(BIRDS[half::2]), random.choice((2, 3))
    crates, lamps, rooms = names[:4], numbers[:4], numbers[4:]
    holder, other = names[4:6]
    facts = [f"The crate of {a} is kept in the shed called {b}." for a, b in _pairs(crates, sheds)]
    facts += [
        f"The lamp in the shed called {a} has the number {b}." for a, b in _pairs(sheds, lamps)
    ]
    facts += [f"{holder} has a key to the room {room}." for room in rooms]
    facts += [f"A {bird} came down on the jetty of {name}." for name in names[6 : 6 + landings]]

    def ask(
        task: Task,
        question: str,
        answers: Sequence[str],
        about: Sequence[int],
        options: Sequence[str] = (),
    ) -> SyntheticQuestion:
        return SyntheticQuestion(task, question, "", tuple(answers), tuple(options), tuple(about))

    lookups = [ask(Task.LITERAL, words["crate"].format(crates[n]), [sheds[n]], [n]) for n in (0, 1)]
    lookups += [
        ask(Task.LITERAL, words["lamp"].format(sheds[n]), [lamps[n]], [4 + n]) for n in (2, 3)
    ]
    lookups.append(ask(Task.ABSENT, words["crate"].format(other), [], []))
    chains = [
        ask(
            Task.TWO_HOP,
            words["chain"].format(crates[n]),
            [lamps[n]],
            [n, 4 + n],
        )
        for n in range(4)
    ]
    comparisons = []
    for a, b in ((0, 1), (1, 2), (2, 3)):
        higher, lower = (a, b) if lamps[a] > lamps[b] else (b, a)  # of four digits both
        comparisons.append(
            ask(
                Task.COMPARISON,
                words["compare"].format(sheds[a], sheds[b]),
                [sheds[higher]],
                [4 + a, 4 + b],
                [sheds[higher], sheds[lower]],
            )
        )
    end = len(facts)
    aggregates = [
        ask(
            Task.SEVERAL_VALUES,
            words["rooms"].format(holder),
            rooms,
            (8, 9),
        ),
        ask(Task.SEVERAL_VALUES, words["lamps"], lamps, range(4, 8)),
        ask(
            Task.COUNT,
            words["count"].format(bird),
            [("two", "three")[landings - 2], str(landings)],
            range(10, end),
        ),
    ]
    return facts, (*lookups, *chains, *comparisons, *aggregates)


def _span(
    register: Haystack, facts: Sequence[str], question: SyntheticQuestion
) -> tuple[Span, ...]:
    """Return where the one fact that answers stands; several are no alternatives: nothing."""
    if len(question.facts) != 1:
        return ()
    fact = facts[question.facts[0]]
    start = register.text.index(fact)
    return ((start, start + len(fact)),)


def _as_example(
    name: str,
    document: str,
    question: SyntheticQuestion,
    evidence: tuple[Span, ...],
    random: Random,
) -> EvalExample:
    """Return a question as the comparison asks it: of two options one is to be named."""
    answers, metric = question.answers, "contains"
    options: dict[str, str] = {}
    if question.task is Task.SEVERAL_VALUES:  # all of them, and few others
        answers, metric = (", ".join(question.answers),), "number"
    elif question.task is Task.COMPARISON:
        both = random.sample(question.options, 2)
        options = dict(zip(_LETTERS, both, strict=True))
        answers, metric = (_LETTERS[both.index(question.answers[0])],), "option"
    return EvalExample(
        id=name,
        question=question.question,
        document=document,
        answers=answers,
        answerable=bool(answers),
        evidence=evidence,
        options=options,
        metric=metric,
        question_class=_CLASSES[question.task],
    )


def _pairs(left: Sequence[str], right: Sequence[str]) -> list[tuple[str, str]]:
    return list(zip(left, right, strict=True))


def _about_tokens(text: str) -> int:
    return round(len(text) / _CHARS_PER_TOKEN)
