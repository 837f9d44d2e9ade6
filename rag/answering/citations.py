"""From an answer's sentences to the verbatim sentences of the documents that support them.

A small model's own markers are hints, not proof. Each statement is matched with the sentences it
was shown; the one that shares most of its weighty words becomes the quotation, cut from the stored
text by its offsets, so it is verbatim by construction, and it is read again to prove it. A
statement that no sentence supports is marked; so is one whose words stand only where the text
speaks of something else than the question.

What a model concludes (an option, yes, the higher of two) no sentence says. It is marked, too, and
shown with the sentences that speak of it; where none does, it has no support.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rag.answering.conclusions import (
    QuestionForm,
    claim,
    form_of,
    is_option,
    says_which,
    spelled_out,
    without_yes_or_no,
)
from rag.answering.context import page_at, section_at
from rag.routing.question_class import comparatives
from rag.sentences import line_sentence_spans
from rag.store.documents import DocumentStore
from rag.types import Citation, ContextPassage, Document

UNVERIFIED = "[unverified]"
# Share of a statement's weighty words that its quotation must hold: docs/decisions/0006.
MIN_SUPPORT = 0.5
# Share of the question's weighty words that must stand in the quotation or beside it. Measured on
# 1,174 dev questions of SQuAD 2.0: 1.6% of the true sentences fall below, 86% of borrowed ones.
MIN_RELEVANCE = 0.25
# Share of all words of a statement that decides a comparison that a sentence must hold to say it:
# one that names a side does not make it the higher.
MIN_COMPARED = 0.8
# Sentences that a conclusion is shown with.
MOST_PREMISES = 3

_MARKER = re.compile(r"\s*\[(\d{1,3})\]")
# What anyone who reads an answer takes for a marker of ours.
_LIKE_A_MARKER = re.compile(rf"\[(\d+|{UNVERIFIED.strip('[]')})\]")
# The number of an item, which is the list's own.
_ITEM = re.compile(r"(?:[-*•]\s+)?(\d{1,3})[.)]\s+(?=\S)")
_WORD = re.compile(r"\w+")
_COMMON = frozenset(
    "a an and are as at be been but by can did do does for from had has have how if in into is it"
    " its may must not of on or shall should so such than that the their them then there these"
    " they this to was were what when where which who why will with would you your".split()
)


@dataclass(frozen=True, slots=True)
class CitedText:
    """The answer with its markers renumbered from 1, and the citations they stand for.

    `num_unverified` statements are marked; `num_concluded` of them are conclusions, and stand with
    the sentences that speak of them.
    """

    text: str
    citations: tuple[Citation, ...]
    num_unverified: int
    num_concluded: int = 0


@dataclass(frozen=True, slots=True)
class _Sentence:
    passage: ContextPassage
    start: int  # in the document
    end: int
    words: frozenset[str]
    words_around: frozenset[str]  # its own, and those of the sentence before and after

    @property
    def text(self) -> str:
        passage = self.passage.passage
        return passage.text[self.start - passage.start : self.end - passage.start]


def resolve_citations(
    answer: str, question: str, passages: Sequence[ContextPassage], store: DocumentStore
) -> CitedText:
    """Return the answer with one verified citation after each statement that has support.

    Args:
        answer: what the model wrote, with or without `[n]` markers.
        question: its words count too, less than the answer's own, when quotations compete.
        passages: what the prompt showed.
        store: where the quotation is read again.
    """
    sentences = [s for passage in passages for s in _sentences(passage)]
    weights = _inverse_frequencies(sentences)
    form = form_of(question)
    question_words = frozenset(_words(form.stem))
    numbers: dict[tuple[int, int, int], int] = {}
    citations: list[Citation] = []
    parts: list[str] = []
    unverified = concluded = 0
    answer = spelled_out(answer, form)
    statements = split_sentences(answer)
    if not _words(_MARKER.sub("", answer)):
        # a bare number, or nothing: the passage it points at speaks for itself
        pointed_at = {int(n) for n in _MARKER.findall(answer)}
        statements = _quotation(question_words, pointed_at, sentences, weights)
    for statement in statements:
        claimed = {int(n) for n in _MARKER.findall(statement)}
        bare = without_markers(_MARKER.sub("", statement)).strip()
        if not _words(bare):
            continue
        item = _ITEM.match(bare)
        said = bare[item.end() :] if item else bare
        best = _best_support(claim(said, form), question_words, claimed, sentences, weights)
        shown = [best] if best else []
        is_said = best is not None and _says(best, said, form, weights)
        if not is_said and form.may_conclude:
            shown = _premises(said, best, form, question_words, sentences, weights)
            concluded += bool(shown)
        marks = []
        for sentence in shown:
            key = (sentence.passage.passage.document.id, sentence.start, sentence.end)
            if key not in numbers:
                numbers[key] = len(citations) + 1
                citations.append(_citation(numbers[key], sentence, store))
            marks.append(f"[{numbers[key]}]")
        if not is_said:
            unverified += 1
            marks.append(UNVERIFIED)
        parts.append(" ".join([bare, *marks]))
    return CitedText(" ".join(parts), tuple(citations), unverified, concluded)


def without_markers(text: str) -> str:
    """Return the text with the bracketed numbers that it brings along in round brackets.

    A document that writes "[7]" would otherwise put a marker into an answer that points at nothing,
    or at what it does not say. The citation's own quote stays as it is.
    """
    return _LIKE_A_MARKER.sub(r"(\1)", text)


def nearest_citations(
    question: str, passages: Sequence[ContextPassage], store: DocumentStore
) -> tuple[Citation, ...]:
    """Return the sentence shown that shares most of the question's weighty words, as marker 1.

    It is for a person whose question was not answered; none if the passages speak of other things.
    """
    sentences = [s for passage in passages for s in _sentences(passage)]
    weights = _inverse_frequencies(sentences)
    asked_about = frozenset(_words(question)) & weights.keys()

    def shared(sentence: _Sentence) -> float:
        beside = _weight(asked_about & sentence.words_around, weights)
        return _weight(asked_about & sentence.words, weights) + beside / 2

    relevant = [s for s in sentences if _is_relevant(s, asked_about, weights)]
    best = max(relevant, key=shared, default=None) if asked_about else None
    return (_citation(1, best, store),) if best else ()


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text, stripped; markers of ours after a full stop stay with it.

    So does the number of a list's item with the item. One that does not count up from 1 says
    something itself: "35. It is due in May."
    """
    pieces: list[str] = []
    num_items = 0
    for start, end in line_sentence_spans(text):
        piece = text[start:end].replace("\n", " ")
        while pieces and (found := _LIKE_A_MARKER.match(piece)):
            pieces[-1] += f" {found[0]}"
            piece = piece[found.end() :].strip()
        if item := _ITEM.match(piece):
            if int(item[1]) == num_items + 1:
                num_items += 1
            else:
                pieces.append(item[0].strip())
                piece = piece[item.end() :]
        if piece:
            pieces.append(piece)
    return pieces


def _sentences(numbered: ContextPassage) -> list[_Sentence]:
    passage = numbered.passage
    spans: list[tuple[int, int]] = []
    words: list[frozenset[str]] = [frozenset()]
    for start, end in line_sentence_spans(passage.text):
        if found := frozenset(_words(passage.text[start:end])):
            spans.append((passage.start + start, passage.start + end))
            words.append(found)
    words.append(frozenset())
    return [
        _Sentence(numbered, start, end, words[n], words[n - 1] | words[n] | words[n + 1])
        for n, (start, end) in enumerate(spans, start=1)
    ]


def _best_support(
    statement: str,
    question_words: frozenset[str],
    claimed: set[int],
    sentences: Sequence[_Sentence],
    weights: dict[str, float],
) -> _Sentence | None:
    words = frozenset(_words(statement))
    if not words:
        return None
    # what the answer says beyond the question is what must be proved
    own = words - question_words or words
    total = _weight(own, weights)
    asked_about = question_words & weights.keys()  # "summarise" stands in no text
    best, best_score = None, 0.0
    for sentence in sentences:
        support = _weight(own & sentence.words, weights) / total
        if support < MIN_SUPPORT or not _is_relevant(sentence, asked_about, weights):
            continue
        context = _weight(question_words & sentence.words, weights)
        context /= _weight(question_words, weights) or 1.0
        score = support + 0.5 * context + (0.2 if sentence.passage.marker in claimed else 0.0)
        if score > best_score:
            best, best_score = sentence, score
    return best


def _says(
    sentence: _Sentence, statement: str, form: QuestionForm, weights: dict[str, float]
) -> bool:
    """Say whether a sentence that supports a statement says it; a bare yes or no none does.

    What decides a comparison is said only where the sentence compares, too: it must hold nearly all
    words of the statement, and the question's own "higher".
    """
    said = claim(statement, form)
    if not says_which(said, form):
        return bool(_words(without_yes_or_no(said, form)))
    compared = comparatives(form.stem) | comparatives(said)
    words = compared.union(_words(said))
    nearly_all = MIN_COMPARED * _weight(words, weights)
    return bool(compared) and _weight(words & sentence.words, weights) >= nearly_all


def _premises(
    statement: str,
    best: _Sentence | None,
    form: QuestionForm,
    question_words: frozenset[str],
    sentences: Sequence[_Sentence],
    weights: dict[str, float],
) -> list[_Sentence]:
    """Return the few sentences that a conclusion speaks of, in the order of the text.

    Together they hold everything that it says beyond the question; where it says no more than the
    question does, half of that. An option is worded by the asker, so any word of it will do. A
    summary tells what stands in the text in other words, whatever its question names: half of its
    own will do. None where they do not. Of a comparison each side that is left is shown, too.
    """
    said = without_yes_or_no(claim(statement, form), form)
    words = frozenset(_words(said))
    own = words - question_words
    asked_about = question_words & weights.keys()
    relevant = sentences
    if not form.is_summary:
        relevant = [s for s in sentences if asked_about and _is_relevant(s, asked_about, weights)]
    if not relevant:
        return []
    target = own or words or question_words
    least = 1.0 if own and not form.is_summary else MIN_SUPPORT
    if is_option(said, form):
        least = 0.0
    found = [best] if best else _covering(target, relevant, [], asked_about, weights, 0.0)
    held = frozenset[str]().union(*(s.words for s in found))
    is_enough = best or _weight(target & held, weights) >= least * _weight(target, weights)
    if not found or not is_enough:
        return []
    if form.is_comparison:
        sides = frozenset(_words(" ".join(form.options.values()))) & weights.keys() or asked_about
        found = _covering(sides, relevant, found, asked_about, weights, MIN_RELEVANCE)
    return [sentence for sentence in sentences if sentence in found]


def _covering(
    target: frozenset[str],
    sentences: Sequence[_Sentence],
    found: Sequence[_Sentence],
    asked_about: frozenset[str],
    weights: dict[str, float],
    least_share: float,
) -> list[_Sentence]:
    """Return what was found and the sentences that add most of a target's words to it.

    Each adds at least a share of what is left; among equals it is the one that holds most of the
    question.
    """

    def adds(sentence: _Sentence) -> tuple[float, float]:
        context = _weight(asked_about & sentence.words, weights)
        return _weight(left & sentence.words, weights), context

    found = [*found]
    left = target.difference(*(sentence.words for sentence in found))
    while len(found) < MOST_PREMISES:
        best = max(sentences, key=adds)
        gain = _weight(left & best.words, weights)
        if gain <= 0.0 or gain < least_share * _weight(left, weights):
            break
        found.append(best)
        left -= best.words
    return found


def _is_relevant(
    sentence: _Sentence, asked_about: frozenset[str], weights: dict[str, float]
) -> bool:
    least = MIN_RELEVANCE * _weight(asked_about, weights)
    return _weight(asked_about & sentence.words_around, weights) >= least


def _quotation(
    question_words: frozenset[str],
    pointed_at: set[int],
    sentences: Sequence[_Sentence],
    weights: dict[str, float],
) -> list[str]:
    """Return the sentence nearest to the question, of the passages pointed at if there are any."""
    eligible = [s for s in sentences if s.passage.marker in pointed_at] or list(sentences)
    best = max(eligible, key=lambda s: _weight(question_words & s.words, weights), default=None)
    if best is None or not question_words & best.words:
        return []
    return [" ".join(best.text.split())]


def verified_citation(
    marker: int, document: Document, start: int, end: int, quote: str, store: DocumentStore
) -> Citation:
    """Return the citation of `[start, end)` of a document, which is read again to prove it."""
    citation = Citation(
        marker=marker,
        document=document.id,
        title=document.title,
        version=document.version,
        page=page_at(store.pages(document.id), start),
        section=section_at(store.sections(document.id), start),
        start=start,
        end=end,
        quote=quote,
        verified=False,
    )
    return replace(citation, verified=store.text(document.id, start, end) == quote)


def _citation(marker: int, sentence: _Sentence, store: DocumentStore) -> Citation:
    document = sentence.passage.passage.document
    return verified_citation(marker, document, sentence.start, sentence.end, sentence.text, store)


def _words(text: str) -> list[str]:
    return [w for w in (m.lower() for m in _WORD.findall(text)) if w not in _COMMON]


def _inverse_frequencies(sentences: Sequence[_Sentence]) -> dict[str, float]:
    counts = Counter(word for sentence in sentences for word in sentence.words)
    return {word: math.log(1 + len(sentences) / count) for word, count in counts.items()}


def _weight(words: frozenset[str], weights: dict[str, float]) -> float:
    # a word that stands nowhere in the passages weighs as much as the rarest one that does
    rarest = max(weights.values(), default=1.0)
    return sum(weights.get(word, rarest) for word in words)
