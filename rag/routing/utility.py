"""How likely each route is to be right, and which one is worth its cost: two small models.

Each is a logistic regression on what is known before anything is answered, calibrated by a
monotone curve. `eval/fit_router.py` fits them from questions that both routes answered.
"""

import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from rag.errors import SettingsError
from rag.types import QuestionClass, Route, RouteEstimate

# Hits beyond these say nothing more about how well a question is found.
NUM_HITS = 10
_ASKING = ("how", "what", "when", "where", "which", "who", "why")
_LONGEST_RATIO = 6.0  # of a document to the effective length, in powers of two


@dataclass(frozen=True, slots=True)
class RouteFeatures:
    """What is known of a question before a route is taken.

    Attributes:
        question: in words.
        document_tokens: length of the documents asked about.
        effective_tokens: the length that the model was measured to use well, else its context.
        shares: of the question's words, by their rarity, that each of the nearest chunks holds:
            0 to 1, highest first (`Hit.lexical`).
        places: where each of those chunks lies in the documents, 0 at the start, 1 at the end.
        question_class: what is asked for.
    """

    question: str
    document_tokens: int
    effective_tokens: int
    shares: tuple[float, ...]
    places: tuple[float, ...]
    question_class: QuestionClass

    def values(self) -> dict[str, float]:
        """Return the numbers that the models weigh, by name."""
        shares, places = self.shares[:NUM_HITS], self.places[:NUM_HITS]
        words = self.question.lower().split()
        ratio = math.log2(max(self.document_tokens, 1) / max(self.effective_tokens, 1))
        ratio = max(-_LONGEST_RATIO, min(_LONGEST_RATIO, ratio))
        best = shares[0] if shares else 0.0
        return {
            "log2_length_over_effective": ratio,
            "best_share": best,
            "best_share_in_long": best * ratio,
            "mean_share": fmean(shares) if shares else 0.0,
            "margin": best - shares[-1] if shares else 0.0,
            "spread": pstdev(places) if len(places) > 1 else 0.0,
            "log_question_words": math.log(max(len(words), 1)),
            "has_digit": float(any(sign.isdigit() for sign in self.question)),
            **{f"asks_{word}": float(words[:1] == [word]) for word in _ASKING},
            **{
                f"is_{kind}": float(self.question_class is kind)
                for kind in QuestionClass
                if kind is not QuestionClass.LOOKUP
            },
        }


@dataclass(frozen=True, slots=True)
class RightModel:
    """The probability that one route answers rightly.

    `calibration` are points (fitted, true) of a non-decreasing curve, between which a line is
    drawn; without any the fitted probability stands.
    """

    intercept: float
    weights: Mapping[str, float]
    calibration: tuple[tuple[float, float], ...] = ()

    def fitted(self, values: Mapping[str, float]) -> float:
        """Return the logistic model's probability; a name without a weight counts nothing."""
        score = self.intercept + sum(
            weight * values.get(name, 0.0) for name, weight in self.weights.items()
        )
        return 1 / (1 + math.exp(-max(-40.0, min(40.0, score))))

    def probability(self, values: Mapping[str, float]) -> float:
        """Return the calibrated probability."""
        fitted = self.fitted(values)
        if not self.calibration:
            return fitted
        after = bisect_right(self.calibration, fitted, key=lambda point: point[0])
        if after in (0, len(self.calibration)):
            return self.calibration[min(after, len(self.calibration) - 1)][1]
        (x0, y0), (x1, y1) = self.calibration[after - 1 : after + 1]
        return y0 + (y1 - y0) * (fitted - x0) / (x1 - x0)


@dataclass(frozen=True, slots=True)
class RouterWeights:
    """The two models, and where they come from: data, rows, command, date."""

    full: RightModel
    retrieval: RightModel
    fitted_on: str

    def to_json(self) -> dict[str, Any]:
        """Return the object that `from_json` reads."""
        return {"fitted_on": self.fitted_on} | {
            name: {
                "intercept": model.intercept,
                "weights": dict(model.weights),
                "calibration": [list(point) for point in model.calibration],
            }
            for name, model in (("full", self.full), ("retrieval", self.retrieval))
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "RouterWeights":
        """Return the weights of a file; KeyError, TypeError or ValueError if it is none."""
        full, retrieval = (
            RightModel(
                intercept=float(value[name]["intercept"]),
                weights={key: float(w) for key, w in value[name]["weights"].items()},
                calibration=tuple((float(x), float(y)) for x, y in value[name]["calibration"]),
            )
            for name in ("full", "retrieval")
        )
        return cls(full, retrieval, str(value["fitted_on"]))


def estimate_routes(
    features: RouteFeatures,
    weights: RouterWeights,
    cost_tokens: Mapping[Route, int],
    *,
    thrift: float,
) -> tuple[RouteEstimate, ...]:
    """Return the routes of `cost_tokens` with what each is worth, best first.

    Args:
        features: of the question.
        weights: the fitted models.
        cost_tokens: prompt tokens to compute, of FULL, RETRIEVAL or both.
        thrift: the probability of being right that 1,000 prompt tokens are worth; 0 or more.
    """
    values = features.values()
    models = {Route.FULL: weights.full, Route.RETRIEVAL: weights.retrieval}
    estimates = []
    for route, cost in cost_tokens.items():
        probability = round(models[route].probability(values), 4)
        estimates.append(RouteEstimate(route, probability, cost, probability))
    return at_thrift(estimates, thrift)


def at_thrift(estimates: Sequence[RouteEstimate], thrift: float) -> tuple[RouteEstimate, ...]:
    """Return the same routes with what each is worth at a thrift, best first."""
    worth = [
        replace(one, utility=round(one.probability - thrift * one.cost_tokens / 1000, 6))
        for one in estimates
    ]
    return tuple(sorted(worth, key=lambda one: (-one.utility, one.cost_tokens)))


def load_weights(path: Path | None = None) -> RouterWeights:
    """Return the weights of a file; by default those that ship with Fathom.

    Raises:
        SettingsError: if the file is none that `fathom fit-router` wrote.
    """
    source = path or files("rag.routing") / "router_weights.json"
    try:
        return RouterWeights.from_json(json.loads(source.read_text(encoding="utf-8")))
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise SettingsError(
            f"{source} holds no router weights: {type(error).__name__}: {error}",
            hint="fit them anew with fathom fit-router, or remove the file to use those shipped",
        ) from error


def save_weights(weights: RouterWeights, path: Path) -> None:
    """Write weights for `load_weights`; a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(weights.to_json(), indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def places_of(ordinals: Sequence[int], num_chunks: int) -> tuple[float, ...]:
    """Return where chunks lie among all, 0 to 1."""
    return tuple(ordinal / max(num_chunks - 1, 1) for ordinal in ordinals)
