"""Attention on a GPU: a window with sinks beside a dense mask, and one token over a long cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from eval.bench.gpu_run import Run, difference

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class AttentionShapes:
    """One layer's heads, what they read, and through which windows."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_tokens: int
    num_sinks: int
    windows: tuple[int, ...]
    one_query_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AttentionRow:
    """One layer's attention of a whole prompt.

    `useful_share` counts the visible pairs alone, as a share of the measured matrix-product
    ceiling. `ratio` is the seconds of a dense mask, which is transformers' way to a window, to its
    own; `difference` that of the two results. Both are None for the full attention beside them.
    """

    way: str
    num_tokens: int
    window: int | None
    seconds: float
    useful_share: float
    ratio: float | None
    difference: float | None


@dataclass(frozen=True, slots=True)
class OneQueryRow:
    """One layer's attention of one token; `share` is that of the measured bandwidth."""

    way: str
    num_tokens: int
    seconds: float
    share: float


def visible_pairs(num_tokens: int, window: int | None = None, num_sinks: int = 0) -> int:
    """Return how many query-key pairs a causal window with sinks shows.

    A query sees the `window` keys up to its own, and those of the first `num_sinks` before them.
    """
    if window is None or window >= num_tokens:
        return num_tokens * (num_tokens + 1) // 2
    beyond = num_tokens - window  # queries that do not see the first key by the window
    growing = min(beyond, num_sinks)
    sinks = growing * (growing + 1) // 2 + (beyond - growing) * num_sinks
    return window * (window + 1) // 2 + beyond * window + sinks


def bench_attention(run: Run, shapes: AttentionShapes) -> list[AttentionRow]:
    """Time a window with sinks as sessions do it, by a dense mask, and full causal attention."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    n, width = shapes.num_tokens, shapes.head_dim
    groups = shapes.num_heads // shapes.num_kv_heads
    flops_of_a_pair = 4 * shapes.num_heads * width
    rows: list[AttentionRow] = []

    def useful(window: int | None, seconds: float) -> float:
        pairs = visible_pairs(n, window, shapes.num_sinks)
        return flops_of_a_pair * pairs / seconds / run.matmul_flops_per_second

    query, key, value = _random(run, shapes, n, num_queries=n)
    what = f"full attention of {n:,} tokens"
    if not run.too_late(what):
        with run.section(what), torch.inference_mode():
            seconds = run.middle(
                lambda: scaled_dot_product_attention(
                    query, key, value, is_causal=True, enable_gqa=True
                )
            )
            rows.append(AttentionRow("full", n, None, seconds, useful(None, seconds), None, None))
    for window in shapes.windows:
        what = f"attention of {n:,} tokens through a window of {window:,}"
        if run.too_late(what):
            continue
        with run.section(what), torch.inference_mode():
            rows += _windowed(run, shapes, window, groups, (query, key, value), useful)
    return rows


def _windowed(
    run: Run,
    shapes: AttentionShapes,
    window: int,
    groups: int,
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    useful: Any,  # noqa: ANN401
) -> list[AttentionRow]:
    from torch.nn.functional import scaled_dot_product_attention

    from rag.lm.window_kernels import WindowPlan, WindowStep, choose_attention, visible_keys

    query, key, value = states
    n, scale = shapes.num_tokens, shapes.head_dim**-0.5
    plan = WindowPlan(num_sinks=shapes.num_sinks, window=window)
    mask = visible_keys(plan, n, n, run.device)
    attend = choose_attention(run.device, n)
    step = WindowStep(plan.num_sinks, window, mask, None, frozenset(), attend)

    def ours() -> torch.Tensor:
        return attend(query, key, value, step, None, scale)

    def dense() -> torch.Tensor:
        keys, values = (states.repeat_interleave(groups, 1) for states in (key, value))
        return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)

    apart = difference(ours(), dense())
    seconds, theirs = run.middle(ours), run.middle(dense, times=2)
    return [
        AttentionRow(
            "window", n, window, seconds, useful(window, seconds), theirs / seconds, apart
        ),
        AttentionRow("dense mask", n, window, theirs, useful(window, theirs), 1.0, 0.0),
    ]


def bench_one_query(run: Run, shapes: AttentionShapes) -> list[OneQueryRow]:
    """Time one token's attention as a recorded step does it, three ways; recorded all of them.

    The limit reads all keys and values once. `in place` goes on from the prompt as it stands, with
    the answer's slots beside it; `copied` has both in one static cache, as models with windows do;
    `plain` is torch's own kernel.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from rag.lm.kv_bytes import STATIC_PARTS
    from rag.lm.shared_prefix import attend_prefix
    from rag.lm.static_cache import attend_one, num_parts

    rows: list[OneQueryRow] = []
    scale = shapes.head_dim**-0.5
    for n in shapes.one_query_tokens:
        what = f"attention of one token to {n:,}"
        if run.too_late(what):
            continue
        with run.section(what), torch.inference_mode():
            # As many layers as the card's own cache cannot hold, one after the other.
            layers = [_random(run, shapes, n, num_queries=1) for _ in range(8)]
            _, answer_key, answer_value = _random(run, shapes, STATIC_PARTS, num_queries=1)
            num_bytes = sum(s.numel() * s.element_size() for layer in layers for s in layer[1:])

            def attend(
                query: torch.Tensor,
                key: torch.Tensor,
                value: torch.Tensor,
                before: tuple[torch.Tensor, torch.Tensor] | None = None,
            ) -> torch.Tensor:
                slots = key.shape[2]
                bias = torch.zeros(1, slots, device=run.device)
                parts = num_parts(slots, num_rows=1)
                return attend_one(query, key, value, bias, parts=parts, scale=scale, before=before)

            ways: dict[str, Callable[..., torch.Tensor]] = {
                "in place": lambda query, *prompt: attend(
                    query,
                    answer_key,  # noqa: B023
                    answer_value,  # noqa: B023
                    before=attend_prefix(query, *prompt, scale=scale),
                ),
                "copied": attend,
                "plain": partial(scaled_dot_product_attention, enable_gqa=True),
            }
            for way, each in ways.items():

                def attend_all(each: Callable[..., torch.Tensor] = each) -> None:
                    for layer in layers:  # noqa: B023
                        each(*layer)

                seconds = run.middle(run.recorded(attend_all))
                share = num_bytes / seconds / run.copy_bytes_per_second
                rows.append(OneQueryRow(way, n, seconds / len(layers), share))
    return rows


def lines(rows: Sequence[AttentionRow], one_query: Sequence[OneQueryRow]) -> list[str]:
    """Return the figures for people."""
    found = []
    if rows:
        found += [
            "",
            f"{'attention':<14} {'tokens':>8} {'window':>8} {'ms':>9} {'useful':>7} {'to mask':>8}",
        ]
        found += [
            f"{row.way:<14} {row.num_tokens:>8,} {row.window or '-':>8} {row.seconds * 1e3:>9.3f}"
            f" {row.useful_share:>7.1%} {_or_dash(row.ratio):>8}"
            for row in rows
        ]
    if one_query:
        found += ["", f"{'one query':<14} {'tokens':>8} {'us':>9} {'share':>6}"]
        found += [
            f"{row.way:<14} {row.num_tokens:>8,} {row.seconds * 1e6:>9.1f} {row.share:>6.0%}"
            for row in one_query
        ]
    return found


def _or_dash(number: float | None) -> str:
    return "-" if number is None else f"{number:.1f}"


def _random(
    run: Run, shapes: AttentionShapes, num_keys: int, *, num_queries: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries [1, H, num_queries, D], keys and values [1, G, num_keys, D]."""
    import torch

    def random(heads: int, tokens: int) -> torch.Tensor:
        size = (1, heads, tokens, shapes.head_dim)
        return torch.randn(size, device=run.device, dtype=run.dtype)

    keys, values = (random(shapes.num_kv_heads, num_keys) for _ in range(2))
    return random(shapes.num_heads, num_queries), keys, values
