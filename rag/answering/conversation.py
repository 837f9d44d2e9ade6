"""A follow-up question made to stand alone, so that what is read never depends on a chat's length.

History is read for this alone: it never stands in the prompt that answers, and so cannot push
evidence out of it. A model that may write rewrites; what it writes is taken only if it keeps the
question's words and adds none but the conversation's. Else the question before is put beside the
follow-up, word for word. The person sees the question that was asked. Source: docs/decisions/0031.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Event

from rag.errors import FathomError
from rag.lm.engine import Engine, Message, TextPiece
from rag.retrieval.lexical_score import question_words, stems

# Of the conversation, the newest turns that fit are read, each with the beginning of its answer.
HISTORY_TOKENS = 512
_ANSWER_CHARS = 300
_REWRITTEN_TOKENS = 64

# What stands for something said before, unless the question names it itself: see `leans_on`.
_PRONOUN = re.compile(
    r"\b(?:it|its|they|them|their|theirs|he|him|his|she|her|hers|former|latter"
    r"|th(?:is|at|ose|ese)(?=\W*$|\s+(?:one|ones|too|as well|also)\b)"
    r"|(?:is|are|was|were|does|do|did|about|of|for|with|by|from|after|before|in|on)"
    r" (?:this|that|those)(?=\W*$| \w+ed\b)|there(?=\W*$))\b",
    re.I,
)
# "it" that stands for nothing: "is it true that", "it is allowed to".
_EMPTY_IT = re.compile(
    r"\bit (?:is|was|takes?|took|costs?) (?:\w+ )?(?:to|that|for)\b"
    r"|\b(?:is|was) it \w+ (?:to|that)\b|\b(?:does|did|will) it (?:take|cost)\b",
    re.I,
)
_BEGINS = re.compile(
    r"^\W*(?:(?:and|but|or|also|so|then|what about|how about|what else|who else|anything else"
    r"|how so|how come|the same)\b|(?:why|when|where|who|which|how|since when|until when)\W*$)",
    re.I,
)
_ASKED_AFTER = re.compile(r" \(asked after: (.*)\)$")
_NAMED = re.compile(r"\b(?:the|a|an|each|every|any|some|no)\s+\w+|(?<=\s)[A-Z]\w+")

_INSTRUCTION = (
    "You rewrite the last question of a conversation so that it can be understood alone. Replace"
    " it, they, he, she, this or that by what they stand for. Change nothing else, answer nothing,"
    " and write only the question."
)
_EXAMPLE = (
    Message(
        "user",
        "Question: When was the Nile bridge built?\nAnswer: It was built in 1902.\n\n"
        "Last question: Who designed it?",
    ),
    Message("assistant", "Who designed the Nile bridge?"),
    Message(
        "user",
        "Question: How long is the warranty of the pump?\nAnswer: Two years.\n\n"
        "Last question: And of the valve?",
    ),
    Message("assistant", "How long is the warranty of the valve?"),
)


@dataclass(frozen=True, slots=True)
class Turn:
    """One question of a conversation, as it stood alone, and its answer."""

    question: str
    answer: str


def leans_on(question: str) -> bool:
    """Say whether a question can be understood only with what was said before it."""
    if _BEGINS.search(question):
        return True
    bare = _EMPTY_IT.sub(" ", question)
    return any(not _NAMED.search(bare[: m.start()]) for m in _PRONOUN.finditer(bare))


def stand_alone(
    question: str, history: Sequence[Turn], *, engine: Engine, may_write: bool, stop: Event
) -> str:
    """Return the question as it can be understood alone; itself where it can be already.

    Args:
        question: the last one.
        history: the turns before it, oldest first.
        engine: the language model.
        may_write: whether the model is to be trusted with words of its own.
        stop: ends the rewriting; the question before is then put beside the follow-up.
    """
    if not history or not leans_on(question):
        return question
    if not may_write:
        return _beside(question, history[-1].question)
    before = _newest(history, engine)
    messages = [Message("system", _INSTRUCTION), *_EXAMPLE, Message("user", _ask(before, question))]
    written: list[str] = []
    try:
        prompt = engine.encode_chat(messages)
        for step in engine.generate(prompt, max_new_tokens=_REWRITTEN_TOKENS, stop=stop):
            if isinstance(step, TextPiece):
                written.append(step.text)
    except FathomError:
        written = []  # the question beside the one before it is asked instead
    lines = "".join(written).strip().splitlines()
    rewritten = lines[0].strip().strip("\"'“”") if lines else ""
    if rewritten and is_faithful(rewritten, question, before):
        return rewritten
    return _beside(question, history[-1].question)


def is_faithful(rewritten: str, question: str, history: Sequence[Turn]) -> bool:
    """Say whether a rewritten question keeps the question's words and adds only what was said.

    It must add something: a pronoun was to be replaced.
    """
    own = frozenset(stems(" ".join(question_words(question))))
    now = frozenset(stems(" ".join(question_words(rewritten))))
    said = " ".join(f"{turn.question} {turn.answer}" for turn in history)
    known = own | frozenset(stems(said)) | frozenset(stems(question))
    return own <= now and now <= known and now != own and not leans_on(rewritten)


def _beside(question: str, before: str) -> str:
    """Return a follow-up with the question before it; of a chain, the first and the last."""
    if match := _ASKED_AFTER.search(before):
        first = match[1].split("? ")[0].rstrip("?")
        before = f"{first}? {before[: match.start()]}"
    return f"{question.strip()} (asked after: {before.strip()})"


def _newest(history: Sequence[Turn], engine: Engine) -> list[Turn]:
    """Return the newest turns that fit the budget, at least one, their answers shortened."""
    kept: list[Turn] = []
    left = HISTORY_TOKENS
    for turn in reversed(history):
        short = Turn(turn.question.strip()[:_ANSWER_CHARS], turn.answer.strip()[:_ANSWER_CHARS])
        left -= engine.count_tokens(f"{short.question} {short.answer}")
        if kept and left < 0:
            break
        kept.insert(0, short)
    return kept


def _ask(history: Sequence[Turn], question: str) -> str:
    turns = "\n".join(f"Question: {turn.question}\nAnswer: {turn.answer}" for turn in history)
    return f"{turns}\n\nLast question: {question.strip()}"
