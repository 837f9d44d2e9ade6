"""A cache in 8 bits: keys and values of full layers as whole numbers, each 32 with a scale.

Keys are first divided by the usual size of their channel. Some models, Qwen2.5 among them, have a
few channels a hundred times as large as the others, and 32 numbers that share a scale with one of
them would keep hardly a bit. The sizes belong to the model, not to a prompt: they are measured
once, so what a token is rounded to hangs on nothing but the token.

Source: the block format q8_0 of llama.cpp, there with scales in float16; that keys differ by
channel: KIVI, arXiv:2402.02750; docs/decisions/0033.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rag.lm.forward import allocated, takes_positions
from rag.lm.native_cache import GrowingLayer, native_cache
from rag.lm.positions import trained_limit
from rag.lm.spec import Q8_GROUP, KVDtype, ModelSpec

_SCALE_BYTES = torch.bfloat16.itemsize
_LARGEST = 127
# So many tokens are read to learn the size of each channel, spread over the trained positions:
# rotation moves a channel's size to its partner and back.
_SAMPLE_TOKENS = 128
# No channel counts for less than this share of the mean: it may be small in the sample alone.
_LEAST_SIZE = 0.01

_KEY_SIZES: WeakKeyDictionary[Any, tuple[Tensor | None, ...]] = WeakKeyDictionary()


def new_cache(
    model: Any,  # noqa: ANN401 - a causal model of transformers
    spec: ModelSpec,
) -> DynamicCache:
    """Return an empty cache in the format of `spec.kv_dtype`.

    In 8 bits, the first one for a model takes a forward pass of a few tokens, to see its keys.

    Raises:
        OutOfMemoryError: if there is no memory for that.
    """
    cache = native_cache(model.config)
    if spec.kv_dtype is not KVDtype.Q8_0:
        return cache
    if model not in _KEY_SIZES:
        _KEY_SIZES[model] = allocated(
            lambda: _key_sizes(model, spec), f"while the keys of {_SAMPLE_TOKENS} tokens were seen"
        )
    for index, sizes in enumerate(_KEY_SIZES[model]):
        if sizes is not None:
            cache.layers[index] = EightBitLayer(sizes)
    return cache


class EightBitLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A full layer in 8 bits.

    `keys` and `values` are bytes [sequences, tokens, 34 * groups]: all heads of a token side by
    side in groups of 32, each a scale (bfloat16) before its numbers. Every token has scales of its
    own, so what it is rounded to depends neither on how a prompt is cut into chunks nor on the
    other sequences of a batch, and the layer is copied, cut and joined as a plain one is.

    Attention sees what is kept, the newest tokens included, in a copy in the model's dtype that
    lives as long as the layer is computed.
    """

    def __init__(self, key_sizes: Tensor) -> None:
        """Begin empty; `key_sizes` are those of each channel of all heads, [heads * width]."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.key_sizes = key_sizes

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor]:
        """Take new keys and values in and return all, [sequences, heads, tokens, head width]."""
        keys, values = packed(key_states, self.key_sizes), packed(value_states)
        if self.keys is not None and self.values is not None:
            keys = torch.cat([self.keys, keys], dim=-2)
            values = torch.cat([self.values, values], dim=-2)
        else:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = keys, values
        return unpacked(keys, key_states, self.key_sizes), unpacked(values, value_states)


def packed(states: Tensor, sizes: Tensor | None = None) -> Tensor:
    """Return [sequences, heads, tokens, width] as bytes [sequences, tokens, 34 * groups].

    Args:
        states: keys or values.
        sizes: what each channel is divided by first, [heads * width].
    """
    sequences, _, tokens, _ = states.shape
    rows = states.transpose(1, 2).reshape(sequences, tokens, -1).float()
    if sizes is not None:
        rows = rows / sizes
    groups = rows.view(sequences, tokens, -1, Q8_GROUP)
    scales = (groups.abs().amax(-1, keepdim=True) / _LARGEST).to(torch.bfloat16)
    scales = scales.clamp(min=torch.finfo(torch.bfloat16).tiny)  # a group may be all zeros
    # By the scale as it is kept; where that was rounded down, the largest may come out beyond 127.
    numbers = (groups / scales.float()).round().clamp(-_LARGEST, _LARGEST).to(torch.int8)
    blocks = torch.cat([scales.view(torch.uint8), numbers.view(torch.uint8)], dim=-1)
    return blocks.flatten(2)


def unpacked(kept: Tensor, like: Tensor, sizes: Tensor | None = None) -> Tensor:
    """Return all tokens of `packed` with the heads, width and dtype of the states `like`."""
    sequences, tokens, _ = kept.shape
    blocks = kept.view(sequences, tokens, -1, _SCALE_BYTES + Q8_GROUP)
    numbers = blocks[..., _SCALE_BYTES:].view(torch.int8).to(like.dtype)
    numbers *= blocks[..., :_SCALE_BYTES].view(torch.bfloat16).to(like.dtype)
    rows = numbers.reshape(sequences, tokens, -1)
    if sizes is not None:
        rows *= sizes.to(like.dtype)
    _, heads, _, width = like.shape
    return rows.view(sequences, tokens, heads, width).transpose(1, 2)


def _key_sizes(model: Any, spec: ModelSpec) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    """Return the largest key of each channel in each full layer, [heads * width] in float32.

    Tokens of no meaning will do: what makes a channel large is a bias, or a direction that most
    tokens share.
    """
    reach = trained_limit(spec) or _SAMPLE_TOKENS
    num_tokens = min(_SAMPLE_TOKENS, reach)
    ids = [7919 * index % spec.vocab_size for index in range(num_tokens)]
    cache = native_cache(model.config)
    options: dict[str, Any] = {}
    if takes_positions(type(model).forward):
        places = [index * (reach - 1) // max(1, num_tokens - 1) for index in range(num_tokens)]
        options["position_ids"] = torch.tensor([places], device=model.device)
    with torch.inference_mode():
        model(
            input_ids=torch.tensor([ids], device=model.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **options,
        )
    return tuple(map(_sizes, cache.layers))


def _sizes(layer: Any) -> Tensor | None:  # noqa: ANN401 - a cache layer of any kind
    if type(layer) is not GrowingLayer:
        return None
    assert layer.keys is not None
    largest = layer.keys.abs().amax(dim=(0, 2)).flatten().float()
    tiny = torch.finfo(torch.bfloat16).tiny
    return largest.clamp(min=max(tiny, _LEAST_SIZE * float(largest.mean())))
