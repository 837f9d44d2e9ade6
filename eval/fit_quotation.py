"""The weights of verbatim answers, fitted on questions with known answers: scipy, no torch.

Three fits, each of which can be read off its features: which sentence holds the answer, whether one
does, and which stretch of it is the answer. Only the last needs the model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

from eval.bench.retrieval import CachedEmbedder, ingested_library
from eval.evidence_sets import EvidenceQuestion, EvidenceSet
from eval.metrics import token_f1
from rag.answering.answerable import EVIDENCE, evidence
from rag.answering.quotation import SPAN_FEATURES, candidate_spans
from rag.answering.sentence_choice import (
    FEATURES,
    Candidate,
    candidates,
    rank,
    rank_sentences,
    sentence_features,
)
from rag.lm.engine import Engine
from rag.retrieval.embedding import Embedder
from rag.settings import Settings
from rag.types import Document

# Strengths of the pull towards zero, in units of features divided by their standard deviation;
# chosen by leaving documents out: docs/decisions/0024.
_SENTENCE_RIDGE = 3.0
_SPAN_RIDGE = 8.0
_ANSWERABLE_RIDGE = 1.0
# A span is worth its F1 to this power: half of an answer is worth an eighth of one.
_F1_POWER = 3

Table = npt.NDArray[np.float64]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class QuotationWeights:
    """What `rag/answering/quotation_weights.json` holds; `span` is None where no model read."""

    sentence: dict[str, float]
    answerable: dict[str, float]
    span: dict[str, float] | None


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question, the sentences found for it, what is known of each, and whether it is the one."""

    question: EvidenceQuestion
    found: Sequence[Candidate]
    documents: Sequence[Document]
    features: Table
    gold: npt.NDArray[np.float64]


def fit_quotation(
    sets: Sequence[tuple[EvidenceSet, Sequence[EvidenceQuestion]]],
    *,
    embedder: Embedder,
    settings: Settings,
    engine: Engine | None = None,
    cache_folder: Path | None = None,
    on_progress: Progress | None = None,
) -> QuotationWeights:
    """Return the weights that the questions teach.

    Args:
        sets: each with the questions on its documents that they do not answer.
        embedder: embeds chunks, sentences and questions.
        settings: chunk length, number of candidates, longest prompt.
        engine: reads the sentences that the shipped weights rank highest, for the span's weights.
        cache_folder: where vectors are kept between runs; None keeps none.
        on_progress: called with the stage, what is done of it and its total.
    """
    progress = on_progress or (lambda stage, done, total: None)
    asked_of: list[_Asked] = []
    spans: list[tuple[Table, npt.NDArray[np.float64]]] = []
    for chosen, unanswerable in sets:
        with TemporaryDirectory(prefix="fathom-fit-") as folder:
            library = settings.model_copy(update={"home": Path(folder), "database_url": None})
            store, retrievers, documents = ingested_library(
                chosen, embedder, library, None, cache_folder, progress
            )
            retriever = retrievers["hybrid"]
            if cache_folder:
                retriever = retriever.with_embedder(CachedEmbedder(embedder, cache_folder))
            questions = [*chosen.questions, *unanswerable]
            for number, asked in enumerate(questions, start=1):
                of = [documents[asked.document]]
                hits = retriever.retrieve(
                    asked.question, of, num_candidates=settings.num_candidates
                )
                found = candidates(hits, store)
                gold = np.array([float(_covers(s.start, s.end, asked)) for s in found])
                features = sentence_features(asked.question, found, retriever.similarities)
                asked_of.append(_Asked(asked, found, of, features, gold))
                if engine and asked.spans:
                    ranked = rank_sentences(
                        asked.question,
                        hits,
                        of,
                        store=store,
                        similarities=retriever.similarities,
                    )
                    read = candidate_spans(
                        asked.question,
                        ranked,
                        engine,
                        max_prompt_tokens=settings.retrieval_tokens,
                        stop=Event(),
                    )
                    if read and read.spans:
                        texts = [
                            s.sentence.text[s.start - s.sentence.start : s.end - s.sentence.start]
                            for s in read.spans
                        ]
                        worth = [token_f1(text, asked.answers) ** _F1_POWER for text in texts]
                        spans.append((np.array([s.features for s in read.spans]), np.array(worth)))
                progress("fitting", number, len(questions))
    sentence = conditional_logit(
        [(one.features, one.gold) for one in asked_of if one.question.spans], _SENTENCE_RIDGE
    )
    return QuotationWeights(
        sentence=_named(FEATURES, sentence),
        answerable=fit_answerable(
            [
                (evidence(one.question.question, ranked), bool(one.question.spans))
                for one in asked_of
                if (ranked := rank(one.found, one.features, sentence, one.documents))
            ]
        ),
        span=_named(SPAN_FEATURES, conditional_logit(spans, _SPAN_RIDGE)) if spans else None,
    )


def conditional_logit(
    choices: Sequence[tuple[Table, npt.NDArray[np.float64]]], ridge: float
) -> npt.NDArray[np.float64]:
    """Return the weights w under which what is worth choosing is likeliest to be chosen.

    With x the features of what one question may choose from and v their worth, the sum over
    questions of log(v . softmax(x w)) less ridge |w|^2 / 2 is maximised, features divided by their
    standard deviation meanwhile. A question with nothing worth choosing counts for nothing.

    Source: McFadden, "Conditional logit analysis of qualitative choice behavior", 1974.
    """
    useful = [(x, v) for x, v in choices if v.any()]
    scale = _spread(np.concatenate([x for x, _ in choices]))

    def loss(w: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        total, gradient = ridge * float(w @ w) / 2, ridge * w
        for table, worth in useful:
            x = table / scale
            odds = np.exp(x @ w - (x @ w).max())
            p = odds / odds.sum()
            right = p * worth
            total -= float(np.log(right.sum()))
            gradient -= right @ x / right.sum() - p @ x
        return total, gradient

    fitted = minimize(loss, np.zeros(len(scale)), jac=True, method="L-BFGS-B").x / scale
    return np.asarray(fitted, dtype=np.float64)


def fit_answerable(rows: Sequence[tuple[Sequence[float], bool]]) -> dict[str, float]:
    """Return the weights of the logistic regression of `answerable` on EVIDENCE, and `intercept`.

    Both kinds of question weigh the same in all, so 0.5 is the border of the balanced accuracy.
    """
    x = np.array([evidence for evidence, _ in rows])
    y = np.array([answerable for _, answerable in rows], dtype=float)
    if not 0 < y.mean() < 1:
        raise ValueError("expected questions with an answer and without")
    mean, scale = x.mean(axis=0), _spread(x)
    z = np.column_stack([(x - mean) / scale, np.ones(len(x))])
    each = np.where(y == 1, 0.5 / y.mean(), 0.5 / (1 - y.mean()))

    def loss(w: npt.NDArray[np.float64]) -> float:
        misfit = (each * np.logaddexp(0, -(2 * y - 1) * (z @ w))).sum()
        return float(misfit + _ANSWERABLE_RIDGE * w[:-1] @ w[:-1] / 2)

    w = minimize(loss, np.zeros(z.shape[1])).x
    intercept = round(float(w[-1] - (w[:-1] / scale) @ mean), 4)
    return _named(EVIDENCE, w[:-1] / scale) | {"intercept": intercept}


def _spread(x: Table) -> npt.NDArray[np.float64]:
    """Return each feature's standard deviation, 1 where it never varies."""
    deviation = x.std(axis=0)
    return np.where(deviation > 0, deviation, 1.0)


def _covers(start: int, end: int, question: EvidenceQuestion) -> bool:
    """Say whether a sentence holds more than half of a gold span."""
    return any(
        2 * (min(end, span_end) - max(start, span_start)) > span_end - span_start
        for span_start, span_end in question.spans
    )


def _named(names: Sequence[str], values: npt.NDArray[np.float64]) -> dict[str, float]:
    return {name: round(float(value), 4) for name, value in zip(names, values, strict=True)}
