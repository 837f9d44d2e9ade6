"""The exact bytes of a KV cache: predicted from the spec, and counted in the real tensors."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from rag.lm.spec import KVDtype as KVDtype
from rag.lm.spec import LayerSpec, ModelSpec

if TYPE_CHECKING:
    from transformers import Cache

_FLOAT32_BYTES = 4
# A full layer that decodes has room for up to so many tokens more than it holds.
ROOM_TOKENS = 128
# A cache that stays where it is has a multiple of so many slots: attention is summed in so many
# parts. Less than the room that any cache may have.
STATIC_PARTS = 64
# What a cache layer keeps beside what it caches: counters, and what is the model's.
_NOT_CACHED = frozenset({"_sliding_window_tensor", "cumulative_length", "key_sizes"})


# Bytes of 32 elements; every width of a cached head is a multiple of 2, most of 32.
_BYTES_OF_32 = {
    KVDtype.FLOAT32: 128,
    KVDtype.BFLOAT16: 64,
    KVDtype.FLOAT16: 64,
    KVDtype.FP8: 32,
    KVDtype.INT8: 32,
    KVDtype.INT4: 16,
    KVDtype.Q8_0: 34,
    KVDtype.Q4_0: 18,
}


def kv_cache_bytes(spec: ModelSpec, num_tokens: int, *, kv_dtype: KVDtype | None = None) -> int:
    """Return the logical bytes of the cache that holds `num_tokens` tokens of one sequence.

    A full layer keeps every token, a sliding layer the last `window - 1`: the newest token of the
    window is the one being computed. A linear layer keeps its state. Exact for a cache made by
    `DynamicCache(config=...)` once a decode step has run; tests compare it with the tensors of the
    real modelling code.

    Args:
        spec: the model's shape.
        num_tokens: prompt and new tokens of one sequence; 0 or more.
        kv_dtype: the format of all keys and values; by default that of the spec, which is the
            model's own but for the full layers of a `ModelSpec.quantised`. The state of linear
            layers is kept in its own format whatever this is.
    """
    return sum(_layer_bytes(spec, layer, num_tokens, kv_dtype) for layer in spec.layers)


def kv_bytes_by_kind(
    spec: ModelSpec, num_tokens: int, *, kv_dtype: KVDtype | None = None
) -> dict[str, int]:
    """Return the bytes of `kv_cache_bytes` for each kind of layer, in order of appearance."""
    counted: Counter[str] = Counter()
    for layer in spec.layers:
        counted[layer.kind] += _layer_bytes(spec, layer, num_tokens, kv_dtype)
    return dict(counted)


def read_copy_bytes(spec: ModelSpec, layer: LayerSpec, num_tokens: int) -> int:
    """Return the bytes of the copy in the model's dtype that attention to one layer reads.

    It lives as long as the layer is computed; 0 where the cache itself is read.
    """
    if spec.kv_dtype is None or layer.kind != "full":
        return 0
    return layer.elements_per_token * num_tokens * spec.dtype_bytes


def room_bytes(spec: ModelSpec, num_tokens: int) -> int:
    """Return the most bytes that a cache of `num_tokens` tokens has for tokens to come.

    They are no part of `kv_cache_bytes`, for nothing is in them, but of what a request takes.
    """
    return kv_cache_bytes(spec, num_tokens + ROOM_TOKENS) - kv_cache_bytes(spec, num_tokens)


def static_capacity(num_tokens: int, *, has_prefix: bool = False) -> int:
    """Return the slots of a full layer in a static cache that is to hold `num_tokens` tokens.

    Behind a prefix these are a row's own, and one slot stands for the prefix.
    """
    return -(-(num_tokens + has_prefix) // STATIC_PARTS) * STATIC_PARTS


def static_kv_bytes(
    spec: ModelSpec, num_tokens: int, *, num_rows: int = 1, shared_tokens: int = 0
) -> int:
    """Return the bytes of all tensors of a static cache that has room for `num_tokens` tokens.

    Beside what `kv_cache_bytes` counts there are in each row the slots up to the next multiple, and
    in each window one for the token being computed; never more than that and `room_bytes` together,
    and a token a window.

    Args:
        spec: of a model with full and sliding layers alone.
        num_tokens: prompt and new tokens of the longest row.
        num_rows: how many are in step.
        shared_tokens: how many of the tokens stand once for all rows.
    """
    slots = static_capacity(num_tokens - shared_tokens, has_prefix=shared_tokens > 0)
    own = sum(
        layer.elements_per_token * min(slots, layer.window or slots) * spec.dtype_bytes
        for layer in spec.layers
    )
    return kv_cache_bytes(spec, shared_tokens) + num_rows * own


def measured_kv_bytes(cache: Cache) -> int:
    """Return the logical bytes of every tensor that `cache` holds now: keys, values and states.

    A tensor that is a view of a larger storage counts with its own elements only.
    """
    return sum(
        _tensor_bytes(value)
        for layer in cache.layers
        for name, value in vars(layer).items()
        if name not in _NOT_CACHED
    )


def measured_row_bytes(cache: Cache, padding: int) -> int:
    """Return the logical bytes that one sequence of a batch has in `cache`, padding left out.

    The sequences are of one length: `padding` are the first tokens of this one that stand for
    nothing. What all of them share counts as this one's too.
    """
    num_bytes = 0
    for layer in cache.layers:
        for name, value in vars(layer).items():
            if name in _NOT_CACHED or value is None:
                continue
            if name in ("prefix_keys", "prefix_values"):
                num_bytes += _tensor_bytes(value)
            elif name in ("keys", "values"):
                rows, held = value.shape[0], value.shape[-2]
                if not held:
                    continue
                gone = getattr(layer, "cumulative_length", held) - held  # has left the window
                own = held - max(0, padding - gone)
                num_bytes += _tensor_bytes(value) // rows // held * own
            else:
                num_bytes += _row_bytes(value)
    return num_bytes


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


def _layer_bytes(
    spec: ModelSpec, layer: LayerSpec, num_tokens: int, kv_dtype: KVDtype | None
) -> int:
    if kv_dtype is None and layer.kind == "full":
        kv_dtype = spec.kv_dtype
    per_32 = 32 * spec.dtype_bytes if kv_dtype is None else _BYTES_OF_32[kv_dtype]
    cached = layer.elements_per_token * layer.kept_tokens(num_tokens)
    state = 0
    if num_tokens > 0:
        state = layer.state_elements * spec.dtype_bytes
        state += layer.float32_state_elements * _FLOAT32_BYTES
    return -(-cached * per_32 // 32) + state


def _tensor_bytes(value: Any) -> int:  # noqa: ANN401 - an attribute of a cache layer
    if isinstance(value, dict):
        return sum(_tensor_bytes(inner) for inner in value.values())
    if hasattr(value, "element_size"):
        return int(value.numel() * value.element_size())
    return 0


def _row_bytes(value: Any) -> int:  # noqa: ANN401 - a state that every sequence has one of
    if isinstance(value, dict):
        return sum(_row_bytes(inner) for inner in value.values())
    return _tensor_bytes(value) // value.shape[0] if hasattr(value, "element_size") else 0
