"""Attention of a chunk behind a cache, on a GPU: in two parts, neither of which needs a mask.

What a query of a chunk sees is all of the cache, and of the chunk what comes before it. Said by a
mask, that goes to a kernel which computes what is hidden, too, and reads the mask from memory: on
an H100 4,096 queries reach 30 to 39% of what its matrix units can do behind 4,096 to 32,768 keys,
in two parts 49 to 77%.

Source: docs/decisions/0040.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rag.lm.grouped_attention import causal_mask, is_plain, mask_unless_causal, needs_no_mask
from rag.lm.partial_attention import Part, attend, has_fused_attention, join

NAME = "fathom_chunked"


def use_chunked_attention(model: Any) -> None:  # noqa: ANN401 - a causal model of transformers
    """Let this model, and no other, attend so; one for which that is not tested stays as it is.

    Args:
        model: on its device. On a CPU, or with another attention than `sdpa`, nothing is changed.
    """
    if model.device.type == "cuda" and needs_no_mask(model):
        model.set_attn_implementation(NAME)


def has_kernel_here(width: int, *, dtype_bytes: int) -> bool:
    """Say `has_kernel` of heads of one width, in the dtype of so many bytes, on this GPU."""
    dtype = torch.bfloat16 if dtype_bytes == 2 else torch.float32
    return has_kernel(torch.device("cuda"), dtype, width, width)


def has_kernel(device: torch.device, dtype: torch.dtype, width: int, value_width: int) -> bool:
    """Say whether a device has a kernel without a mask for keys and values of these widths."""
    return width == value_width and has_fused_attention(device, dtype, width)


def chunked_attention(
    module: Any,  # noqa: ANN401
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,  # noqa: ANN401 - what other attention functions use
) -> tuple[Tensor, None]:
    """The attention function, as transformers calls it.

    Args:
        module: the layer's attention.
        query: [B, H, T, D].
        key: [B, G, K, D] with H a multiple of G; so is `value`.
        value: [B, G, K, D].
        attention_mask: [B or 1, H or 1, T, K], bool or to be added; None where a query sees the
            keys up to its own, and is one of the newest.
        scaling: the factor of the scores; by default the inverse root of D.
        kwargs: handed on.

    Returns:
        [B, T, H, D], and no weights.
    """
    H, T, D = query.shape[1:]
    G, K = key.shape[1:3]
    if attention_mask is not None or T in (1, K) or not is_plain(kwargs):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    if not has_kernel(query.device, query.dtype, D, value.shape[-1]):
        visible = causal_mask(T, K, query.device)
        return sdpa_attention_forward(module, query, key, value, visible, scaling=scaling, **kwargs)
    scale = D**-0.5 if scaling is None else scaling
    before = _attend_folded(query, key[:, :, : K - T], value[:, :, : K - T], scale)
    own = (states[:, :, K - T :].repeat_interleave(H // G, 1) for states in (key, value))
    after = attend(query, *own, scale=scale, is_causal=True)
    return join(before, after).transpose(1, 2).contiguous(), None


def _attend_folded(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Part:
    """Attend to what all queries see: those that share a key head become rows of it.

    So no key of the cache is repeated, and what is copied for it is gone on return.
    """
    B, H, T, D = query.shape
    G = key.shape[1]
    out, sums = attend(query.reshape(B, G, H // G * T, D), key, value, scale=scale)
    return out.reshape(B, H, T, D), sums.reshape(B, H, T)


AttentionInterface.register(NAME, chunked_attention)
AttentionMaskInterface.register(NAME, mask_unless_causal)
