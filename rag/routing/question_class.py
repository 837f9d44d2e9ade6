"""What a question asks for, by rules on its wording."""

import re

from rag.types import QuestionClass

# Tried in order: the first pattern found decides; a question that none matches is a lookup.
_RULES: tuple[tuple[QuestionClass, re.Pattern[str]], ...] = (
    (
        QuestionClass.AGGREGATE,
        re.compile(
            r"\bhow many\b|\bcount\b|\blist (?:all|every|each|the)\b|\ball (?:the|of the)\b"
            r"|\bevery\b|\btotal number\b|\bnumber of\b|\benumerate\b",
            re.I,
        ),
    ),
    (
        QuestionClass.SUMMARY,
        re.compile(
            r"\bsummar\w*|\boverview\b|\bmain (?:points?|ideas?|topics?|themes?)\b|\bin short\b"
            r"|\bwhat is (?:this|the) (?:document|text|book|paper|report) about\b",
            re.I,
        ),
    ),
    (
        QuestionClass.COMPARISON,
        re.compile(r"\bcompar\w*|\bdiffer\w*|\bversus\b|\bvs\b|\bsimilarit\w*", re.I),
    ),
    (
        QuestionClass.MULTI_HOP,
        re.compile(r"\b(?:who|which|what)\b.+\b(?:whose|of the \w+ (?:that|who|which))\b", re.I),
    ),
)

NEEDS_EVERYTHING = frozenset({QuestionClass.AGGREGATE, QuestionClass.SUMMARY})


def classify_question(question: str) -> QuestionClass:
    """Return the class of a question; English wording only, anything else is a lookup."""
    for question_class, pattern in _RULES:
        if pattern.search(question):
            return question_class
    return QuestionClass.LOOKUP
