"""The exact bytes of a KV cache: predicted from the spec, and counted in the real tensors."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

from rag.lm.spec import LayerSpec, ModelSpec

if TYPE_CHECKING:
    from transformers import Cache

# What `longest_within` answers when no number of tokens fills the cache (all layers slide).
UNBOUNDED_TOKENS = 2**40


def kv_cache_bytes(spec: ModelSpec, num_tokens: int) -> int:
    """Return the logical bytes of the cache that holds `num_tokens` tokens of one sequence.

    A full layer keeps every token, a sliding layer the last `window - 1`: the newest token of the
    window is the one being computed. Exact for a cache made by `DynamicCache(config=...)` once a
    decode step has run; tests compare it with the tensors of the real modelling code.
    """
    return spec.dtype_bytes * sum(
        (layer.key_elements_per_token + layer.value_elements_per_token)
        * _kept_tokens(layer, num_tokens)
        for layer in spec.layers
    )


def longest_within(spec: ModelSpec, num_bytes: int) -> int:
    """Return the most tokens whose cache takes at most `num_bytes`; 0 if not even one fits.

    Where every layer slides the cache stops growing; if it fits then, UNBOUNDED_TOKENS is returned.
    """
    if kv_cache_bytes(spec, UNBOUNDED_TOKENS) <= num_bytes:
        return UNBOUNDED_TOKENS
    return (
        bisect_right(
            range(UNBOUNDED_TOKENS), num_bytes, key=lambda tokens: kv_cache_bytes(spec, tokens)
        )
        - 1
        if num_bytes >= 0
        else 0
    )


def measured_kv_bytes(cache: Cache) -> int:
    """Return the logical bytes of the key and value tensors that `cache` holds now.

    A tensor that is a view of a larger storage counts with its own elements only.
    """
    return sum(
        tensor.numel() * tensor.element_size()
        for layer in cache.layers
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if tensor is not None
    )


def held_kv_bytes(cache: Cache) -> int:
    """Return the bytes of the storages that the tensors of `cache` keep alive.

    More than `measured_kv_bytes` where a tensor is a view of something larger.
    """
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for layer in cache.layers
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if tensor is not None
    }
    return sum(storages.values())


def _kept_tokens(layer: LayerSpec, num_tokens: int) -> int:
    return num_tokens if layer.window is None else min(num_tokens, layer.window - 1)
