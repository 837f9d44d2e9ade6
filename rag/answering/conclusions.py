"""What a question lets a model conclude: one of its options, yes or no, one of what is compared.

No sentence says such an answer, however right it is: "the second", "yes", "B". Nor does one say a
summary, which tells in few words what stands in many. It is told here by
the wording of question and answer, without a look at any text; English only, as the classes are.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from rag.routing.question_class import DOCUMENT, classify_question, comparatives, split_options
from rag.types import QuestionClass

_YES_OR_NO = re.compile(
    r"^\W*(?:is|are|am|was|were|do|does|did|has|have|had|can|could|will|would|shall|should|may|must"
    r"|might)\b(?! you\b)",
    re.I,
)
_SAYS_YES_OR_NO = re.compile(r"^\W*(?:yes|no)\b\W*", re.I)
# "(B)", "B.", "B", "Option B:", "The answer is B)".
_LETTER = re.compile(
    r"^\W*?(?i:(?:the )?(?:correct |right |best )?(?:answer|option)(?: is)?:?\s+)?"
    r"(?:\(([A-Z])\)|([A-Z])(?=[.):,]|\W*$))[\s.):,]*"
)
# "According to the balance sheet," says where it stands; "according to the captain," is a claim.
_TEXT = (
    rf"(?:{DOCUMENT}|(?:passage|story|narrative|excerpt|context|information|statement|sheet|schedule"
    r"|section|note|filing)s?)"
)
_SOURCE = re.compile(
    r"^\W*(?:(?:according to|as (?:stated|shown|described|mentioned|reported|noted) in)"
    rf" (?:the|this|these) (?:[\w'’ -]{{0,60}} )?{_TEXT}\b[^,.;:!?\d]{{0,60}}"
    rf"|(?:in|based on) (?:the|this|these) (?:\w+ )?{_TEXT}),\s+(?=\S)",
    re.I,
)
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class QuestionForm:
    """How a question may be answered.

    `stem` is the question without its options; `options` are theirs by letter, if it has any.
    `may_conclude` says that the answer may be one that no single sentence says: of options, yes or
    no, a comparison, a chain, a summary. A lookup is answered by one sentence, or not at all.
    """

    stem: str
    options: Mapping[str, str]
    is_comparison: bool
    is_yes_or_no: bool
    is_summary: bool
    may_conclude: bool


def form_of(question: str) -> QuestionForm:
    """Return how a question may be answered, by its wording."""
    stem, options = split_options(question)
    question_class = classify_question(stem).question_class
    is_yes_or_no = _YES_OR_NO.match(stem) is not None
    several = question_class not in (QuestionClass.LOOKUP, QuestionClass.AGGREGATE)
    return QuestionForm(
        stem=stem,
        options=options,
        is_comparison=question_class is QuestionClass.COMPARISON,
        is_yes_or_no=is_yes_or_no,
        is_summary=question_class is QuestionClass.SUMMARY,
        may_conclude=bool(options) or is_yes_or_no or several,
    )


def spelled_out(answer: str, form: QuestionForm) -> str:
    """Return an answer whose letter of an option has the option's words beside it."""
    found = _LETTER.match(answer)
    if found is None:
        return answer
    letter = found[1] or found[2]
    if letter not in form.options:
        return answer
    return f"({letter}) {answer[found.end() :].strip() or form.options[letter]}"


def claim(statement: str, form: QuestionForm) -> str:
    """Return what a statement says beside the letter of an option, which is the asker's own.

    Nor is it a part of it where it says that it stands: "according to the balance sheet".
    """
    found = _LETTER.match(statement) if form.options else None
    return _SOURCE.sub("", statement[found.end() :] if found else statement)


def without_yes_or_no(statement: str, form: QuestionForm) -> str:
    """Return what is beside the yes or no of a statement; for what it speaks of, not its proof."""
    return _SAYS_YES_OR_NO.sub("", statement) if form.is_yes_or_no else statement


def is_option(statement: str, form: QuestionForm) -> bool:
    """Say whether a statement has no word that one of the options has not."""
    words = _words(statement)
    return bool(words) and any(words <= _words(option) for option in form.options.values())


def says_which(statement: str, form: QuestionForm) -> bool:
    """Say whether a statement decides a comparison: it compares, or names a side and no more."""
    if not form.is_comparison:
        return False
    names_a_side = _words(statement) <= _words(form.stem) or is_option(statement, form)
    return names_a_side or bool(comparatives(statement))


def _words(text: str) -> frozenset[str]:
    return frozenset(word.lower() for word in _WORD.findall(text))
