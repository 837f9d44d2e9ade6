"""Fit the router: from questions that both routes answered to two calibrated models.

Documents are what is held out: questions on one document are alike, so a fold of the
cross-validation holds whole documents. The calibration is fitted on predictions for documents
that the model had not seen.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import isotonic_regression, minimize
from scipy.special import expit

from rag.answering.service import AnsweringService
from rag.errors import ReadError, TooFewPairsError
from rag.routing.utility import RightModel, RouteFeatures, RouterWeights
from rag.store.receipts import ReceiptStore
from rag.types import QuestionClass, Route

# Fewer pairs than this say less than the weights that ship: docs/decisions/0025.
FEWEST_PAIRS = 200
_FOLDS = 5
_RIDGE = 1.0
_KNOTS = 12

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LabelledPair:
    """One question that both routes answered; `full` and `retrieval` say how rightly, 0 to 1."""

    model: str
    document: str
    features: RouteFeatures
    full: float
    retrieval: float


def fit_router(
    pairs: Sequence[LabelledPair],
    *,
    fitted_on: str,
    prior: RouterWeights | None = None,
    seed: int = 0,
) -> RouterWeights:
    """Return the two models fitted to the pairs.

    Args:
        pairs: at least FEWEST_PAIRS, of at least as many documents as there are folds. Pairs of
            several language models share all weights but have an intercept each; the mean of
            these is returned.
        fitted_on: where the pairs come from, kept with the weights.
        prior: weights that the new ones are drawn to; by default to 0. Few pairs then change
            little: what many questions have shown of routing is not unlearned.
        seed: of the folds.

    Raises:
        TooFewPairsError: if there are fewer.
    """
    documents = sorted({pair.document for pair in pairs})
    if len(pairs) < FEWEST_PAIRS or len(documents) < _FOLDS:
        raise TooFewPairsError(
            f"{len(pairs)} labelled pairs on {len(documents)} documents; the router is refitted"
            f" from {FEWEST_PAIRS} on {_FOLDS} or more",
            hint="compare more questions by both routes; until then the shipped weights stay",
        )
    values = [pair.features.values() for pair in pairs]
    names = sorted({name for value in values for name in value})
    matrix = np.array([[value[name] for name in names] for value in values])  # [N, F]
    models = sorted({pair.model for pair in pairs})
    group = np.array([[pair.model == model for model in models] for pair in pairs], dtype=float)
    order = np.random.default_rng(seed).permutation(len(documents))
    fold_of = {documents[place]: number % _FOLDS for number, place in enumerate(order)}
    folds = np.array([fold_of[pair.document] for pair in pairs])  # [N]

    def right_model(labels: FloatArray, before: RightModel | None) -> RightModel:
        known = before.weights if before else {}
        drawn_to = np.array([known.get(name, 0.0) for name in names])  # [F]
        unseen = np.empty(len(labels))
        for fold in range(_FOLDS):
            inside = folds != fold
            own, weights = _logistic(matrix[inside], group[inside], labels[inside], drawn_to)
            unseen[~inside] = expit(group[~inside] @ own + matrix[~inside] @ weights)
        own, weights = _logistic(matrix, group, labels, drawn_to)
        return RightModel(
            intercept=round(float(own.mean()), 6),
            weights={n: round(float(w), 6) for n, w in zip(names, weights, strict=True) if w},
            calibration=_calibration(unseen, labels),
        )

    return RouterWeights(
        right_model(np.array([pair.full for pair in pairs]), prior.full if prior else None),
        right_model(
            np.array([pair.retrieval for pair in pairs]), prior.retrieval if prior else None
        ),
        fitted_on,
    )


def _logistic(
    matrix: FloatArray, group: FloatArray, labels: FloatArray, drawn_to: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Return the groups' intercepts [G] and the weights [F] of a ridge logistic regression.

    Labels may be fractions. The penalty is on each weight's distance from `drawn_to`, in units of
    its column's standard deviation.
    """
    num_groups = group.shape[1]
    scale = matrix.std(axis=0)
    used = scale > 1e-9  # a column that never varies says nothing: its weight stays
    scale = np.where(used, scale, 1.0)
    mean = matrix.mean(axis=0)
    standard = (matrix - mean) / scale
    start = drawn_to * scale

    def loss(parameters: FloatArray) -> tuple[float, FloatArray]:
        own, weights = parameters[:num_groups], parameters[num_groups:]
        z = group @ own + standard @ weights
        distance = weights - start
        value = np.sum(np.logaddexp(0, z) - labels * z) + _RIDGE / 2 * np.sum(distance**2)
        error = expit(z) - labels
        return float(value), np.concatenate(
            [group.T @ error, standard.T @ error + _RIDGE * distance]
        )

    begin = np.concatenate([np.zeros(num_groups), start])
    found = minimize(loss, begin, jac=True, method="L-BFGS-B").x
    weights = found[num_groups:] / scale
    return found[:num_groups] - mean @ weights, weights


def _calibration(fitted: FloatArray, labels: FloatArray) -> tuple[tuple[float, float], ...]:
    """Return the points of a non-decreasing curve from fitted to true, at the fitted's quantiles.

    Source: Zadrozny and Elkan 2002, isotonic regression; the steps are joined by lines.
    """
    order = np.argsort(fitted, kind="stable")
    rising = isotonic_regression(labels[order]).x
    parts = np.array_split(np.arange(len(fitted)), min(_KNOTS, len(fitted)))
    points = {
        round(float(fitted[order][part].mean()), 6): round(float(rising[part].mean()), 6)
        for part in parts
    }
    return tuple(sorted(points.items()))


def pairs_from_answers(receipts: ReceiptStore, service: AnsweringService) -> list[LabelledPair]:
    """Return the questions of a library whose route a person overruled, as labels.

    Who asks again by another route was not content: the route asked for is right, if it gave an
    answer, and the one that the router chose is wrong.

    Args:
        receipts: the answers given so far.
        service: tells what the router knew of each question.
    """
    pairs = []
    for question, document_ids, first, last in receipts.overruled():
        right = {first.receipt.route: 0.0, last.receipt.route: float(not last.abstained)}
        pairs.append(
            LabelledPair(
                model=last.receipt.model,
                document=",".join(map(str, document_ids)),
                features=service.features(question, service.documents(document_ids)),
                full=right[Route.FULL],
                retrieval=right[Route.RETRIEVAL],
            )
        )
    return pairs


def load_pairs(path: Path) -> list[LabelledPair]:
    """Return the pairs of a file of JSON lines.

    The names are those of `RouteFeatures`, beside `model`, `document`, `full` and `retrieval`.

    Raises:
        ReadError: naming the first line that is no pair, and why.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ReadError(
            f"{path} cannot be read: {error}", hint="give a file of JSON lines in UTF-8"
        ) from error
    pairs = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            pairs.append(_pair(json.loads(line)))
        except (KeyError, TypeError, ValueError) as error:
            raise ReadError(
                f"{path.name}, line {number}: {type(error).__name__}: {error}",
                hint="see fathom fit-router --help for what a line holds",
            ) from error
    return pairs


def _pair(row: Mapping[str, Any]) -> LabelledPair:
    full, retrieval = float(row["full"]), float(row["retrieval"])
    if not (0 <= full <= 1 and 0 <= retrieval <= 1):
        raise ValueError("full and retrieval are 0 to 1")
    return LabelledPair(
        model=str(row["model"]),
        document=str(row["document"]),
        features=RouteFeatures(
            question=str(row["question"]),
            document_tokens=int(row["document_tokens"]),
            effective_tokens=int(row["effective_tokens"]),
            shares=tuple(float(share) for share in row["shares"]),
            places=tuple(float(place) for place in row["places"]),
            question_class=QuestionClass(row["question_class"]),
        ),
        full=full,
        retrieval=retrieval,
    )
