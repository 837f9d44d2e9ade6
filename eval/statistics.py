"""Intervals, paired tests and their limits, for answers that come several to a document.

Questions are paired first (the same question by two arms), then clustered (documents are drawn,
not questions). scipy has the exact tests; what it lacks stands here with its source. Seeded.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.stats import binom, binomtest, norm

BOOTSTRAP_SAMPLES = 2000
SIGNIFICANCE = 0.05
POWER = 0.8
# Below this many, Wilson's interval is too short now and then, and the exact one is taken.
EXACT_BELOW = 50
NO_DIFFERENCE = "no difference shown"
_LEVEL = 1 - SIGNIFICANCE
_TAILS = (SIGNIFICANCE / 2, 1 - SIGNIFICANCE / 2)

FloatArray = npt.NDArray[np.float64]


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

    @property
    def half_width(self) -> float:
        """Half the distance between the ends."""
        return (self.high - self.low) / 2


# ---- one rate ---------------------------------------------------------------------------------


def wilson(correct: int, total: int) -> Interval:
    """Return `correct / total` with Wilson's score interval; [0, 1] of nothing. Source: 1927."""
    return _rate(correct, total, "wilson")


def clopper_pearson(correct: int, total: int) -> Interval:
    """Return `correct / total` with the exact interval, never too short. Source: 1934."""
    return _rate(correct, total, "exact")


def rate(correct: int, total: int) -> Interval:
    """Return a rate with the exact interval below 50 questions, with Wilson's from there on.

    Source: Bowyer et al., arXiv:2503.01747: no normal approximation below a few hundred.
    """
    return (clopper_pearson if total < EXACT_BELOW else wilson)(correct, total)


def cluster_bootstrap(
    values: Sequence[float] | FloatArray, clusters: Sequence[str], *, seed: int = 0
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
    low, high = np.quantile(_drawn_means(numbers, clusters, seed), _TAILS)
    return Interval(float(numbers.mean()), float(low), float(high))


def cluster_bootstrap_of(
    statistic: Callable[[npt.NDArray[np.intp]], float],
    clusters: Sequence[str],
    *,
    samples: int = 400,
    seed: int = 0,
) -> Interval:
    """Return any statistic of the rows with its interval, clusters drawn with replacement.

    For what is not a mean: ratios, areas under a curve. `mean` is the statistic of all rows.

    Args:
        statistic: from row numbers, some of them repeated, to a number; NaN is left out.
        clusters: the document of each row.
        samples: how often documents are drawn.
        seed: equal seeds give equal intervals.
    """
    names, cluster_of = np.unique(np.asarray(clusters), return_inverse=True)
    members = [np.flatnonzero(cluster_of == number) for number in range(len(names))]
    random = np.random.default_rng(seed)
    found = [
        statistic(
            np.concatenate([members[i] for i in random.integers(len(names), size=len(names))])
        )
        for _ in range(samples)
    ]
    kept = [value for value in found if not math.isnan(value)]
    low, high = np.quantile(kept, _TAILS) if kept else (float("nan"), float("nan"))
    return Interval(statistic(np.arange(len(clusters))), float(low), float(high))


def clustered_mean(
    values: Sequence[float] | FloatArray, clusters: Sequence[str], *, seed: int = 0
) -> Interval:
    """Return the mean with the wider of two intervals: documents drawn, and questions taken alone.

    Of a handful of documents the first is often too short: three that happen to agree say little.
    The second is that of `rate` where all values are 0 or 1, else by drawing questions.
    """
    numbers = np.asarray(values, dtype=np.float64)
    by_question = None
    if len(numbers) and set(numbers.tolist()) <= {0.0, 1.0}:
        by_question = rate(int(numbers.sum()), len(numbers))
    return _wider(numbers, clusters, by_question, _LEVEL, seed)


def clustered_difference(
    differences: Sequence[float] | FloatArray,
    clusters: Sequence[str],
    *,
    level: float = _LEVEL,
    seed: int = 0,
) -> Interval:
    """Return the mean of paired differences with the wider of two intervals, as `clustered_mean`.

    The second is Agresti and Min's where each pair is right or wrong: half a pair is added to each
    of the four ways it can end, so that few pairs without any difference do not pass for proof that
    there is none. Source: Statistics in Medicine 24 (2005), 729.
    """
    numbers = np.asarray(differences, dtype=np.float64)
    by_question = None
    if len(numbers) and set(numbers.tolist()) <= {-1.0, 0.0, 1.0}:
        gained, lost = (float((numbers == sign).sum()) + 0.5 for sign in (1, -1))
        total = len(numbers) + 2
        mean = (gained - lost) / total
        reach = float(norm.ppf((1 + level) / 2)) * (
            math.sqrt(gained + lost - (gained - lost) ** 2 / total) / total
        )
        by_question = Interval(mean, max(-1.0, mean - reach), min(1.0, mean + reach))
    return _wider(numbers, clusters, by_question, level, seed)


def _wider(
    numbers: FloatArray,
    clusters: Sequence[str],
    by_question: Interval | None,
    level: float,
    seed: int,
) -> Interval:
    """Return the mean with the hull of two intervals; without `by_question` questions are drawn."""
    if len(numbers) == 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    tails = ((1 - level) / 2, (1 + level) / 2)
    ends = [np.quantile(_drawn_means(numbers, clusters, seed), tails)]
    if by_question is None:
        each = [str(n) for n in range(len(numbers))]
        ends.append(np.quantile(_drawn_means(numbers, each, seed), tails))
    else:
        ends.append(np.array([by_question.low, by_question.high]))
    lows, highs = zip(*ends, strict=True)
    return Interval(float(numbers.mean()), float(min(lows)), float(max(highs)))


# ---- how alike the questions of a document are --------------------------------------------------


def intraclass_correlation(values: Sequence[float] | FloatArray, clusters: Sequence[str]) -> float:
    """Return how alike the values of one cluster are: 0 not at all, 1 entirely; may be negative.

    The one-way estimate (MSB - MSW) / (MSB + (n0 - 1) MSW) with the mean squares between and within
    clusters and n0 = (N - sum n_i^2 / N) / (C - 1). NaN where it is not defined: one cluster, one
    value each, or no variance. Source: Donner, International Statistical Review 54 (1986).
    """
    numbers = np.asarray(values, dtype=np.float64)
    _, cluster_of = np.unique(np.asarray(clusters), return_inverse=True)
    counts = np.bincount(cluster_of)
    total, groups = len(numbers), len(counts)
    if groups < 2 or total <= groups:
        return float("nan")
    means = np.bincount(cluster_of, weights=numbers) / counts
    between = float((counts * (means - numbers.mean()) ** 2).sum()) / (groups - 1)
    within = float(((numbers - means[cluster_of]) ** 2).sum()) / (total - groups)
    size = (total - float((counts**2).sum()) / total) / (groups - 1)
    whole = between + (size - 1) * within
    return (between - within) / whole if whole else float("nan")


def design_effect(values: Sequence[float] | FloatArray, clusters: Sequence[str]) -> float:
    """Return how many times more questions are needed than if they were independent; 1 or more.

    1 + (m - 1) r with m the mean size of a cluster, weighted by size, and r the intraclass
    correlation, taken as 0 where it is negative or not defined. Source: Kish, Survey Sampling 1965.
    """
    likeness = intraclass_correlation(values, clusters)
    if math.isnan(likeness) or likeness <= 0:
        return 1.0
    _, counts = np.unique(np.asarray(clusters), return_counts=True)
    return 1 + (float((counts**2).sum() / counts.sum()) - 1) * likeness


# ---- two arms on the same questions -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class McNemar:
    """Pairs that one alone got right, and two-sided p-values: exact, and mid-p, less cautious."""

    only_first: int
    only_second: int
    p_value: float
    mid_p: float


def mcnemar(only_first: int, only_second: int) -> McNemar:
    """Return McNemar's test in its exact form: the discordant pairs against a fair coin.

    Source: McNemar 1947; mid-p as in Fagerland, Lydersen and Laake, BMC MRM 13:91 (2013).
    """
    discordant = only_first + only_second
    if not discordant:
        return McNemar(0, 0, 1.0, 1.0)
    p_value = float(binomtest(only_first, discordant).pvalue)
    fewer = min(only_first, only_second)
    mid_p = p_value - float(binom.pmf(fewer, discordant, 0.5))
    if only_first == only_second:
        mid_p = 1 - float(binom.pmf(fewer, discordant, 0.5)) / 2
    return McNemar(only_first, only_second, p_value, mid_p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for being several, in the order given.

    The k-th smallest of m is multiplied by m - k + 1, and none is smaller than one before it.
    Source: Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def is_equivalent(
    differences: Sequence[float] | FloatArray,
    clusters: Sequence[str],
    *,
    margin: float,
    seed: int = 0,
) -> bool:
    """Say whether the mean difference is shown to lie within +-`margin`, by two one-sided tests.

    Both tests at 5% reject exactly if the interval at 90% lies inside: that of
    `clustered_difference`. One document shows nothing.

    Source: Schuirmann, J. Pharmacokinetics and Biopharmaceutics 15 (1987).
    """
    if len(set(clusters)) < 2:
        return False
    found = clustered_difference(differences, clusters, level=1 - 2 * SIGNIFICANCE, seed=seed)
    return found.low > -margin and found.high < margin


def questions_needed(difference: float, discordance: float) -> int:
    """Return how many pairs show a difference in 4 of 5 runs, at 5%.

    n = (z_a sqrt(d) + z_b sqrt(d - x^2))^2 / x^2 with d the share of discordant pairs and x the
    difference of the two rates. Source: Connor, Biometrics 43 (1987).

    Raises:
        ValueError: if the difference is 0 or larger than the discordance, which it cannot be.
    """
    if not 0 < abs(difference) <= discordance <= 1:
        raise ValueError(f"no difference of {difference} with {discordance} discordant pairs")
    return math.ceil(_pairs(abs(difference), discordance))


def detectable_difference(num_pairs: float, discordance: float) -> float:
    """Return the smallest difference of two rates that so many pairs show in 4 of 5 runs, at 5%.

    It is at most the discordance; where not even that would be shown, 1 is returned.

    Args:
        num_pairs: pairs that count, e.g. all of them less the design effect.
        discordance: the share of pairs that one arm alone got right.
    """
    if num_pairs <= 0 or discordance <= 0 or _pairs(discordance, discordance) > num_pairs:
        return 1.0
    found = brentq(lambda x: _pairs(x, discordance) - num_pairs, 1e-6, discordance)
    return float(found)


def _drawn_means(numbers: FloatArray, clusters: Sequence[str], seed: int) -> FloatArray:
    """Return the means of BOOTSTRAP_SAMPLES drawings of clusters, [S]."""
    _, cluster_of = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(cluster_of, weights=numbers)  # [C]
    counts = np.bincount(cluster_of)  # [C]
    random = np.random.default_rng(seed)
    drawn = random.integers(len(sums), size=(BOOTSTRAP_SAMPLES, len(sums)))  # [S, C]
    means: FloatArray = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    return means


def _pairs(difference: float, discordance: float) -> float:
    """Return the pairs needed, not rounded; it falls as the difference grows."""
    z_a, z_b = float(norm.ppf(1 - SIGNIFICANCE / 2)), float(norm.ppf(POWER))
    spread = math.sqrt(max(0.0, discordance - difference**2))
    return ((z_a * math.sqrt(discordance) + z_b * spread) / difference) ** 2


def _rate(correct: int, total: int, method: str) -> Interval:
    if total == 0:
        return Interval(float("nan"), 0.0, 1.0)
    found = binomtest(correct, total).proportion_ci(confidence_level=_LEVEL, method=method)
    return Interval(correct / total, float(found.low), float(found.high))
