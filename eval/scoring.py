"""From a raw row to its scores. No model: a better scorer never asks a question again."""

import re
from dataclasses import dataclass

from eval.examples import EvalExample
from eval.journal import ANSWERED, Row
from eval.metrics import (
    RANKS,
    Span,
    chosen_option,
    citation_precision,
    citation_recall,
    contains_answer,
    crag_score,
    declines,
    evidence_read,
    exact_match,
    is_shotgun,
    number_match,
    recall_at_ranks,
    token_f1,
)
from rag.answering.citations import UNVERIFIED
from rag.answering.outcome import NEAREST
from rag.routing.question_class import classify_question
from rag.types import Answer

TOKEN_BUDGETS = (256, 512, 1024, 2048, 4096)
RIGHT = 0.5
# Gold stretches longer than this are read in part: their share counts, not whether half is there.
_LONG_SPAN = 2000  # characters
_MARKS = re.compile(rf"\[\d+\]|{re.escape(UNVERIFIED)}")
_LENGTHS = (2_000, 4_000, 8_000, 16_000, 32_000, 64_000, 128_000)


@dataclass(frozen=True, slots=True)
class Scored:
    """One answered question by one arm.

    `score` is by the example's metric, 0 to 1: of a question that the document does not answer, 1
    for declining; of one that it does, 0 for declining. `correct` is a score of at least a half.
    `contains`, `exact` and `f1` stand beside it whatever the metric: exact and F1 of the quoted
    stretch where the answer is a quotation. `evidence_in_prompt` is the share of the evidence that
    was shown, None where no evidence is known or what was shown is not. `recall` and
    `recall_at_tokens` are of the ranking, by RANKS and TOKEN_BUDGETS. `confidence` is the score of
    the nearest chunk. Slices are by `length`, `depth` (fifth of the document that holds the
    evidence), `question_class` and `answerable`.
    """

    example_id: str
    arm: str
    document: str
    score: float
    correct: bool
    contains: bool
    exact: bool
    f1: float
    words: int
    answerable: bool
    abstained: bool
    crag: float
    verbatim: bool
    num_citations: int
    citation_precision: float | None
    citation_recall: float | None
    evidence_in_prompt: float | None
    recall: tuple[float, ...]
    recall_at_tokens: tuple[float, ...]
    confidence: float
    prompt_tokens: int
    computed_tokens: int
    new_tokens: int
    kv_bytes: int | None
    seconds: float
    route: str
    escalated: bool
    length: str
    depth: str
    question_class: str


def score_row(example: EvalExample, row: Row) -> Scored | None:
    """Return the scores of one row, None where there is no answer to score."""
    if row.outcome != ANSWERED or row.answer is None:
        return None
    answer, gold = row.answer, row.gold
    text = answer_words(answer)
    stretch = quoted_stretch(answer) or text
    abstained = answer.abstained or declines(text, example.answers)
    counts = example.answerable and not abstained
    score = _score(example, text) if counts else float(abstained is not example.answerable)
    cited = [(c.start, c.end) for c in answer.citations]
    known = gold if example.answerable else ()
    long_spans = any(end - start > _LONG_SPAN for start, end in gold)
    shown = None
    if gold and row.shown is not None and example.answerable:
        shown = evidence_read(row.shown, gold, long_spans=long_spans)
    ranked = [(found.start, found.end) for found in row.ranked]
    receipt = answer.receipt
    return Scored(
        example_id=row.example_id,
        arm=row.arm,
        document=row.document,
        score=score,
        correct=score >= RIGHT,
        contains=counts and contains_answer(text, example.answers),
        exact=exact_match(stretch, example.answers) if counts else bool(score),
        f1=token_f1(stretch, example.answers) if counts else score,
        words=len(text.split()),
        answerable=example.answerable,
        abstained=abstained,
        crag=crag_score(score, abstained=abstained, answerable=example.answerable),
        verbatim=row.verbatim,
        num_citations=len(cited),
        citation_precision=None if abstained else citation_precision(cited, known),
        citation_recall=None if abstained else citation_recall(cited, known),
        evidence_in_prompt=shown,
        recall=tuple(recall_at_ranks(ranked, known, long_spans=long_spans)) if known else (),
        recall_at_tokens=_recall_at_tokens(row, known, long_spans) if known else (),
        confidence=max((found.score for found in row.ranked), default=0.0),
        prompt_tokens=receipt.prompt_tokens,
        computed_tokens=receipt.prompt_tokens - (receipt.cached_tokens or 0),
        new_tokens=receipt.new_tokens,
        kv_bytes=receipt.kv_bytes.actual,
        seconds=row.seconds,
        route=f"{receipt.route}, {receipt.mode}",
        escalated=bool(receipt.escalations),
        length=length_bucket(row.document_tokens),
        depth=_depth(gold, row.num_chars),
        question_class=example.question_class or classify_question(example.question).question_class,
    )


def answer_words(answer: Answer) -> str:
    """Return an answer without its citation markers, and without what only leads to them."""
    return _MARKS.sub(" ", answer.answer.replace(NEAREST, " ")).strip()


def length_bucket(num_tokens: int) -> str:
    """Return the slice of a document's length, e.g. `4-8k tokens`; they sort as they grow."""
    low = 0
    for high in _LENGTHS:
        if num_tokens <= high:
            return f"{low:>3}-{high // 1000}k tokens"
        low = high // 1000
    return f"{low:>3}k tokens and more"


def _score(example: EvalExample, text: str) -> float:
    """Return how right a text is that does not decline a question with an answer."""
    if example.metric == "option":
        return float(chosen_option(text, example.options) in example.answers)
    if example.metric == "number":
        return float(number_match(text, example.answers))
    if example.metric == "f1":
        return token_f1(text, example.answers)
    return float(contains_answer(text, example.answers) and not is_shotgun(text, example.answers))


def quoted_stretch(answer: Answer) -> str:
    """Return the stretch that a quotation answers with, "" where the answer is no quotation."""
    for c in answer.citations:
        if c.answer_start is not None and c.answer_end is not None:
            return c.quote[c.answer_start - c.start : c.answer_end - c.start]
    return ""


def _recall_at_tokens(row: Row, gold: tuple[Span, ...], long_spans: bool) -> tuple[float, ...]:
    """Return the evidence within each token budget, filled as the product fills it."""
    found = []
    for budget in TOKEN_BUDGETS:
        read: list[Span] = []
        used = 0
        for chunk in row.ranked:
            if used + chunk.tokens <= budget:
                read.append((chunk.start, chunk.end))
                used += chunk.tokens
        found.append(evidence_read(read, gold, long_spans=long_spans))
    return tuple(found)


def _depth(gold: tuple[Span, ...], num_chars: int) -> str:
    """Return the fifth of the document in which the first evidence begins."""
    if not gold or not num_chars:
        return "unknown"
    fifth = min(4, 5 * min(start for start, _ in gold) // num_chars)
    return f"{20 * fifth}-{20 * (fifth + 1)}%"


NAMES_OF_RECALL = (*(f"@{k}" for k in RANKS), *(f"{n} tokens" for n in TOKEN_BUDGETS))
