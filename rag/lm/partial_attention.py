"""Attention in parts: each says how much there was to attend to, so that they can be joined.

A softmax over all keys is a mean of those over parts of them, weighted by the sums of their
exponentials. So a part is computed by whichever kernel is good at it, one that knows no mask for
what all queries see, and one that is causal for what they see of each other.

Source: the log-sum-exp of FlashAttention, arXiv:2205.14135; docs/decisions/0037 and 0040.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from rag.lm.agreement import difference

logger = logging.getLogger(__name__)

Part = tuple[Tensor, Tensor]

# What rounding to 16 bits makes of the same attention, at most.
_KERNEL_TOLERANCE = 0.02
# Queries whose scores the plain attention writes out at once.
PLAIN_QUERIES = 256
# From here on cuDNN, which plans for every shape, is worth its plan: on an H100 twice as fast as
# flash attention with 4,096 queries a head, a quarter as fast with four or with 128.
_MANY_QUERIES = 1_024


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    is_causal: bool = False,
) -> Part:
    """Attend, and say how much there was to attend to: the only place that chooses how.

    Args:
        query: [B, G, T, D].
        key: [B, G, K, D]; so is `value`.
        value: [B, G, K, D].
        mask: who sees whom, bool [B, 1, T, K], at least one key each; None if all see all.
        scale: the factor of the scores.
        is_causal: a query sees the keys up to its own, of as many; without a mask.

    Returns:
        [B, G, T, D], and the logarithms of the sums of the exponentials of the scores, float32
        [B, G, T].
    """
    widths = query.shape[-1], value.shape[-1]
    kernel = _choose(query.device, query.dtype, *widths, query.shape[2], mask is not None)
    if kernel == "cpu":
        bias = None
        if mask is not None:
            bias = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
        # What scaled_dot_product_attention calls on a CPU; it alone gives the sums too.
        on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, sums = on_cpu(query, key, value, attn_mask=bias, is_causal=is_causal, scale=scale)
        return out, sums.float()
    if kernel != "plain":
        return _FUSED[kernel](query, key, value, scale, is_causal)
    return attend_plain(query, key, value, mask, scale=scale, is_causal=is_causal)


def join(one: Part, other: Part) -> Tensor:
    """Return what attention to the keys of both parts gives, [B, G, T, D], in their dtype."""
    share = torch.sigmoid(one[1] - other[1])[..., None]  # exp(a) / (exp(a) + exp(b))
    return torch.lerp(other[0].float(), one[0].float(), share).to(one[0].dtype)


def attend_plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    is_causal: bool = False,
) -> Part:
    """Attend in float32 by two products, some queries at a time; any device; as `attend`."""
    outs, sums = [], []
    if is_causal:
        size = (query.shape[2], key.shape[2])
        mask = torch.ones(size, dtype=torch.bool, device=query.device).tril()[None, None]
    for begin in range(0, query.shape[2], PLAIN_QUERIES):
        part = slice(begin, begin + PLAIN_QUERIES)
        scores = query[:, :, part].float() @ key.float().mT * scale
        if mask is not None:
            scores = scores.masked_fill(~mask[:, :, part], -torch.inf)
        sums.append(scores.logsumexp(-1))
        outs.append((scores.softmax(-1) @ value.float()).to(query.dtype))
    return torch.cat(outs, dim=2), torch.cat(sums, dim=2)


def has_fused_attention(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Say whether `attend` has a kernel without a mask for heads of this width."""
    kernel: str = _choose(device, dtype, width, width, _MANY_QUERIES, False)
    return kernel != "plain"


# ---- the kernels that scaled_dot_product_attention calls on a GPU; these give the sums ----------

_Kernel = Callable[[Tensor, Tensor, Tensor, float, bool], Part]


def _flash(query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool) -> Part:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention
    out, sums, *_ = kernel(query, key, value, 0.0, is_causal, scale=scale)
    return out, sums


def _cudnn(query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool) -> Part:
    kernel = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, sums, *_ = kernel(query, key, value, None, True, 0.0, is_causal, scale=scale)
    return out, sums.view(out.shape[:3])


_FUSED: dict[str, _Kernel] = {"flash": _flash, "cudnn": _cudnn}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _choose(
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    value_width: int,
    num_queries: int,
    has_mask: bool,
) -> str:
    """Return which kernel; a compiler asks once and builds upon it."""
    if device.type == "cpu":
        return "cpu"
    fused = ("flash",) if num_queries < _MANY_QUERIES else ("cudnn", "flash")
    for name in fused if not has_mask else ():
        if works(name, device, dtype, width, value_width):
            return name
    return "plain"


@lru_cache
def works(
    name: str, device: torch.device, dtype: torch.dtype, width: int, value_width: int
) -> bool:
    """Say whether a device has a kernel for such heads: tried, and compared, once.

    Args:
        name: flash or cudnn.
        device: where.
        dtype: of queries, keys and values.
        width: of queries and keys.
        value_width: of values.
    """
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    if width % 8 or width != value_width:
        return False
    kernel = _FUSED[name]
    if name == "cudnn" and torch.cuda.get_device_capability(device) < (9, 0):
        return False  # flash attention is as fast there, and plans nothing
    with torch.inference_mode():
        some = torch.Generator(device).manual_seed(1)
        shape = (3, 1, 2, 160, width)
        query, key, value = torch.randn(shape, generator=some, device=device, dtype=dtype)
        scale = width**-0.5
        try:
            return all(
                difference(ours, theirs) <= _KERNEL_TOLERANCE
                for few, is_causal in ((query[:, :, :9], False), (query, True))
                for ours, theirs in zip(
                    kernel(few, key, value, scale, is_causal),
                    attend_plain(few, key, value, scale=scale, is_causal=is_causal),
                    strict=True,
                )
            )
        except RuntimeError as error:
            logger.info("no %s attention with its sums here: %s", name, error)
            return False
