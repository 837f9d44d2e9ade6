"""Attention through a sliding window with sinks: who sees whom, and the kernels that compute it.

A query sees the keys of a window that ends with its own, and the sinks, which are the first keys of
all. Where a sink is further away than it may be, its scores are computed apart from queries that
were turned back, and take the place of what query and key would give: worked into the mask, by
scaled_dot_product_attention on any device; on a GPU by FlexAttention, which skips what nobody
sees of the window, with the sinks as a part beside it, joined by the logarithms of their sums; or
on a CPU by a paged kernel, which skips that, too, with the sinks as one more key.

Nothing here knows of a model: `rag.lm.windowed_attention` fits a window to one.

Source: StreamingLLM, arXiv:2309.17453; FlexAttention, arXiv:2412.05496; docs/decisions/0019.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rag.lm.paged_window import attend_paged_window
from rag.lm.partial_attention import join

# FlexAttention refuses narrower heads.
_FLEX_WIDTH = 16


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """What a windowed cache keeps: the first `num_sinks` tokens, and a window behind the newest.

    `window` counts the keys a token attends to beside the sinks, itself included. With
    `caps_sink_distance` a sink is never further away than the cache is long; without it the sinks
    stay at their true distance, which is plain attention under a mask and leaves the trained range
    where the text does.
    """

    num_sinks: int
    window: int
    caps_sink_distance: bool = True

    def __post_init__(self) -> None:
        if self.num_sinks < 0 or self.window < 1:
            raise ValueError(
                f"num_sinks is {self.num_sinks} and window {self.window};"
                " expected 0 or more, and 1 or more"
            )

    def kept_tokens(self, num_tokens: int) -> int:
        """Return how many of `num_tokens` tokens stay in the cache once all were read.

        `kv_cache_bytes(spec, plan.kept_tokens(n))` are the cache's bytes.
        """
        return min(num_tokens, self.num_sinks + self.window - 1)


def visible_keys(plan: WindowPlan, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """Return who sees whom, bool [num_queries, num_keys]; the queries are the newest keys.

    Slots of the cache stand for positions: those of the window are contiguous up to the newest,
    and once tokens have left, every sink comes before every query.
    """
    query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key = torch.arange(num_keys, device=device)[None]
    return (key <= query) & ((key > query - plan.window) | (key < plan.num_sinks))


Attend = Callable[[Tensor, Tensor, Tensor, "WindowStep", Tensor | None, float], Tensor]


@dataclass(frozen=True, slots=True)
class WindowStep:
    """One forward pass: handed through the model to every layer's attention.

    `mask` is bool [T, K]; `turn` are the cosines and sines that turn this pass's queries to where
    the sinks see them, None where that is where they are.
    """

    num_sinks: int
    window: int
    mask: Tensor
    turn: tuple[Tensor, Tensor] | None
    turning_layers: frozenset[int]
    attend: Attend


def choose_attention(device: torch.device, num_queries: int) -> Attend:
    """Return how attention is computed: the only place that chooses.

    Of one query there is nothing to skip.
    """
    if num_queries == 1:
        return attend_sdpa
    return attend_flex if device.type == "cuda" else attend_pages


def attend_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: WindowStep,
    sink_scores: Tensor | None,
    scale: float,
) -> Tensor:
    """Attend by one call of scaled_dot_product_attention with a mask; any device.

    Args:
        query: [B, H, T, D].
        key: [B, G, K, D] with H a multiple of G; so is `value`.
        value: [B, G, K, D].
        step: who sees whom.
        sink_scores: float32 [B, H, T, step.num_sinks], scaled, to put in the place of what query
            and key would give; None where their own scores are right.
        scale: the factor of the scores.

    Returns:
        [B, H, T, D].
    """
    B, H, T, D = query.shape
    groups = H // key.shape[1]
    # The queries that share a key head become rows of it: no key is repeated, on no backend.
    rows = query.reshape(B, key.shape[1], groups * T, D)
    mask = step.mask.repeat(groups, 1)  # [groups * T, K]
    if sink_scores is not None:
        S = step.num_sinks
        # Zeroed keys score 0, so that the mask can carry the whole score.
        key = torch.cat([torch.zeros_like(key[:, :, :S]), key[:, :, S:]], dim=2)
        bias = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)
        mask = bias.expand(B, key.shape[1], -1, -1).clone()  # [B, G, groups * T, K]
        mask[..., :S] += sink_scores.reshape(B, key.shape[1], groups * T, S)
        mask = mask.to(query.dtype) if query.device.type == "cuda" else mask
    else:
        mask = mask[None, None]
    out = scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale)
    return out.reshape(B, H, T, -1)


def attend_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: WindowStep,
    sink_scores: Tensor | None,
    scale: float,
) -> Tensor:
    """Attend by FlexAttention, which skips the blocks that no query sees; as `attend_sdpa`.

    It sees the window alone. The sinks are a part beside it, with scores of their own: worked into
    the kernel, those would be looked up for every key that it computes.
    """
    B, H, T, D = query.shape
    G, S = key.shape[1], step.num_sinks
    before, is_cuda = key.shape[2] - T, query.device.type == "cuda"
    if before + T <= S or (is_cuda and D < _FLEX_WIDTH):  # there is no window yet, or no kernel
        return attend_sdpa(query, key, value, step, sink_scores, scale)
    kernel, options = _plain_flex(), None
    if is_cuda:
        kernel, options = _compiled_flex(), _flex_options(query.device, query.element_size())
    mask = _block_mask(step.window, T, before - S, str(query.device))
    behind, aux = kernel(
        query,
        key[:, :, S:],
        value[:, :, S:],
        None,
        mask,
        scale,
        H != G,
        kernel_options=options,
        return_aux=_aux_request(),
    )
    if not S:
        found: Tensor = behind
        return found
    if sink_scores is None:
        sink_scores = _own_scores(query, key[:, :, :S], scale)
    if before < S:  # the sinks are being read: none is seen before it stands there
        seen = torch.arange(S, device=query.device) <= torch.arange(T, device=query.device)[:, None]
        sink_scores = sink_scores.masked_fill(~seen, -torch.inf)
    weights = sink_scores.softmax(-1).to(value.dtype).view(B, G, H // G * T, S)
    sinks = (weights @ value[:, :, :S]).view(B, H, T, -1)
    return join((sinks, sink_scores.logsumexp(-1)), (behind, aux.lse))


def attend_pages(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: WindowStep,
    sink_scores: Tensor | None,
    scale: float,
) -> Tensor:
    """Attend by a paged kernel of the CPU where there is one, once the sinks are read.

    As `attend_sdpa`, which does it else.
    """
    S, T = step.num_sinks, query.shape[2]
    if S and key.shape[2] - T >= S:
        scores = _own_scores(query, key[:, :, :S], scale) if sink_scores is None else sink_scores
        found = attend_paged_window(query, key, value, scores, window=step.window, scale=scale)
        if found is not None:
            return found
    return attend_sdpa(query, key, value, step, sink_scores, scale)


def _own_scores(query: Tensor, sinks: Tensor, scale: float) -> Tensor:
    """Return the scores of sinks [B, G, S, D] where they are, float32 [B, H, T, S]."""
    B, H, T, D = query.shape
    G, S = sinks.shape[1:3]
    # The queries that share a key head become rows of it.
    rows = query.reshape(B, G, H // G * T, D).float()
    return (rows @ sinks.float().mT * scale).view(B, H, T, S)


@cache
def _compiled_flex() -> Any:  # noqa: ANN401
    return torch.compile(_plain_flex())


def _plain_flex() -> Any:  # noqa: ANN401
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


@cache
def _flex_options(device: torch.device, element_size: int) -> dict[str, int] | None:
    """Return the tiles of the kernel; None leaves them to torch.

    On an H100 these take 1.76 and 5.02 ms for 32,768 tokens through windows of 1,024 and 4,096 (32
    heads of 128), torch's own 2.13 and 5.32. They need 112 KB of a processor's own memory, which
    smaller cards do not have.
    """
    if element_size != 2 or torch.cuda.get_device_capability(device) < (9, 0):
        return None
    return {"BLOCK_M": 64, "BLOCK_N": 64, "num_stages": 3, "num_warps": 4}


def _aux_request() -> Any:  # noqa: ANN401
    from torch.nn.attention.flex_attention import AuxRequest

    return AuxRequest(lse=True)


@cache
def _block_mask(window: int, num_queries: int, before: int, device: str) -> Any:  # noqa: ANN401
    """Return FlexAttention's form of a window; the same for every chunk once that is full.

    `before` counts the keys before the first query's own; those of the first chunk, whose sinks are
    a part of their own, are fewer than its queries.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q + before) & (k > q + before - window)

    return create_block_mask(visible, None, None, num_queries, num_queries + before, device=device)
