"""Prefill on a GPU: transformers, ours in chunks, ours through a window; twins that must agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eval.bench.gpu_attention import visible_pairs
from eval.bench.gpu_run import Run, chunks, difference, read, some_ids
from rag.lm.kv_bytes import kv_cache_bytes, measured_kv_bytes
from rag.lm.spec import CHUNK_TOKENS

if TYPE_CHECKING:
    from rag.lm.spec import ModelSpec
    from rag.lm.window_kernels import WindowPlan

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """One prefill, after one that warmed the kernels up.

    `way` is `transformers`, the whole prompt at once; `full`, in chunks through the model's own
    cache (which keeps a window where a layer has one); or `windowed`, in chunks through a fitted
    window with sinks. `peak_bytes` is the most that was allocated beside the weights. `floor_share`
    are the seconds that the products nobody can leave out take at the measured matrix-product
    ceiling, to its own: linear layers, and the pairs of tokens that see each other.
    """

    model: str
    way: str
    num_tokens: int
    seconds: float
    tokens_per_second: float
    floor_share: float
    kv_bytes_predicted: int
    kv_bytes_actual: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class TwinRow:
    """A path beside its plain twin: root mean square of the difference, relative."""

    name: str
    difference: float
    tolerance: float
    agrees: bool


def useful_flops(
    spec: ModelSpec, num_tokens: int, *, window: int | None = None, num_sinks: int = 0
) -> int:
    """Return the operations of a prefill that no kernel can leave out.

    Args:
        spec: of a model that attends in every layer.
        num_tokens: of the prompt.
        window: a fitted one; layers with a window of their own keep that.
        num_sinks: the first tokens that stay visible beside it.
    """
    attention = 0
    for layer in spec.layers:
        if layer.window is None:
            pairs = visible_pairs(num_tokens, window, num_sinks)
        else:
            pairs = visible_pairs(num_tokens, layer.window)
        attention += 4 * layer.query_elements_per_token * pairs
    return 2 * spec.linear_parameters * num_tokens + attention


def bench_prefill(
    run: Run,
    name: str,
    model: Any,  # noqa: ANN401
    spec: ModelSpec,
    plan: WindowPlan,
    num_tokens: int,
) -> list[PrefillRow]:
    """Prefill one prompt in every way that the model has."""
    ids = some_ids(num_tokens, spec.vocab_size)
    ways = {"transformers": _at_once, "full": _in_chunks, "windowed": _through_window}
    if any(layer.window is not None for layer in spec.layers):
        del ways["windowed"]  # a model's own windows are part of `full`
    rows: list[PrefillRow] = []
    for way, prefill in ways.items():
        what = f"{name}: {way} prefill of {num_tokens:,} tokens"
        if run.too_late(what):
            continue
        with run.section(what):
            seconds, peak, kv_bytes = prefill(run, model, plan, ids)
            is_windowed = way == "windowed"
            kept = plan.kept_tokens(num_tokens) if is_windowed else num_tokens
            flops = useful_flops(
                spec,
                num_tokens,
                window=plan.window if is_windowed else None,
                num_sinks=plan.num_sinks,
            )
            rows.append(
                PrefillRow(
                    model=name,
                    way=way,
                    num_tokens=num_tokens,
                    seconds=seconds,
                    tokens_per_second=num_tokens / seconds,
                    floor_share=flops / run.matmul_flops_per_second / seconds,
                    kv_bytes_predicted=kv_cache_bytes(spec, kept),
                    kv_bytes_actual=kv_bytes,
                    peak_bytes=peak,
                )
            )
    return rows


def _at_once(
    run: Run,
    model: Any,  # noqa: ANN401
    plan: WindowPlan,
    ids: list[int],
) -> tuple[float, int, int]:
    """Return seconds, peak and the cache's bytes of transformers' own way."""
    import torch
    from transformers import DynamicCache

    def prefill(count: int) -> Any:  # noqa: ANN401
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            asked = torch.tensor([ids[:count]], device=run.device)
            model(input_ids=asked, past_key_values=cache, use_cache=True, logits_to_keep=1)
            # One token more: a window drops what has left it.
            model(input_ids=asked[:, :1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    prefill(min(len(ids) - 1, 2 * CHUNK_TOKENS[run.device.type]))  # warms up
    held = []
    seconds, peak = run.timed_with_peak(lambda: held.append(prefill(len(ids) - 1)))
    return seconds, peak, measured_kv_bytes(held[0])


def _in_chunks(
    run: Run,
    model: Any,  # noqa: ANN401
    plan: WindowPlan,
    ids: list[int],
) -> tuple[float, int, int]:
    from rag.lm.native_cache import native_cache

    read(model, native_cache(model.config), ids[: 2 * CHUNK_TOKENS[run.device.type]])  # warms up
    cache = native_cache(model.config)
    seconds, peak = run.timed_with_peak(lambda: read(model, cache, ids))
    return seconds, peak, measured_kv_bytes(cache)


def _through_window(
    run: Run,
    model: Any,  # noqa: ANN401
    plan: WindowPlan,
    ids: list[int],
) -> tuple[float, int, int]:
    from rag.lm.windowed_attention import WindowedSession, check_windowed

    checked = check_windowed(model)
    # Every shape of mask that the run meets is compiled before it, until the window is full.
    warm = WindowedSession(checked, plan)
    warm.read(ids[: plan.kept_tokens(len(ids)) + 2 * warm.chunk_tokens])
    session = WindowedSession(checked, plan)
    seconds, peak = run.timed_with_peak(lambda: session.read(ids))
    return seconds, peak, session.kv_bytes


def bench_twins(
    run: Run,
    name: str,
    model: Any,  # noqa: ANN401
    plan: WindowPlan,
) -> list[TwinRow]:
    """Compare the logits of a prompt in one piece with those of our ways to read it."""
    import torch

    from rag.lm.agreement import tolerance
    from rag.lm.native_cache import native_cache
    from rag.lm.window_kernels import WindowPlan
    from rag.lm.windowed_attention import WindowedSession, check_windowed

    text = model.config.get_text_config(decoder=True)
    num_tokens = max(2 * plan.window, 3 * CHUNK_TOKENS[run.device.type] // 2)  # more than one chunk
    ids = some_ids(num_tokens, text.vocab_size)
    most = tolerance(model)
    rows: list[TwinRow] = []

    def add(twin: str, found: torch.Tensor, expected: torch.Tensor) -> None:
        apart = difference(found, expected)
        rows.append(TwinRow(f"{name}: {twin}", apart, most, apart < most))

    what = f"{name}: twins"
    if run.too_late(what):
        return rows
    with run.section(what), torch.inference_mode():
        whole = model(input_ids=torch.tensor([ids], device=run.device), logits_to_keep=1)
        cache = native_cache(model.config)
        for chunk in chunks(ids, run.device):
            output = model(
                input_ids=torch.tensor([chunk], device=run.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        add("a prompt in chunks, and in one piece", output.logits, whole.logits)
        if any(getattr(layer, "is_sliding", False) for layer in cache.layers):
            return rows
        # A window that holds all that was read must show what plain attention shows.
        session = WindowedSession(
            check_windowed(model), WindowPlan(num_sinks=plan.num_sinks, window=num_tokens)
        )
        add("a window that holds everything, and plain attention", session.read(ids), whole.logits)
    return rows


def prefill_lines(rows: Sequence[PrefillRow]) -> list[str]:
    """Return the figures for people."""
    if not rows:
        return []
    return [
        "",
        f"{'prefill':<16} {'way':<12} {'tokens':>8} {'s':>8} {'tokens/s':>9} {'of floor':>8}"
        f" {'cache MiB':>10} {'predicted':>10} {'peak MiB':>9}",
        *(
            f"{row.model:<16} {row.way:<12} {row.num_tokens:>8,} {row.seconds:>8.2f}"
            f" {row.tokens_per_second:>9,.0f} {row.floor_share:>8.0%}"
            f" {row.kv_bytes_actual / _MIB:>10,.1f} {row.kv_bytes_predicted / _MIB:>10,.1f}"
            f" {row.peak_bytes / _MIB:>9,.0f}"
            for row in rows
        ),
    ]


def twin_lines(rows: Sequence[TwinRow]) -> list[str]:
    """Return the figures for people."""
    if not rows:
        return []
    return [
        "",
        f"{'twins':<60} {'difference':>10}  tolerance",
        *(
            f"{row.name:<60} {row.difference:>10.2e}  {row.tolerance:.0e}"
            f"  {'agree' if row.agrees else 'DIFFER'}"
            for row in rows
        ),
    ]
