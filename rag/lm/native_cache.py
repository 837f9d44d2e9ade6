"""The cache of transformers, with windows that hold no more than they show, or in 8 bits."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rag.lm.spec import Q8_GROUP, KVDtype

_SCALE_BYTES = torch.bfloat16.itemsize
_LARGEST = 127


def native_cache(config: PreTrainedConfig, kv_dtype: KVDtype | None = None) -> DynamicCache:
    """Return an empty cache with the layers that `DynamicCache(config=config)` has.

    There a sliding layer keeps a view of all that the last forward pass computed: after a prefill
    in one piece the whole prompt stays in memory, is copied by `copy.deepcopy` and written by
    `torch.save`. Here it keeps a copy of its window, so the bytes held are the bytes of its
    tensors. Values are the same.

    Args:
        config: of a model whose windows, if it has any, are its own.
        kv_dtype: `ModelSpec.kv_dtype`: None for the model's own format, or Q8_0 for full layers.
    """
    cache = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicSlidingWindowLayer:
            cache.layers[index] = OwningWindowLayer(layer.sliding_window)
        elif type(layer) is DynamicLayer and kv_dtype is KVDtype.Q8_0:
            cache.layers[index] = EightBitLayer()  # type: ignore[no-untyped-call]
    return cache


def branch(cache: Cache, num_sequences: int) -> Cache:
    """Return a cache of `num_sequences` sequences that all go on from the one in `cache`.

    `cache` stays as it is, whatever its layers are: windows that cannot be rolled back and
    recurrent states are copied like keys and values.
    """
    branched = copy.copy(cache)
    branched.layers = [_shallow_copy(layer) for layer in cache.layers]
    # What beam search does, with every beam going on from the first; all tensors are new ones.
    first = torch.zeros(num_sequences, dtype=torch.long)
    branched.reorder_cache(first)  # type: ignore[arg-type]  # torch has no class LongTensor
    return branched


def merge(caches: Sequence[Cache]) -> Cache:
    """Return one cache of as many sequences as there are caches of one sequence each.

    Where they differ in length, the shorter ones get nothing but zeros at their front; whoever
    reads from the cache hides them with a mask.
    """
    if len(caches) == 1:
        return caches[0]
    merged = copy.copy(caches[0])
    merged.layers = [
        _merged_layer(layers) for layers in zip(*(cache.layers for cache in caches), strict=True)
    ]
    return merged


def select(cache: Cache, rows: Sequence[int]) -> None:
    """Drop every sequence of the cache but `rows`."""
    cache.reorder_cache(torch.tensor(rows))  # type: ignore[arg-type]  # as in `branch`


def _merged_layer(layers: Sequence[Any]) -> Any:  # noqa: ANN401
    merged = _shallow_copy(layers[0])
    for name, value in vars(merged).items():
        parts = [getattr(layer, name) for layer in layers]
        if isinstance(value, dict) and any(isinstance(part, Tensor) for part in value.values()):
            states = {
                key: None if state is None else torch.cat([part[key] for part in parts])
                for key, state in value.items()
            }
            setattr(merged, name, states)
        elif name in ("keys", "values") and value is not None:
            longest = max(part.shape[-2] for part in parts)
            setattr(
                merged, name, torch.cat([pad(p, (0, 0, longest - p.shape[-2], 0)) for p in parts])
            )
        elif name == "cumulative_length":
            setattr(merged, name, max(parts))
    return merged


def _shallow_copy(layer: Any) -> Any:  # noqa: ANN401 - a cache layer of any kind
    """Return a layer whose attributes can be set without those of `layer` changing."""
    copied = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):  # the states of recurrent layers
            setattr(copied, name, dict(value))
    return copied


class OwningWindowLayer(DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """A sliding layer that keeps a copy of its window, not a view of all that was computed."""

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor]:
        """Take new keys and values in and return all that the queries may see."""
        seen = super().update(key_states, value_states, *args, **kwargs)
        self._own()
        return seen

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens out again, as far as the layer has recorded them."""
        super().crop(tokens_to_remove)
        if self.is_initialized:
            self._own()

    def _own(self) -> None:
        self.keys, self.values = _owned(self.keys), _owned(self.values)


def _owned(states: Tensor | None) -> Tensor:
    """Return `states`, copied if they are a view of something larger."""
    assert states is not None
    own_bytes = states.numel() * states.element_size()
    return states if states.untyped_storage().nbytes() == own_bytes else states.clone()


class EightBitLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A full layer that keeps whole numbers of 8 bits, and a scale for every 32 of them.

    `keys` and `values` are bytes [sequences, tokens, 34 * groups]: all heads of a token side by
    side in groups of 32, each a scale (bfloat16) before its numbers. Every token has scales of its
    own, so what it is rounded to depends neither on how a prompt is cut into chunks nor on the
    other sequences of a batch, and the layer is copied, cut and joined as a plain one is.

    Attention sees what is kept, the newest tokens included, in a copy in the model's dtype that
    lives as long as the layer is computed.

    Source: the block format q8_0 of llama.cpp, there with scales in float16; docs/decisions/0033.
    """

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor]:
        """Take new keys and values in and return all, [sequences, heads, tokens, head width]."""
        keys, values = _packed(key_states), _packed(value_states)
        if self.keys is not None and self.values is not None:
            keys = torch.cat([self.keys, keys], dim=-2)
            values = torch.cat([self.values, values], dim=-2)
        else:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = keys, values
        return _unpacked(keys, key_states), _unpacked(values, value_states)


def _packed(states: Tensor) -> Tensor:
    """Return [sequences, heads, tokens, width] as bytes [sequences, tokens, 34 * groups]."""
    sequences, _, tokens, _ = states.shape
    groups = states.transpose(1, 2).reshape(sequences, tokens, -1, Q8_GROUP).float()
    scales = (groups.abs().amax(-1, keepdim=True) / _LARGEST).to(torch.bfloat16)
    scales = scales.clamp(min=torch.finfo(torch.bfloat16).tiny)  # a group may be all zeros
    # By the scale as it is kept; where that was rounded down, the largest may come out beyond 127.
    numbers = (groups / scales.float()).round().clamp(-_LARGEST, _LARGEST).to(torch.int8)
    blocks = torch.cat([scales.view(torch.uint8), numbers.view(torch.uint8)], dim=-1)
    return blocks.flatten(2)


def _unpacked(packed: Tensor, like: Tensor) -> Tensor:
    """Return all tokens with the heads, width and dtype of the states `like`."""
    sequences, tokens, _ = packed.shape
    blocks = packed.view(sequences, tokens, -1, _SCALE_BYTES + Q8_GROUP)
    numbers = blocks[..., _SCALE_BYTES:].view(torch.int8).to(like.dtype)
    numbers *= blocks[..., :_SCALE_BYTES].view(torch.bfloat16).to(like.dtype)
    _, heads, _, width = like.shape
    return numbers.reshape(sequences, tokens, heads, width).transpose(1, 2)
