"""Prefill through a window beside full prefill: tokens a second and peak bytes, in one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from eval.bench.machine import CLOCKS, Clock
from rag.lm.spec import CHUNK_TOKENS
from rag.settings import Settings

if TYPE_CHECKING:
    from rag.lm.window_kernels import WindowPlan
    from rag.lm.windowed_attention import WindowedModel


@dataclass(frozen=True, slots=True)
class Prefill:
    """One prefill: medians of its rounds.

    `peak_bytes` is the most that was allocated at once beside the weights, and `kv_bytes` what the
    cache held in the end.
    """

    seconds: float
    tokens_per_second: float
    peak_bytes: int
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class WindowedRow:
    """The same tokens, read fully and through the window.

    `speed_ratio` is the median over the rounds of full to windowed seconds, `peak_ratio` full to
    windowed peak bytes: above 1 the window wins.
    """

    num_tokens: int
    full: Prefill
    windowed: Prefill
    speed_ratio: float
    peak_ratio: float


@dataclass(frozen=True, slots=True)
class WindowedBench:
    """What `fathom bench windowed` shows, a row a length; `full` says whose full prefill it is."""

    num_sinks: int
    window: int
    full: str
    clock: str
    device: str
    dtype: str
    rows: tuple[WindowedRow, ...]

    @property
    def peak_growth(self) -> float | None:
        """Windowed peak bytes at the longest length to those at the shortest beyond the window.

        1 is flat: what is read beyond a full window takes no memory. None with fewer than two such
        lengths.
        """
        held = self.num_sinks + self.window
        beyond = sorted((r.num_tokens, r.windowed.peak_bytes) for r in self.rows)
        peaks = [peak for num_tokens, peak in beyond if num_tokens > held]
        return peaks[-1] / peaks[0] if len(peaks) > 1 else None

    def to_json(self) -> dict[str, Any]:
        """Return the object that `fathom bench windowed` prints last."""
        return {"bench": "windowed", **asdict(self), "peak_growth": self.peak_growth}


def bench_windowed(
    checked: WindowedModel,
    plan: WindowPlan,
    lengths: Sequence[int],
    *,
    rounds: int = 1,
    clock: str = "wall",
    peer: Any = None,  # noqa: ANN401
    on_progress: Callable[[int], None] | None = None,
) -> WindowedBench:
    """Prefill each length fully, then through the window; both in chunks, logits of the last only.

    Args:
        checked: a model that `check_windowed` accepted.
        plan: sinks and window.
        lengths: in tokens, each 1 or more.
        rounds: how often both run, in turn.
        clock: `wall`, or `cpu` where others have the machine for most of the time.
        peer: the same weights as transformers alone runs them; given, the full prefill is its own,
            in one piece.
        on_progress: called with each length before it is run.
    """
    model = checked.model
    read_clock = CLOCKS[clock]
    chunk_tokens = CHUNK_TOKENS[model.device.type] if peer is None else None
    full_model = model if peer is None else peer
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    # Warm both paths up: threads, kernels, the allocator.
    _full(full_model, list(range(64)), chunk_tokens, read_clock)
    _windowed(checked, plan, list(range(64)), read_clock)
    rows = []
    for num_tokens in lengths:
        if on_progress:
            on_progress(num_tokens)
        ids = [7919 * index % vocab_size for index in range(num_tokens)]
        runs = [
            (
                _full(full_model, ids, chunk_tokens, read_clock),
                _windowed(checked, plan, ids, read_clock),
            )
            for _ in range(rounds)
        ]
        full, windowed = (_medians([run[side] for run in runs], num_tokens) for side in (0, 1))
        rows.append(
            WindowedRow(
                num_tokens=num_tokens,
                full=full,
                windowed=windowed,
                speed_ratio=median(a.seconds / b.seconds for a, b in runs),
                peak_ratio=full.peak_bytes / windowed.peak_bytes,
            )
        )
    return WindowedBench(
        num_sinks=plan.num_sinks,
        window=plan.window,
        full="fathom" if peer is None else "transformers",
        clock=clock,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        rows=tuple(rows),
    )


def load_checked_model(name: str, settings: Settings) -> WindowedModel:
    """Return a fetched model on the device of the settings, as `check_windowed` accepts it.

    Raises:
        UnknownModelError: if nothing is called so.
        ModelFetchError: if it has not been fetched.
        UnsupportedModelError: if a window cannot be fitted to it.
    """
    from rag.lm.loading import open_model
    from rag.lm.windowed_attention import check_windowed

    return check_windowed(open_model(name, settings).load_hastened())


def peak_allocated_bytes(work: Callable[[], Any], device: str) -> int:
    """Run `work`; return the most bytes that torch had allocated at once beside what was there.

    On a CPU every allocation is counted, scratch space of kernels included, by torch's profiler;
    what the work frees of older memory counts as negative.
    """
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)

    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


def card(bench: WindowedBench) -> str:
    """Return the figures for people."""
    mib = 2**20
    lines = [
        f"{bench.num_sinks} sinks, window {bench.window:,}, {bench.dtype} on {bench.device};"
        f" {bench.clock} seconds; full ({bench.full}) / windowed, and their ratio",
        f"{'tokens':>8}  {'tokens/s':>19}  {'ratio':>5}  {'peak MiB':>19}  {'ratio':>5}"
        f"  {'cache MiB':>19}",
    ]
    for row in bench.rows:
        full, windowed = row.full, row.windowed
        lines.append(
            f"{row.num_tokens:8,}"
            f"  {full.tokens_per_second:8,.0f} / {windowed.tokens_per_second:8,.0f}"
            f"  {row.speed_ratio:5.2f}"
            f"  {full.peak_bytes / mib:8,.1f} / {windowed.peak_bytes / mib:8,.1f}"
            f"  {row.peak_ratio:5.2f}"
            f"  {full.kv_bytes / mib:8,.1f} / {windowed.kv_bytes / mib:8,.1f}"
        )
    if bench.peak_growth is not None:
        beyond = [r.num_tokens for r in bench.rows if r.num_tokens > bench.num_sinks + bench.window]
        lines.append(
            f"windowed peak at {max(beyond):,} tokens to that at {min(beyond):,}:"
            f" {bench.peak_growth:.2f}"
        )
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class _Run:
    seconds: float
    peak_bytes: int
    kv_bytes: int


def _full(model: Any, ids: list[int], chunk_tokens: int | None, clock: Clock) -> _Run:  # noqa: ANN401
    """Prefill in chunks, as the local engine does, or in one piece and transformers' own cache."""
    import torch
    from transformers import DynamicCache

    from rag.lm.kv_bytes import measured_kv_bytes
    from rag.lm.native_cache import native_cache

    cache = native_cache(model.config) if chunk_tokens else DynamicCache(config=model.config)
    step = chunk_tokens or len(ids)

    def work() -> None:
        with torch.inference_mode():
            for start in range(0, len(ids), step):
                chunk = torch.tensor([ids[start : start + step]], device=model.device)
                output = model(
                    input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
        int(output.logits[0, -1].argmax())  # waits for the GPU

    seconds, peak = _measure(work, str(model.device), clock)
    return _Run(seconds, peak, measured_kv_bytes(cache))


def _windowed(checked: WindowedModel, plan: WindowPlan, ids: list[int], clock: Clock) -> _Run:
    from rag.lm.windowed_attention import WindowedSession

    session = WindowedSession(checked, plan)
    device = str(checked.model.device)
    seconds, peak = _measure(lambda: int(session.read(ids).argmax()), device, clock)
    return _Run(seconds, peak, session.kv_bytes)


def _measure(work: Callable[[], Any], device: str, clock: Clock) -> tuple[float, int]:
    seconds = 0.0

    def timed() -> None:
        nonlocal seconds
        begun = clock()
        work()
        seconds = clock() - begun

    peak = peak_allocated_bytes(timed, device)
    return seconds, peak


def _medians(runs: Sequence[_Run], num_tokens: int) -> Prefill:
    seconds = median(run.seconds for run in runs)
    return Prefill(
        seconds=seconds,
        tokens_per_second=num_tokens / seconds,
        peak_bytes=max(run.peak_bytes for run in runs),
        kv_bytes=runs[-1].kv_bytes,
    )
