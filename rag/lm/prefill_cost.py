"""Seconds to prefill a prompt: the work of its chunks times rates measured on this machine.

A prompt enters the model in chunks. What one of them takes is the sum of four things, each in
proportion to a count that follows from the model's shape:

    one chunk               starting a forward pass, and reading the weights once
    linear operations       each linear weight multiplies and adds once per token
    attention operations    scores and a weighted sum over every query-key pair that is computed:
                            where a mask is read, those that it hides, too
    cached bytes            a cache that grows is copied, and read, with every chunk

The four rates come from timing chunks of two sizes against caches of two lengths
(`rag.lm.prefill_rate`), and hold for any length and any part that is cached already.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

from rag.lm.kv_bytes import kv_cache_bytes
from rag.lm.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class ChunkWork:
    """What one chunk asks of the machine, or the sum over several."""

    num_chunks: int
    linear_flops: int
    attention_flops: int
    cached_bytes: int

    @property
    def flops(self) -> int:
        """All its floating-point operations."""
        return self.linear_flops + self.attention_flops


@dataclass(frozen=True, slots=True)
class PrefillRate:
    """Seconds of each unit of `ChunkWork`, as one model reached them on one device."""

    chunk_seconds: float
    linear_flop_seconds: float
    attention_flop_seconds: float
    cached_byte_seconds: float

    def seconds(self, work: ChunkWork) -> float:
        """Return the seconds that `work` takes."""
        rates, counts = astuple(self), astuple(work)
        return float(sum(rate * count for rate, count in zip(rates, counts, strict=True)))

    def scaled(self, factor: float) -> PrefillRate:
        """Return the rate of a machine on which everything takes `factor` times as long."""
        return PrefillRate(*(rate * factor for rate in astuple(self)))

    def to_json(self) -> dict[str, Any]:
        """Return what `PrefillRate(**...)` takes."""
        return asdict(self)


def chunk_work(spec: ModelSpec, num_tokens: int, cached_tokens: int) -> ChunkWork:
    """Return the work of one chunk of `num_tokens` with `cached_tokens` in the cache before it.

    A windowed layer keeps, and scores, no more than its window's `window - 1` tokens beside the
    chunk's own. Grouped heads save bytes, not operations: the width is that of the queries.
    """
    layers = Counter(
        (layer.window, layer.query_elements_per_token, layer.maskless) for layer in spec.layers
    )
    pairs_times_width = 0
    for (window, width, is_maskless), count in layers.items():
        seen = cached_tokens if window is None else min(cached_tokens, window - 1)
        own = num_tokens * (num_tokens + 1) // 2 if is_maskless else num_tokens**2
        pairs_times_width += count * width * (num_tokens * seen + own)
    return ChunkWork(
        num_chunks=1,
        linear_flops=2 * spec.linear_parameters * num_tokens,
        attention_flops=4 * pairs_times_width,
        cached_bytes=kv_cache_bytes(spec, cached_tokens) if cached_tokens else 0,
    )


def prefill_work(spec: ModelSpec, num_tokens: int, *, cached_tokens: int = 0) -> ChunkWork:
    """Return the work of a prefill in chunks whose first `cached_tokens` tokens are there."""
    chunks = [
        chunk_work(spec, min(spec.chunk_tokens, num_tokens - start), start)
        for start in range(cached_tokens, num_tokens, spec.chunk_tokens)
    ]
    sums = [sum(counts) for counts in zip(*map(astuple, chunks), strict=True)]
    return ChunkWork(*(sums or (0, 0, 0, 0)))


def prefill_seconds(
    spec: ModelSpec, rate: PrefillRate, num_tokens: int, *, cached_tokens: int = 0
) -> float:
    """Return the seconds that prefilling `num_tokens` takes, the first `cached_tokens` not."""
    return rate.seconds(prefill_work(spec, num_tokens, cached_tokens=cached_tokens))


def fit_rate(measured: Sequence[tuple[ChunkWork, float]]) -> PrefillRate:
    """Return the rates, none negative, whose seconds are nearest to the measured ones.

    Each measurement counts by its relative error, or the longest would count alone. An operation of
    attention takes no less than one of the weights: its products are smaller, and there is a
    softmax between. On a busy machine it would else come out at nothing now and then, and a prompt
    of 100,000 tokens at a tenth of its time.

    Args:
        measured: works with their seconds; chunks of two sizes against caches of two lengths at
            least, or the four rates cannot be told apart.
    """
    import numpy as np
    from scipy.optimize import nnls

    counts = np.array([astuple(work) for work, _ in measured], dtype=float)
    counts[:, 1] += counts[:, 2]  # so the third rate is what attention takes beyond the second
    seconds = np.array([taken for _, taken in measured])
    # Counts differ by twelve orders of magnitude; a solver wants columns of like size.
    largest = counts.max(axis=0)
    largest[largest == 0] = 1.0
    solved, _ = nnls(counts / largest / seconds[:, None], np.ones(len(seconds)))
    chunk, linear, beyond, cached = (float(rate) for rate in solved / largest)
    return PrefillRate(chunk, linear, linear + beyond, cached)
