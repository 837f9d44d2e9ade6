"""The cache of transformers, with windows that hold no more than they show."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicSlidingWindowLayer


def native_cache(config: PreTrainedConfig) -> DynamicCache:
    """Return an empty cache with the layers that `DynamicCache(config=config)` has.

    There a sliding layer keeps a view of all that the last forward pass computed: after a prefill
    in one piece the whole prompt stays in memory, is copied by `copy.deepcopy` and written by
    `torch.save`. Here it keeps a copy of its window, so the bytes held are the bytes of its
    tensors. Values are the same.

    Args:
        config: of a model whose windows, if it has any, are its own.
    """
    cache = DynamicCache(config=config)
    cache.layers = [
        OwningWindowLayer(layer.sliding_window)
        if type(layer) is DynamicSlidingWindowLayer
        else layer
        for layer in cache.layers
    ]
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
