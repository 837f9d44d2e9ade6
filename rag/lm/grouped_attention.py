"""Attention on a CPU: a chunk of a prompt by the paged kernel, few queries without repeating a key.

A chunk in bfloat16 that sees all that is cached and, of itself, what comes before goes to
`rag.lm.paged_attention`, where there is such a kernel. All else goes to torch, to which
transformers hands grouped heads in two ways that a CPU is slow at. One query without a mask
goes with `enable_gqa`, which computes every query head alone, a product of a vector with a matrix
each: 6 to 14 times slower than one product of the group's queries with the keys that they share.
Several queries under a mask go with keys and values repeated to all heads, which copies the whole
cache in every layer. Here a group's queries become rows of the head that they share, as long as
they are few; many go with `enable_gqa`, which is as fast then and copies nothing.

There the same kernel adds up the same numbers in the same order: in bfloat16 the results are equal
bit for bit, in float32 to the last bit.

Source: docs/decisions/0034 and 0041.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rag.lm.layers import VERIFIED_FAMILIES
from rag.lm.paged_attention import attend_paged

NAME = "fathom_grouped"

# From here on the queries of one head fill the kernel's blocks by themselves.
_FEW_QUERIES = 16
# What `sdpa` refuses, or works into the mask: left to it.
_SPECIAL = ("softcap", "position_bias", "cache")
# Their code hands a mask on even where nothing is hidden.
_ALWAYS_MASKED = frozenset({"biogpt"})


def use_grouped_attention(model: Any) -> None:  # noqa: ANN401 - a causal model of transformers
    """Let this model, and no other, attend so; one for which that is not tested stays as it is.

    Args:
        model: on its device. On a GPU, or with another attention than `sdpa`, nothing is changed.
    """
    if model.device.type != "cpu" or not can_attend_otherwise(model):
        return
    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, mask_unless_causal)
    model.set_attn_implementation(NAME)


def can_attend_otherwise(model: Any) -> bool:  # noqa: ANN401 - a causal model of transformers
    """Say whether an attention function of ours may stand for `sdpa` in this model."""
    text = model.config.get_text_config(decoder=True)
    # The code of latents asks for `sdpa` by its name, and has no heads to group.
    return (
        model.config._attn_implementation == "sdpa"
        and text.model_type in VERIFIED_FAMILIES
        and not getattr(text, "kv_lora_rank", None)
        and model._can_set_attn_implementation()
    )


def needs_no_mask(model: Any) -> bool:  # noqa: ANN401 - a causal model of transformers
    """Say whether the full layers of a model can attend to a chunk without a mask.

    What memory is planned with rests on this, as the attention itself does.
    """
    text = model.config.get_text_config(decoder=True)
    return can_attend_otherwise(model) and text.model_type not in _ALWAYS_MASKED


def is_plain(options: Mapping[str, Any]) -> bool:
    """Say whether an attention is asked for nothing that `sdpa` refuses or works into the mask."""
    return not any(options.get(name) is not None for name in _SPECIAL)


def grouped_attention(
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
    if attention_mask is None and T > 1:
        scale = D**-0.5 if scaling is None else scaling
        paged = attend_paged(query, key, value, scale=scale) if is_plain(kwargs) else None
        if paged is not None:
            return paged, None
        if T < K:
            attention_mask = causal_mask(T, K, query.device)
    shares = G < H and key.shape[-1] == value.shape[-1]
    has_plain_mask = T == 1 if attention_mask is None else attention_mask.shape[1] == 1
    if not (shares and is_plain(kwargs) and has_plain_mask):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    if T > _FEW_QUERIES:
        out = scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True
        )
    else:
        groups = H // G
        rows = query.reshape(B, G, groups * T, D)
        if attention_mask is not None:
            attention_mask = attention_mask.repeat(1, 1, groups, 1)
        out = scaled_dot_product_attention(
            rows, key, value, attn_mask=attention_mask, scale=scaling
        ).reshape(B, H, T, D)
    return out.transpose(1, 2).contiguous(), None


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """Return who sees whom where the queries are the newest of the keys, bool [1, 1, T, K]."""
    every = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return every.tril_(num_keys - num_queries)[None, None]


def mask_unless_causal(
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,  # noqa: ANN401
) -> Tensor | None:
    """Return the mask of `sdpa`; None where a query sees the keys up to its own, one of the last.

    The arguments are those of transformers' `sdpa_mask`.
    """
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
