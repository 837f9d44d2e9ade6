"""The cache of transformers, with windows that hold no more than they show."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
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
        _OwningWindowLayer(layer.sliding_window)
        if type(layer) is DynamicSlidingWindowLayer
        else layer
        for layer in cache.layers
    ]
    return cache


class _OwningWindowLayer(DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]
    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor]:
        seen = super().update(key_states, value_states, *args, **kwargs)
        self._own()
        return seen

    def crop(self, tokens_to_remove: int) -> None:
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
