"""What a question asks for: rules on its wording; where none is sure, a small linear classifier.

The classifier is a softmax over the named features below, with the weights of
`question_weights.json`, which `python -m eval.fit_question_class` writes. "How many people live in
Warsaw?" asks for a number that a sentence states, "How many records are in this file?" for one that
nobody wrote down: only the second is an aggregate.
"""

import json
import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rag.types import QuestionClass

NEEDS_EVERYTHING = frozenset({QuestionClass.AGGREGATE, QuestionClass.SUMMARY})
# To read everything costs minutes, so the classifier must be this sure before it asks for it.
LEAST_SHARE = 0.7
# Without one of these features a question asks for no count and no list, whatever else it says.
_COUNTING = frozenset({"how many", "number of", "all", "list", "total"})
# These ask what a whole document says.
_SUMMING = frozenset({"whole", "discussed", "about"})

# What a question calls a document, and the parts that one is made of.
DOCUMENT = (
    r"(?:file|document|text|book|novel|manual|treaty|contract|agreement|report|paper|handbook"
    r"|guide|log|chat|transcript|meeting|table|spreadsheet|workbook|dataset|collection|library)s?"
)
PARTS = (
    r"(?:records|rows|entries|chapters|sections|subsections|articles|clauses|paragraphs|pages"
    r"|slides|headings|messages|turns|e-?mails|functions|methods|bullets|appendi(?:xes|ces)"
    r"|footnotes|columns|sheets)"
)

_COMPARATIVE = (
    r"(?:more|less|fewer|higher|lower|larger|smaller|bigger|greater|longer|shorter|older|younger"
    r"|earlier|later|taller|faster|slower|heavier|lighter|cheaper|better|worse|nearer|farther"
    r"|further|first)"
)

# Tried in order: the first pattern found decides.
_RULES: tuple[tuple[QuestionClass, str, re.Pattern[str]], ...] = tuple(
    (question_class, words, re.compile(pattern, re.I))
    for question_class, words, pattern in (
        (
            QuestionClass.AGGREGATE,
            "it asks to list all of something",
            r"\b(?:list|enumerate|name|give me|show(?: me)?) (?:\w+ )?(?:all|every|each)\b"
            r"|^\W*(?:please )?(?:list|enumerate) the\b|^\W*(?:what|which) are all\b"
            r"|^\W*(?:please )?count (?:the|all|every|how)\b",
        ),
        (
            QuestionClass.AGGREGATE,
            "it asks how often something stands in the text",
            r"\bhow (?:often|many times) (?:is|are|does|do|was|were)\b.*"
            r"\b(?:mention\w*|occurs?|appears?|named|used|repeated)\b"
            rf"|\bhow (?:often|many times) (?:does|do) (?:this|the|these) (?:\w+ )?{DOCUMENT} \w+",
        ),
        (
            QuestionClass.AGGREGATE,
            "it asks for the number of parts of a document",
            rf"\b(?:how many|number of) {PARTS}\b(?! of )"
            r"|\b(?:how many|number of)\b.*\b(?:in|of|on) (?:this|the|these|all) (?:\w+ )?"
            rf"{DOCUMENT}\b"
            rf"|\bhow many\b.*\b(?:does|do) (?:this|the|these) (?:\w+ )?{DOCUMENT}"
            r" (?:have|contain|list|mention|name|include)\b"
            r"|\bhow many [\w ]+ (?:are|is) (?:there|listed|mentioned|recorded|named)\W*$",
        ),
        (
            QuestionClass.SUMMARY,
            "it asks for a summary",
            r"\bsummar(?:y|i[sz]e|ies)\b|\btl;?dr\b|\bin short\b|\b(?:an?|the) overview of\b"
            r"|\bmain (?:discussion )?(?:points?|ideas?|topics?|themes?|arguments?|findings?)\b"
            rf"|\bwhat is (?:this|the) (?:\w+ )?{DOCUMENT} (?:all )?about\b"
            rf"|\b(?:whole|entire) {DOCUMENT}\b",
        ),
        (
            QuestionClass.COMPARISON,
            "it asks to compare",
            r"^\W*compare\b|\bhow (?:do|does|did|is|are|was|were)\b.*\bcompared?\b"
            r"|\bversus\b|\bvs\b"
            r"|\bdiffer(?:s|ed)?\b|\bdifferences? between\b|\bsimilarit\w*|\bhow similar\b"
            rf"|^\W*(?:which|who|what)\b[^,]{{0,200}}\b{_COMPARATIVE}\b[^,]{{0,200}},[^,]*\bor\b"
            r"|^\W*(?:is|are|was|were|do|does|did|has|have)\b[^,]{0,200}"
            rf"\b{_COMPARATIVE}\b[^,]{{0,200}}\bthan\b",
        ),
        (
            QuestionClass.MULTI_HOP,
            "one thing is described by another",
            r"\b(?:who|which|what)\b.{1,300}?\b(?:whose|(?:of|in|at|on|from|with|by) the \w+"
            r" (?:that|who|which|where))\b",
        ),
    )
)

# One thing that two have: to ask of "the contract between A and B" compares nothing.
_OF_TWO = (
    r"(?:agreement|contract|treaty|lease|licen[cs]e|deal|pact|settlement|merger|partnership|dispute"
    r"|lawsuit|case|litigation|war|battle|border|distance|meeting|marriage|correspondence)s?"
)

# What the classifier sees: each is 1 where its pattern is found.
FEATURES: dict[str, re.Pattern[str]] = {
    name: re.compile(pattern, re.I)
    for name, pattern in {
        "who": r"\bwho(?:m|se)?\b",
        "when": r"\bwhen\b|\bwhat (?:year|date|day|month)\b",
        "where": r"\bwhere\b",
        "which": r"\bwhich\b",
        "what": r"\bwhat\b",
        "why": r"\bwhy\b|\bfor what reason\b",
        "how do": r"\bhow (?:do|does|did)\b",
        "how much": r"\bhow (?:much|long|far|old|large|big|tall)\b",
        "how many": r"\bhow many\b",
        "how many did": r"\bhow many\b.*\b(?:did|has|have|had|was|were|will|can)\b",
        "units": r"\bhow many (?:\w+ )?(?:people|years?|days?|hours?|minutes?|months?|miles?"
        r"|percent|meters?|metres?|feet|dollars?|shares?|inhabitants?|members?|students?|soldiers?)\b",
        "there are": r"\b(?:are|were) there\b|\bare (?:listed|mentioned|named|given)\b",
        "in this": rf"\b(?:in|of|on|across) (?:this|these|the) (?:\w+ )?{DOCUMENT}\b",
        "all": r"\ball(?: of)? (?:the|its|their)\b|\bevery\b|\beach\b",
        "list": r"\blist\b|\bcount\b|\benumerate\b",
        "number of": r"\bnumber of\b",
        "total": r"\btotal\b|\bin all\b|\baltogether\b",
        "different": r"\b(?:different|distinct|various)\b",
        "change": r"\bchang(?:e|ed|es|ing)\b|\bevol\w+|\bshift(?:ed|s)?\b",
        "compare": r"\bcompar\w+|\brelative to\b|\bcontrast\w*",
        "difference": r"\bdifferen(?:ce|t|ces|tly)\b|\bdiffer\w*",
        "more or less": r"\b(?:increas|decreas|higher|lower|more|less|larger|smaller|greater)\w*",
        "from to": r"\bfrom\b.*\bto\b"
        rf"|(?:^|\b(?!{_OF_TWO}\W)\w+\W{{1,3}})between\b.*\band\b",
        "two years": r"\b(?:19|20)\d\d\b.*\b(?:19|20)\d\d\b",
        "both": r"\bboth\b|\brespectively\b|\btwo (?:segments?|parts?|characters?)\b",
        "reflect": r"\breflect\w*|\breveal\w*|\billustrat\w*|\bsymboli[sz]\w*",
        "relation": r"\brelation\w*|\binfluenc\w+|\brole\b|\bperception\w*|\battitude\w*",
        "impact": r"\bimpact\w*|\beffects?\b|\baffect\w*|\bcontribut\w+",
        "reason": r"\breasons?\b|\bcaus\w+|\bfactors?\b|\bled to\b|\bleads?\b",
        "would": r"\bwould\b|\bcould\b|\bmight\b|\bif\b",
        "considering": r"\bconsidering\b|\bgiven\b|\bbased on\b|\bdespite\b",
        "and what": r"\band (?:what|how|why|who|which|when|by)\b",
        "share": r"\bpercent\w*|\bproportion\b|\bratio\b|\bportion\b",
        "whole": r"\bwhole\b|\bentire\b|\boverall\b|\bgeneral(?:ly)?\b",
        "discussed": r"\bdiscuss\w*|\btalk(?:ed)? about\b|\btopics?\b|\bmeeting\b|\bdecisions?\b",
        "about": r"\babout\W*$",
        "does": r"\b(?:does|do)\b",
        "did": r"\b(?:did|was|were|had)\b",
        "digits": r"\d",
        "a name inside": r"(?-i:\s[A-Z][a-z]+)",
        "short": r"^\s*(?:\S+\s+){0,6}\S+\s*$",
        "long": r"^\s*(?:\S+\s+){19}\S",
        "no question word": r"^(?!.*\b(?:who|whom|whose|when|where|which|what|why|how)\b)",
    }.items()
}


# "(A) red", "B. green": two lines or more, from A on, that end the question.
_OPTIONS = re.compile(r"(?:^|\n)[ \t]*\(?A[).:] [^\n]+(?:\n+[ \t]*\(?[B-Z][).:] [^\n]+)+\s*\Z")
_OPTION = re.compile(r"^[ \t]*\(?([A-Z])[).:] ([^\n]+)$", re.M)
# "the first quarter" compares nothing
_COMPARES = re.compile(rf"\b(?!first\b)(?:{_COMPARATIVE}|than)\b", re.I)


@dataclass(frozen=True, slots=True)
class ClassifiedQuestion:
    """A question's class, and why: the rule that it matched or the features that weighed most."""

    question_class: QuestionClass
    reason: str


def offers_options(question: str) -> bool:
    """Say whether a question ends in lines of lettered options, of which one is to be chosen."""
    return _OPTIONS.search(question) is not None


def split_options(question: str) -> tuple[str, dict[str, str]]:
    """Return a question without the lettered options that it ends in, and these by letter."""
    found = _OPTIONS.search(question)
    if found is None:
        return question, {}
    options = {letter: words.strip() for letter, words in _OPTION.findall(found.group())}
    return question[: found.start()], options


def comparatives(text: str) -> frozenset[str]:
    """Return the words of a text that compare, in lower case: "higher", "more", "than"."""
    return frozenset(word.lower() for word in _COMPARES.findall(text))


def classify_question(question: str) -> ClassifiedQuestion:
    """Return what a question asks for; English wording only, anything else is a lookup.

    Options to choose from say nothing of it.
    """
    question = _OPTIONS.sub("", question)
    by_rule = classify_by_rule(question)
    return by_rule or classify_by_weights(question)


def classify_by_rule(question: str) -> ClassifiedQuestion | None:
    """Return the class that a rule is sure of, None where none is."""
    for question_class, words, pattern in _RULES:
        if found := pattern.search(question):
            return ClassifiedQuestion(question_class, f"{words} ({_quoted(found.group())})")
    return None


def classify_by_weights(question: str) -> ClassifiedQuestion:
    """Return the class that the classifier finds likeliest; a lookup where it sees nothing."""
    present = present_features(question)
    if not present:
        return ClassifiedQuestion(QuestionClass.LOOKUP, "no word in it says anything else")
    weights = _weights()
    scores = {
        name: weights["bias"][name] + sum(weights["features"][f][name] for f in present)
        for name in weights["bias"]
    }
    highest = max(scores.values())
    total = sum(math.exp(score - highest) for score in scores.values())
    shares = {name: math.exp(score - highest) / total for name, score in scores.items()}
    if not _COUNTING & set(present):
        shares.pop(QuestionClass.AGGREGATE)
    likeliest = max(shares, key=lambda name: shares[name])
    if QuestionClass(likeliest) in NEEDS_EVERYTHING and shares[likeliest] < LEAST_SHARE:
        likeliest = max(
            (n for n in shares if QuestionClass(n) not in NEEDS_EVERYTHING),
            key=lambda name: shares[name],
        )
    weighed = sorted(present, key=lambda f: weights["features"][f][likeliest], reverse=True)
    for_it = [f'"{f}"' for f in weighed[:3] if weights["features"][f][likeliest] > 0]
    return ClassifiedQuestion(
        QuestionClass(likeliest),
        f"no rule fits; likeliest by its wording, {shares[likeliest]:.0%}"
        + (f": {', '.join(for_it)}" if for_it else ""),
    )


def present_features(question: str) -> list[str]:
    """Return the names of the features that a question has.

    That a document is named says something of a question that counts or sums up, and nothing of
    others: "the date of the agreement" is as much a lookup as "the date".
    """
    present = [name for name, pattern in FEATURES.items() if pattern.search(question)]
    if "in this" in present and not (_COUNTING | _SUMMING) & set(present):
        present.remove("in this")
    return present


@cache
def _weights() -> Any:  # noqa: ANN401 - the JSON of eval/fit_question_class.py
    path = Path(__file__).with_name("question_weights.json")
    return json.loads(path.read_text(encoding="utf-8"))


def _quoted(words: str) -> str:
    shown = " ".join(words.split())
    return f'"{shown}"' if len(shown) <= 60 else f'"{shown[:57]}..."'
