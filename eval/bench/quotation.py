"""Does the quotation hold the answer? Verbatim answers over whole documents, scored and timed."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

import numpy as np
from scipy.stats import binomtest

from eval.bench.retrieval import CachedEmbedder, ingested_library
from eval.evidence_sets import EvidenceQuestion, EvidenceSet
from eval.metrics import contains_answer, exact_match, token_f1
from eval.statistics import Interval, cluster_bootstrap
from rag.answering.answerable import answer_probability, likeliest_sentences
from rag.answering.quotation import (
    Quotation,
    quote,
    sentence_beside,
)
from rag.answering.sentence_choice import Sentence
from rag.lm.engine import Engine, GenerationDone, Prompt
from rag.retrieval.embedding import Embedder
from rag.settings import Settings

FREE_TOKENS = 40
_GOLDEN = (5**0.5 - 1) / 2  # its multiples fill an interval more evenly than any other's
_BORDER = 0.5  # between answering and declining, where as many questions have an answer as not
_FREE_EVERY = 15  # questions between two measurements of free generation
_COVERAGES = tuple(tenth / 10 for tenth in range(1, 11))

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class QuotedRow:
    """One question: what was shown, whether it holds the answer, what it took.

    `contains` is of all that is shown, `first_contains` of the quoted sentence alone; `words` are
    those shown. `f1` and `exact` are of the span, None where the model read nothing. `seconds` is
    wall-clock time, retrieval included; `free_seconds` that of decoding 40 tokens after the same
    prompt, None where not measured.
    """

    id: str
    document: str
    answerable: bool
    contains: bool
    first_contains: bool
    f1: float | None
    exact: bool | None
    words: int
    probability: float
    seconds: float
    free_seconds: float | None


@dataclass(frozen=True, slots=True)
class QuotationReport:
    """One set. `wilson` holds the 95% intervals that take questions for independent.

    `risk` gives, for the share of all questions that is answered, surest first, the share of those
    answered whose quotation does not hold the answer. `balanced_accuracy` is of answering what can
    be answered and declining the rest; None without questions that cannot.
    """

    name: str
    num_answerable: int
    num_unanswerable: int
    num_documents: int
    contains: Interval
    first_contains: Interval
    f1: Interval | None
    exact: Interval | None
    wilson: dict[str, tuple[float, float]]
    words_mean: float
    words_p90: float
    seconds_p50: float
    seconds_p95: float
    free_seconds_p50: float | None
    balanced_accuracy: float | None
    answers_what_can_be: float | None
    declines_what_cannot: float | None
    risk: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return the set's part of the JSON line."""
        return asdict(self)


def bench_quotation(
    evidence: EvidenceSet,
    unanswerable: Sequence[EvidenceQuestion] = (),
    *,
    embedder: Embedder,
    engine: Engine,
    settings: Settings,
    read: bool = True,
    cache_folder: Path | None = None,
    on_progress: Progress | None = None,
    on_row: Callable[[QuotedRow], None] | None = None,
) -> QuotationReport:
    """Ingest one set's documents, ask every question of its whole document, score what is shown.

    Args:
        evidence: documents and questions with answers.
        unanswerable: questions on the same documents that they do not answer.
        embedder: embeds chunks, sentences and questions.
        engine: the language model.
        settings: chunk length, number of candidates; its home is not touched.
        read: let the model choose the span of a question that has an answer; without it the
            sentences are shown as they are ranked, which is also what tells whether there is one.
        cache_folder: where vectors of chunks are kept between runs; None keeps none.
        on_progress: called with the stage, what is done of it and its total.
        on_row: called with each row, e.g. to save it.
    """
    rows: list[QuotedRow] = []
    progress = on_progress or (lambda stage, done, total: None)
    pairs = zip_longest(evidence.questions, unanswerable)
    questions = [question for pair in pairs for question in pair if question]
    with TemporaryDirectory(prefix="fathom-bench-") as folder:
        library = settings.model_copy(update={"home": Path(folder), "database_url": None})
        store, retrievers, documents = ingested_library(
            evidence, embedder, library, None, cache_folder, progress
        )
        retriever = retrievers["hybrid"]
        if cache_folder and not read:  # nothing is timed, so nothing need be embedded twice
            retriever = retriever.with_embedder(CachedEmbedder(embedder, cache_folder))
        for number, question in enumerate(questions, start=1):
            document = documents[question.document]
            begun = time.perf_counter()
            hits = retriever.retrieve(
                question.question, [document], num_candidates=settings.num_candidates
            )
            ranked = likeliest_sentences(
                question.question,
                hits,
                [document],
                store=store,
                similarities=retriever.similarities,
            )
            quotation = None
            if read and question.answers:  # whether there is one, the sentences say
                quotation = quote(
                    question.question,
                    ranked,
                    engine,
                    max_prompt_tokens=settings.retrieval_tokens,
                    stop=Event(),
                )
            seconds = time.perf_counter() - begun
            is_timed = number % _FREE_EVERY == 1 and quotation is not None
            free = _free_seconds(engine, quotation) if is_timed and quotation else None
            rows.append(_row(question, ranked, quotation, seconds, free))
            if on_row:
                on_row(rows[-1])
            progress("asking", number, len(questions))
    return summarise(evidence, rows)


def summarise(evidence: EvidenceSet, rows: Sequence[QuotedRow]) -> QuotationReport:
    """Return the report on rows; no model is needed."""
    asked = [row for row in rows if row.answerable]
    others = [row for row in rows if not row.answerable]
    clusters = [row.document for row in asked]
    free = [row.free_seconds for row in rows if row.free_seconds is not None]
    right = [row.answerable and row.contains for row in rows]
    order = sorted(range(len(rows)), key=lambda n: -rows[n].probability)
    answered = [row.probability >= _BORDER for row in asked]
    declined = [row.probability < _BORDER for row in others]
    balanced = (np.mean(answered) + np.mean(declined)) / 2 if others else None
    words = [row.words for row in asked]
    seconds = [row.seconds for row in rows]
    return QuotationReport(
        name=evidence.name,
        num_answerable=len(asked),
        num_unanswerable=len(others),
        num_documents=len({row.document for row in rows}),
        contains=cluster_bootstrap([float(row.contains) for row in asked], clusters),
        first_contains=cluster_bootstrap([float(row.first_contains) for row in asked], clusters),
        f1=_mean([(row.f1, row.document) for row in asked if row.f1 is not None]),
        exact=_mean([(float(r.exact), r.document) for r in asked if r.exact is not None]),
        wilson={
            "contains": _wilson([row.contains for row in asked]),
            "first_contains": _wilson([row.first_contains for row in asked]),
        },
        words_mean=round(float(np.mean(words)), 1),
        words_p90=round(float(np.percentile(words, 90)), 1),
        seconds_p50=round(float(np.median(seconds)), 3),
        seconds_p95=round(float(np.percentile(seconds, 95)), 3),
        free_seconds_p50=round(float(np.median(free)), 3) if free else None,
        balanced_accuracy=None if balanced is None else round(float(balanced), 4),
        answers_what_can_be=round(float(np.mean(answered)), 4) if others else None,
        declines_what_cannot=round(float(np.mean(declined)), 4) if others else None,
        risk={
            f"{coverage:.1f}": round(
                1
                - float(np.mean([right[n] for n in order[: max(1, round(coverage * len(rows)))]])),
                4,
            )
            for coverage in _COVERAGES
        },
    )


def spread(questions: Sequence[EvidenceQuestion], limit: int | None) -> list[EvidenceQuestion]:
    """Return `limit` questions at even distances, in an order whose beginnings are spread as well.

    So every document has its share of them, and of those asked before a run was ended.
    """
    wanted = len(questions) if limit is None else min(limit, len(questions))
    evenly = [questions[n * len(questions) // wanted] for n in range(wanted)]
    by_place = sorted(range(wanted), key=lambda turn: turn * _GOLDEN % 1)
    return [evenly[place] for place in np.argsort(by_place)]


def with_questions(evidence: EvidenceSet, questions: Sequence[EvidenceQuestion]) -> EvidenceSet:
    """Return the set with other questions on its documents."""
    return replace(evidence, questions=tuple(questions))


def card(report: QuotationReport) -> str:
    """Return the set's table for people."""
    lines = [
        f"{report.name}: {report.num_answerable} questions with an answer,"
        f" {report.num_unanswerable} without, {report.num_documents} documents",
        f"  what is shown holds the answer  {_percent(report.contains)}"
        f"  ({report.words_mean:.0f} words, 90% within {report.words_p90:.0f})",
        f"  its first sentence alone        {_percent(report.first_contains)}",
        f"  seconds a question              {report.seconds_p50:.2f}, 95% within"
        f" {report.seconds_p95:.2f}"
        + (
            f"; {FREE_TOKENS} free tokens {report.free_seconds_p50:.2f}"
            if report.free_seconds_p50 is not None
            else ""
        ),
    ]
    if report.f1 is not None:
        f1 = report.f1
        lines.append(
            f"  F1 of the span                  {f1.mean:.3f} [{f1.low:.3f}, {f1.high:.3f}]"
        )
    if report.balanced_accuracy is not None:
        lines.append(
            f"  answers or declines rightly     {report.balanced_accuracy:.1%} balanced:"
            f" {report.answers_what_can_be:.1%} of what can be answered,"
            f" {report.declines_what_cannot:.1%} of what cannot declined"
        )
    return "\n".join(lines)


def _row(
    question: EvidenceQuestion,
    ranked: Sequence[Sentence],
    quotation: Quotation | None,
    seconds: float,
    free: float | None,
) -> QuotedRow:
    quoted = quotation.sentence if quotation else next(iter(ranked), None)
    other = sentence_beside(quoted, ranked) if quoted else None
    shown = [sentence.text for sentence in (quoted, other) if sentence]
    return QuotedRow(
        id=question.id,
        document=question.document,
        answerable=bool(question.answers),
        contains=any(contains_answer(text, question.answers) for text in shown),
        first_contains=contains_answer(shown[0], question.answers) if shown else False,
        f1=token_f1(quotation.text, question.answers) if quotation else None,
        exact=exact_match(quotation.text, question.answers) if quotation else None,
        words=sum(len(text.split()) for text in shown),
        probability=answer_probability(question.question, ranked) if ranked else 0.0,
        seconds=seconds,
        free_seconds=free,
    )


def _free_seconds(engine: Engine, quotation: Quotation) -> float | None:
    """Return the seconds of decoding 40 tokens after the prompt, from as many as were written."""
    if not quotation.prompt_ids:
        return None
    prompt = Prompt((), len(quotation.prompt_ids), quotation.prompt_ids)
    *_, done = engine.generate(prompt, max_new_tokens=FREE_TOKENS, stop=Event())
    assert isinstance(done, GenerationDone)
    if done.new_tokens < 2:
        return None
    return done.decode_seconds / (done.new_tokens - 1) * FREE_TOKENS


def _mean(values: Sequence[tuple[float, str]]) -> Interval | None:
    if not values:
        return None
    return cluster_bootstrap([value for value, _ in values], [document for _, document in values])


def _wilson(values: Sequence[bool]) -> tuple[float, float]:
    interval = binomtest(sum(values), len(values)).proportion_ci(method="wilson")
    return round(float(interval.low), 4), round(float(interval.high), 4)


def _percent(interval: Interval) -> str:
    return f"{interval.mean:.1%} [{interval.low:.1%}, {interval.high:.1%}]"
