"""A window with sinks on a CPU by the paged kernel: all sinks as one more key of each query.

The kernel knows windows, but no keys that stay in sight of all, and it does not say how much there
was to attend to, so that another part could be joined to its result. What it can be told is the
score of one key that stands for all sinks: the logarithm of the sum of their exponentials. That key
comes beside the queries' own block, where every window holds it. Heads are widened for it: the
query brings its score in three pieces that bfloat16 holds, the key takes them up, and its value is
1 in a place of its own, where the result then has the share of the sinks. Their values are added
outside by that share.

Some blocks of queries are a sequence of their own, of the blocks that their windows touch. Slots
that hold nothing get a score that is no share of anything.

Source: docs/decisions/0019 and 0041.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from rag.lm.paged_attention import Pages, paged_kernel
from rag.lm.peak_bytes import BLOCK_TOKENS

# Places that heads are widened by: three for the score of the sinks, one for slots of nothing, and
# what the kernel wants as a multiple.
_EXTRA_WIDTH = 8
_PIECES = 3
_HIDDEN_SCORE = -1e30
# Queries of one sequence: more of them share the blocks that are laid out for it, fewer see less
# that is outside their windows.
_SEQUENCE_TOKENS = 128


def attend_paged_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink_scores: Tensor,
    *,
    window: int,
    scale: float,
) -> Tensor | None:
    """Attend to the sinks, which all queries see, and to a window that ends with each one's key.

    Args:
        query: [1, H, T, D].
        key: [1, G, K, D] with H a multiple of G: the sinks, what is in the window of the first
            query before it, and the keys of all queries; so is `value`.
        value: [1, G, K, D].
        sink_scores: float32 [1, H, T, sinks], scaled; there is a sink at least.
        window: keys that a query sees beside the sinks, its own included.
        scale: the factor of the scores.

    Returns:
        [1, H, T, D]; None, and nothing done, where the kernel is not to be had for this.
    """
    (H, T, D), G, S = query.shape[1:], key.shape[1], sink_scores.shape[-1]
    before = key.shape[2] - S - T
    if window < BLOCK_TOKENS:
        return None
    kernel = paged_kernel(
        query,
        key,
        value,
        scale=scale,
        window=window + BLOCK_TOKENS,  # the sinks' block lies between
        extra_width=_EXTRA_WIDTH,
    )
    if kernel is None:
        return None
    filled = before + -before % BLOCK_TOKENS
    keys = _widened(key[0, :, S:], before, filled)
    values = _widened(value[0, :, S:], before, filled)
    keys[:, filled, D : D + _PIECES] = 1
    values[:, filled, D] = 1
    is_nothing = torch.ones(keys.shape[1], dtype=torch.bool)
    is_nothing[filled - before : filled + 1] = False
    is_nothing[filled + BLOCK_TOKENS : filled + BLOCK_TOKENS + T] = False
    keys[:, is_nothing, D + _PIECES] = 1

    scores = sink_scores.view(G, H // G, T, S).transpose(1, 2)
    sums = scores.logsumexp(-1)
    weights = (scores - sums[..., None]).exp_().reshape(G, -1, S)
    sinks = (weights @ value[0, :, :S].float()).view(G, T, H // G, D).to(query.dtype)

    rows = query.new_zeros(G, T, H // G, D + _EXTRA_WIDTH)
    rows[..., :D] = query.view(G, H // G, T, D).transpose(1, 2)
    left = sums / scale
    for piece in range(D, D + _PIECES):
        rows[..., piece] = left
        left = left - rows[..., piece]
    rows[..., D + _PIECES] = _HIDDEN_SCORE / scale

    own = slice(filled + BLOCK_TOKENS, filled + BLOCK_TOKENS + T)
    pages = _pages(before, T, window)
    seen = query.new_empty(T, G, H // G, D)
    for head in range(G):
        found = kernel.attend(
            rows[head].view(T, -1),
            (keys[head, own], values[head, own]),
            (_blocks(keys[head]), _blocks(values[head])),
            pages,
        ).view(T, H // G, -1)
        torch.addcmul(found[..., :D], found[..., D : D + 1], sinks[head], out=seen[:, head])
    return seen.view(1, T, H, D).transpose(1, 2)


def _widened(states: Tensor, before: int, filled: int) -> Tensor:
    """Return [G, slots, wider] of [G, keys, width]: zeros, `before` keys, a block, the others."""
    G, num_keys, width = states.shape
    own = num_keys - before
    slots = filled + BLOCK_TOKENS + own + -own % BLOCK_TOKENS
    wider = states.new_zeros(G, slots, width + _EXTRA_WIDTH)
    wider[:, filled - before : filled, :width] = states[:, :before]
    wider[:, filled + BLOCK_TOKENS : filled + BLOCK_TOKENS + own, :width] = states[:, before:]
    return wider


def _blocks(slots: Tensor) -> Tensor:
    return slots.view(-1, 1, BLOCK_TOKENS, slots.shape[-1])


@lru_cache(maxsize=8)
def _pages(before: int, num_queries: int, window: int) -> Pages:
    """Return the blocks of each sequence: its windows', the sinks', its own."""
    held = -(-before // BLOCK_TOKENS)
    step = min(_SEQUENCE_TOKENS, window // BLOCK_TOKENS * BLOCK_TOKENS)  # all see the sinks' block
    past, own, blocks = [], [], []
    for begin in range(0, num_queries, step):
        end = min(begin + step, num_queries)
        # As if there were no block of sinks.
        first = held + begin // BLOCK_TOKENS
        last = held + -(-end // BLOCK_TOKENS)
        oldest = max(0, first * BLOCK_TOKENS - window + 1) // BLOCK_TOKENS
        seen = [block if block < held else block + 1 for block in range(oldest, first)]
        past.append(BLOCK_TOKENS * (len(seen) + 1))
        own.append(end - begin)
        blocks.append([*seen, held, *range(first + 1, last + 1)])
    return Pages.of(past, own, blocks)
