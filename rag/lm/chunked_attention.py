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
from transformers.masking_utils import sdpa_mask

from rag.lm.grouped_attention import can_attend_otherwise, is_plain
from rag.lm.partial_attention import attend, has_fused_attention, join

NAME = "fathom_chunked"


def use_chunked_attention(model: Any) -> None:  # noqa: ANN401 - a causal model of transformers
    """Let this model, and no other, attend so; one for which that is not tested stays as it is.

    Args:
        model: on its device. On a CPU, or with another attention than `sdpa`, nothing is changed.
    """
    if model.device.type == "cuda" and can_attend_otherwise(model):
        model.set_attn_implementation(NAME)


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
    B, H, T, D = query.shape
    G, K = key.shape[1:3]
    if attention_mask is not None or T in (1, K) or not is_plain(kwargs):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    if value.shape[-1] != D or not has_fused_attention(query.device, query.dtype, D):
        visible = torch.ones(T, K, dtype=torch.bool, device=query.device).tril(K - T)
        return sdpa_attention_forward(
            module, query, key, value, visible[None, None], scaling=scaling, **kwargs
        )
    scale = D**-0.5 if scaling is None else scaling
    groups = H // G
    # The queries that share a key head become rows of it: no key of the cache is repeated.
    rows = query.reshape(B, G, groups * T, D)
    out, sums = attend(rows, key[:, :, : K - T], value[:, :, : K - T], scale=scale)
    before = out.reshape(B, H, T, D), sums.reshape(B, H, T)
    own = (states[:, :, K - T :].repeat_interleave(groups, 1) for states in (key, value))
    after = attend(query, *own, scale=scale, is_causal=True)
    return join(before, after).transpose(1, 2).contiguous(), None


def _mask(
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,  # noqa: ANN401
) -> Tensor | None:
    """Return the mask of `sdpa`, or None where `chunked_attention` knows who sees whom."""
    is_causal = allow_is_causal_skip and attention_mask is None and local_size is None
    if is_causal and q_offset + q_length == kv_offset + kv_length:
        return None
    mask: Tensor | None = sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )
    return mask


AttentionInterface.register(NAME, chunked_attention)
AttentionMaskInterface.register(NAME, _mask)
