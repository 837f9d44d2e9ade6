"""Seconds to prefill a prompt: a count of operations times a rate measured on this machine."""

from dataclasses import dataclass

from rag.lm.spec import LayerSpec, ModelSpec

# The prompt enters the model in pieces of this many tokens.
PREFILL_CHUNK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class PrefillRate:
    """Operations per second that this model reached here when prefilling `measured_tokens`."""

    flops_per_second: float
    measured_tokens: int


def prefill_flops(spec: ModelSpec, num_tokens: int) -> int:
    """Return the floating-point operations that prefilling `num_tokens` tokens executes.

    Each linear weight multiplies and adds once per token; attention computes scores and a weighted
    sum over every query-key pair, masked ones within a chunk included. Grouped heads save bytes,
    not operations, so the width is that of the queries.
    """
    attention = sum(
        4 * layer.query_elements_per_token * _scored_pairs(layer, num_tokens)
        for layer in spec.layers
    )
    return 2 * spec.linear_parameters * num_tokens + attention


def prefill_seconds(spec: ModelSpec, rate: PrefillRate, num_tokens: int) -> float:
    """Return the seconds that prefilling `num_tokens` takes at the measured rate."""
    return prefill_flops(spec, num_tokens) / rate.flops_per_second


def _scored_pairs(layer: LayerSpec, num_tokens: int) -> int:
    """Return the query-key pairs that one layer scores when the prompt enters in chunks."""
    chunk = min(num_tokens, PREFILL_CHUNK_TOKENS)
    full = num_tokens * (num_tokens + chunk) // 2
    if layer.window is None:
        return full
    return min(full, num_tokens * (layer.window - 1 + chunk))
