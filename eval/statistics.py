"""Intervals that respect where questions come from. Pure numpy, seeded."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BOOTSTRAP_SAMPLES = 2000
_LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its interval at 95%."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Say whether zero lies outside."""
        return self.low > 0 or self.high < 0


def cluster_bootstrap(
    values: Sequence[float] | npt.NDArray[np.float64], clusters: Sequence[str], *, seed: int = 0
) -> Interval:
    """Return the mean of `values` with its percentile interval, clusters drawn with replacement.

    Questions on one document are alike, so documents are drawn, not questions. For a paired
    difference give the differences. With one cluster there is nothing to draw: the interval is
    then the mean itself and says nothing.

    Args:
        values: one number a question.
        clusters: the document of each.
        seed: equal seeds give equal intervals.

    Source: Miller, "Adding Error Bars to Evals", arXiv:2411.00640, on clustered questions.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if len(numbers) == 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    _, cluster_of = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(cluster_of, weights=numbers)  # [C]
    counts = np.bincount(cluster_of)  # [C]
    random = np.random.default_rng(seed)
    drawn = random.integers(len(sums), size=(BOOTSTRAP_SAMPLES, len(sums)))  # [S, C]
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(numbers.mean()), float(low), float(high))
