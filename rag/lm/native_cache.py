"""The cache of transformers, with windows that hold no more than they show, and room to grow."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rag.lm.kv_bytes import ROOM_TOKENS

# A piece of a prompt that is longer is joined to what is there, which takes exactly what it needs.
_FEW_TOKENS = 16


def native_cache(config: PreTrainedConfig) -> DynamicCache:
    """Return an empty cache with the layers that `DynamicCache(config=config)` has.

    There a sliding layer keeps a view of all that the last forward pass computed: after a prefill
    in one piece the whole prompt stays in memory, is copied by `copy.deepcopy` and written by
    `torch.save`. Here it keeps a copy of its window, so the bytes held are the bytes of its
    tensors. A full layer copies all that it has for each token that is decoded; here it has room
    for the next ones. Values are the same.

    Args:
        config: of a model whose windows, if it has any, are its own.
    """
    cache = DynamicCache(config=config)
    cache.layers = [_own_layer(layer) for layer in cache.layers]
    return cache


def _own_layer(layer: Any) -> Any:  # noqa: ANN401 - a cache layer of any kind
    """Return the layer that stands for one of transformers here; others stay as they are."""
    if type(layer) is DynamicSlidingWindowLayer:
        return OwningWindowLayer(layer.sliding_window)
    return GrowingLayer() if type(layer) is DynamicLayer else layer


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


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A full layer that writes a decoded token beside those that it has, instead of all anew.

    `keys` and `values` are views of the front of a larger tensor then. Whoever holds a view sees
    the tokens that it held when it was taken, for what is written comes after them; only `crop`
    lets other tokens take the place of some.
    """

    def __init__(self) -> None:
        """Begin empty."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._room: tuple[Tensor, Tensor] | None = None

    def __copy__(self) -> GrowingLayer:
        """Return a layer with the same tokens; it goes on in room of its own."""
        copied = GrowingLayer()
        vars(copied).update(vars(self), _room=None)
        return copied

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor]:
        """Take new keys and values in and return all, [sequences, heads, tokens, head width]."""
        held, new = self.get_seq_length(), key_states.shape[-2]
        if not held or new > _FEW_TOKENS:
            self._room = None
            return super().update(key_states, value_states, *args, **kwargs)
        assert self.keys is not None
        assert self.values is not None
        room = self._room
        # Whatever replaced the keys meanwhile (another order of sequences) left the room behind.
        fits = room is not None and room[0].data_ptr() == self.keys.data_ptr()
        if room is None or not fits or held + new > room[0].shape[-2]:
            self._room = None
            room = _with_room(self.keys), _with_room(self.values)
            self._room = room
        room[0][..., held : held + new, :] = key_states
        room[1][..., held : held + new, :] = value_states
        self.keys, self.values = (states[..., : held + new, :] for states in room)
        return self.keys, self.values


def _with_room(states: Tensor) -> Tensor:
    """Return a tensor that begins with `states` and has room for more tokens."""
    *outer, tokens, width = states.shape
    larger = states.new_empty((*outer, tokens + ROOM_TOKENS, width))
    larger[..., :tokens, :] = states
    return larger


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
