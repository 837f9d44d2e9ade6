"""Effective length: how long a prompt may be before what a short one showed is lost.

Accuracy is fitted over length by a curve that never rises; the effective length is where the curve
falls below a share of its height at the shortest length, interpolated on the logarithm of the
length. A bootstrap says how sure that is: haystacks are drawn with replacement within each length,
then questions within each haystack, because few haystacks are measured and their own spread alone
would promise too much.

Source: the relative rule is NoLiMa's (arXiv:2502.05167); docs/decisions/0026 has the simulation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import isotonic_regression

KEPT_SHARE = 0.85
# A base below this, or nearer to chance than the second, says too little to lose a share of it.
LEAST_BASE = 0.5
LEAST_ABOVE_CHANCE = 0.3
BOOTSTRAP_SAMPLES = 2000
_LOW, _HIGH = 0.05, 0.95

FloatArray = npt.NDArray[np.float64]
# Per length in tokens: one list of scores, 0 to 1, a haystack.
Scores = Mapping[int, Sequence[Sequence[float]]]


@dataclass(frozen=True, slots=True)
class LengthEstimate:
    """How long a prompt keeps KEPT_SHARE of the accuracy of the shortest one.

    Attributes:
        base: the curve at the shortest length.
        floor: what the base must reach.
        low_tokens: the 5th percentile of the bootstrap, which is what may be relied on; 0 where
            the base is too low, or not surely high enough.
        median_tokens: the middle of it.
        high_tokens: the 95th percentile.
        longest_tokens: the longest length measured; nothing is known beyond it.
    """

    base: float
    floor: float
    low_tokens: int
    median_tokens: int
    high_tokens: int
    longest_tokens: int

    @property
    def is_measurable(self) -> bool:
        """Whether the model does well enough at the shortest length to lose any of it."""
        return self.base >= self.floor and self.low_tokens > 0


def estimate_length(scores: Scores, *, chance: float = 0.0, seed: int = 0) -> LengthEstimate:
    """Return the effective length with its bootstrap interval.

    Args:
        scores: at two lengths or more.
        chance: the score of a model that guesses.
        seed: equal seeds give equal intervals.

    Raises:
        ValueError: if there are fewer than two lengths.
    """
    if len(scores) < 2:
        raise ValueError("an effective length needs scores at two lengths or more")
    lengths = np.array(sorted(scores), dtype=np.float64)
    padded = [_padded(scores[int(length)]) for length in lengths]
    counts = np.array([sum(map(len, scores[int(length)])) for length in lengths], dtype=np.float64)
    floor = max(LEAST_BASE, chance + LEAST_ABOVE_CHANCE)
    means = np.array([sum(map(sum, scores[int(n)])) for n in lengths]) / counts
    base = float(non_rising(means, counts)[0])

    random = np.random.default_rng(seed)
    drawn = np.stack([_drawn_means(*table, random) for table in padded], axis=1)  # [B, lengths]
    found = [effective_tokens(lengths, row, counts, floor=floor) for row in drawn]
    # The lower of two neighbours: an interval must not promise what no sample showed.
    low, median, high = np.quantile(found, [_LOW, 0.5, _HIGH], method="lower")
    return LengthEstimate(
        base=base,
        floor=floor,
        low_tokens=int(low) if base >= floor else 0,
        median_tokens=int(median),
        high_tokens=int(high),
        longest_tokens=int(lengths[-1]),
    )


def mean_interval(
    haystacks: Sequence[Sequence[float]], *, seed: int = 0
) -> tuple[float, float, float]:
    """Return the mean of all scores at one length, and its 95% interval by the same bootstrap."""
    drawn = _drawn_means(*_padded(haystacks), np.random.default_rng(seed))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return sum(map(sum, haystacks)) / sum(map(len, haystacks)), float(low), float(high)


def effective_tokens(
    lengths: FloatArray, means: FloatArray, counts: FloatArray, *, floor: float
) -> float:
    """Return the length where the fitted curve reaches KEPT_SHARE of its base.

    It is 0 where the base is below the floor, and the longest length where the curve stays above.
    """
    fit = non_rising(means, counts)
    if fit[0] < floor:
        return 0.0
    wanted = KEPT_SHARE * fit[0]
    below = np.flatnonzero(fit < wanted)
    if not len(below):
        return float(lengths[-1])
    after = below[0]  # never 0: the base is above a share of itself
    share = (fit[after - 1] - wanted) / (fit[after - 1] - fit[after])
    logs = np.log(lengths)
    return float(np.exp(logs[after - 1] + share * (logs[after] - logs[after - 1])))


def non_rising(means: FloatArray, counts: FloatArray) -> FloatArray:
    """Return the nearest curve that never rises, each point weighed by its count."""
    fitted: FloatArray = isotonic_regression(means, weights=counts, increasing=False).x
    return fitted


def _padded(haystacks: Sequence[Sequence[float]]) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """Return the scores [haystacks, most questions], and how many of each row count."""
    sizes = np.array([len(scores) for scores in haystacks])
    table = np.zeros((len(haystacks), int(sizes.max())))
    for row, scores in zip(table, haystacks, strict=True):
        row[: len(scores)] = scores
    return table, sizes


def _drawn_means(
    table: FloatArray, sizes: npt.NDArray[np.int64], random: np.random.Generator
) -> FloatArray:
    """Return the mean of each bootstrap sample [B]: haystacks drawn, then questions in each."""
    num_haystacks, width = table.shape
    haystacks = random.integers(num_haystacks, size=(BOOTSTRAP_SAMPLES, num_haystacks))  # [B, H]
    own = sizes[haystacks]
    questions = (random.random((*haystacks.shape, width)) * own[..., None]).astype(int)  # [B, H, Q]
    counted = np.arange(width) < own[..., None]
    drawn = table[haystacks[..., None], questions] * counted
    means: FloatArray = drawn.sum(axis=(1, 2)) / own.sum(axis=1)
    return means
