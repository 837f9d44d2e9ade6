"""What a GPU does for Fathom, within ten minutes and without weights: random ones of real shapes.

Predicted against allocated bytes, prefill full against windowed, decode against the bandwidth
limit, every GPU path against its plain twin, exact search, embedding. The ceilings are measured in
the same run. What did not fit, in memory or in time, or failed, is named; nothing is left out in
silence.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from eval.bench import gpu_attention, gpu_decode, gpu_embed, gpu_prefill, gpu_rows, gpu_search
from eval.bench.gpu_attention import AttentionRow, AttentionShapes, OneQueryRow
from eval.bench.gpu_decode import STATIC_WAYS, DecodeRow
from eval.bench.gpu_embed import EmbedRow, EmbedShapes
from eval.bench.gpu_prefill import PrefillRow, TwinRow
from eval.bench.gpu_rows import RowsRow
from eval.bench.gpu_run import Run, collect
from eval.bench.gpu_search import ExactRow, SearchRow
from eval.bench.machine import (
    copy_bytes_per_second,
    device_name,
    library_versions,
    matmul_flops_per_second,
)
from rag.lm.known_models import known_models
from rag.lm.spec import ModelSpec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

_MIB = 2**20
SECTIONS = ("attention", "search", "embedding", "rows", "models")


@dataclass(frozen=True, slots=True)
class GpuShapes:
    """What is run; `SMALL` tries the bench itself, on any device."""

    models: tuple[tuple[str, dict[str, Any]], ...]
    prefill_tokens: tuple[int, ...]
    decode_context_tokens: int
    decode_tokens: int
    decode_rows: int
    compiler: str  # torch's backend
    num_sinks: int
    window: int
    attention: AttentionShapes
    embed: EmbedShapes
    num_vectors: int
    num_exact_vectors: int
    query_batches: tuple[int, ...]
    ceiling_side: int  # of the square matrices whose product is the ceiling
    ceiling_bytes: int  # of the copy whose speed is the limit of decode


# The shapes of published models, one without windows and one with.
REAL = GpuShapes(
    models=tuple((name, known_models()[name].config) for name in ("llama-3.1-8b", "gemma-3-4b")),
    prefill_tokens=(8_192, 32_768, 131_072),
    decode_context_tokens=8_192,
    decode_tokens=64,
    decode_rows=32,
    compiler="inductor",
    num_sinks=64,
    window=4_096,
    attention=AttentionShapes(32, 8, 128, 32_768, 4, (1_024, 4_096), (8_192, 32_768, 131_072)),
    embed=EmbedShapes(384, 6, 12, 1_536, 24_000, 16_384, 200, 64),
    num_vectors=1_000_000,
    num_exact_vectors=10_000_000,
    query_batches=(1, 1_024),
    ceiling_side=8_192,
    ceiling_bytes=4 * 2**30,
)

SMALL = GpuShapes(
    models=tuple(
        (
            f"tiny-{model_type}",
            {
                "model_type": model_type,
                "vocab_size": 256,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "initializer_range": 0.2,  # or attention would drown in the residual stream
                "max_position_embeddings": 2048,
            }
            | more,
        )
        for model_type, more in (("llama", {}), ("gemma3_text", {"sliding_window": 64}))
    ),
    prefill_tokens=(128, 640),
    decode_context_tokens=128,
    decode_tokens=8,
    decode_rows=4,
    compiler="eager",
    num_sinks=4,
    window=64,
    attention=AttentionShapes(4, 2, 8, 256, 4, (16, 64), (128, 256)),
    embed=EmbedShapes(32, 2, 4, 64, 300, 40, 30, 4),
    num_vectors=2_000,
    num_exact_vectors=3_000,
    query_batches=(1, 8),
    ceiling_side=256,
    ceiling_bytes=4 * _MIB,
)


@dataclass(frozen=True, slots=True)
class GoalRow:
    """A ratio that was aimed at, and what it came to; at least `wanted`, or at most."""

    goal: str
    what: str
    found: float
    wanted: float
    at_most: bool = False

    @property
    def is_reached(self) -> bool:
        """Whether it was."""
        return self.found <= self.wanted if self.at_most else self.found >= self.wanted


@dataclass(slots=True)
class GpuBench:
    """What `fathom bench gpu` shows; filled section by section."""

    device: str
    versions: dict[str, str]
    dtype: str
    matmul_flops_per_second: float = 0.0
    copy_bytes_per_second: float = 0.0
    attention: list[AttentionRow] = field(default_factory=list)
    one_query: list[OneQueryRow] = field(default_factory=list)
    prefill: list[PrefillRow] = field(default_factory=list)
    decode: list[DecodeRow] = field(default_factory=list)
    rows: list[RowsRow] = field(default_factory=list)
    twins: list[TwinRow] = field(default_factory=list)
    search: list[SearchRow] = field(default_factory=list)
    exact: list[ExactRow] = field(default_factory=list)
    embed: list[EmbedRow] = field(default_factory=list)
    goals: list[GoalRow] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the object that `fathom bench gpu` prints last."""
        return {"bench": "gpu", **asdict(self)}


def bench_gpu(
    shapes: GpuShapes,
    device: torch.device,
    *,
    sections: Collection[str] = SECTIONS,
    deadline_seconds: float = 540.0,
    on_progress: Callable[[str], None] = lambda _: None,
) -> GpuBench:
    """Run the sections, the cheap and telling ones first; compiling a model comes last.

    Args:
        shapes: what is run.
        device: a CUDA device; a CPU does for `SMALL`, to try the bench.
        sections: of `SECTIONS`.
        deadline_seconds: no measurement is begun later than this; what is left out is named.
        on_progress: called with what is run next.
    """
    import torch

    from rag.lm.chunked_attention import use_chunked_attention

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    begun = time.perf_counter()
    run = Run(device, dtype, begun + deadline_seconds, on_progress)
    bench = GpuBench(device_name(device), _versions(), str(dtype).removeprefix("torch."))
    bench.left_out = run.left_out
    on_progress("the ceilings")
    run.matmul_flops_per_second = matmul_flops_per_second(shapes.ceiling_side, dtype, device)
    run.copy_bytes_per_second = copy_bytes_per_second(shapes.ceiling_bytes, device)
    bench.matmul_flops_per_second = run.matmul_flops_per_second
    bench.copy_bytes_per_second = run.copy_bytes_per_second

    if "attention" in sections:
        bench.attention = gpu_attention.bench_attention(run, shapes.attention)
        bench.one_query = gpu_attention.bench_one_query(run, shapes.attention)
    if "search" in sections:
        bench.exact = gpu_search.bench_exact(run, shapes.num_exact_vectors, shapes.query_batches)
    if "embedding" in sections:
        bench.embed = gpu_embed.bench_embed(run, shapes.embed)
    for name, facts in shapes.models if {"rows", "models"} & set(sections) else ():
        with run.section(f"{name}: building"):
            model = _random_model(facts, dtype, device)
            spec = ModelSpec.from_config(model.config, dtype_bytes=dtype.itemsize)
            spec = spec.on_device(device.type)
            use_chunked_attention(model)  # what transformers does of its own stays the same
            if "rows" in sections:
                bench.rows += gpu_rows.bench_rows(
                    run,
                    name,
                    model,
                    spec,
                    num_rows=shapes.decode_rows,
                    context_tokens=shapes.decode_context_tokens,
                    num_tokens=shapes.decode_tokens,
                )
            if "models" in sections:
                _bench_model(run, bench, shapes, name, model, spec)
        model = None  # its memory goes back before the next is built
        collect(device)
    if "search" in sections:  # last: its clusters are found on the CPU, which takes minutes
        with run.section("FAISS"):
            bench.search = gpu_search.bench_faiss(run, shapes.num_vectors)
    bench.goals = goals(bench)
    bench.seconds = time.perf_counter() - begun
    return bench


def _bench_model(
    run: Run,
    bench: GpuBench,
    shapes: GpuShapes,
    name: str,
    model: Any,  # noqa: ANN401
    spec: ModelSpec,
) -> None:
    """Prefill and decode one sequence in every way."""
    from rag.lm.window_kernels import WindowPlan

    plan = WindowPlan(num_sinks=shapes.num_sinks, window=shapes.window)
    bench.twins += gpu_prefill.bench_twins(run, name, model, plan)
    for num_tokens in shapes.prefill_tokens:
        bench.prefill += gpu_prefill.bench_prefill(run, name, model, spec, plan, num_tokens)
    bench.decode += gpu_decode.bench_decode(
        run,
        name,
        model,
        spec,
        context_tokens=shapes.decode_context_tokens,
        num_tokens=shapes.decode_tokens,
        compiler=shapes.compiler,
    )


def goals(bench: GpuBench) -> list[GoalRow]:
    """Return what the rows of a run say of the ratios that were aimed at, as far as they were run.

    They are those of a run of `REAL`; a smaller one shows how they are reckoned.
    """
    found: list[GoalRow] = []
    windowed = [row for row in bench.attention if row.way == "window"]
    for row in windowed:
        wanted = 80 if row.window == min(r.window or 0 for r in windowed) else 25
        what = f"a window of {row.window:,} against a dense mask, {row.num_tokens:,} tokens"
        found.append(GoalRow("G1", what, row.ratio or 0.0, wanted))
        what = f"a window of {row.window:,}, useful products to the ceiling"
        found.append(GoalRow("G2", what, row.useful_share, 0.55))
    longest = max((row.num_tokens for row in bench.prefill), default=0)
    ways = {
        row.way: row
        for row in bench.prefill
        if row.num_tokens == longest and _is_plain(bench, row.model)
    }
    if (ours := ways.get("windowed")) is not None:
        if (theirs := ways.get("transformers")) is not None:
            what = f"{longest:,} tokens through a window against transformers"
            found.append(GoalRow("G3", what, theirs.seconds / ours.seconds, 3.5))
        what = f"{longest:,} tokens through a window, floor to seconds"
        found.append(GoalRow("G3", what, ours.floor_share, 0.65))
    for model in dict.fromkeys(row.model for row in bench.decode):
        static = [row for row in bench.decode if row.model == model and row.way in STATIC_WAYS]
        if static:
            best = max(static, key=lambda row: row.share)
            what = f"{model} decoding at {best.context_tokens:,}, {best.way}"
            found.append(GoalRow("G4", f"{what}: share of the byte limit", best.share, 0.80))
            found.append(GoalRow("G4", f"{what}: against transformers", best.ratio, 5.0))
    for embedded in bench.embed:
        if embedded.way == "ours":
            rate = embedded.million_tokens_per_second
            found.append(GoalRow("G6", "embedding, million tokens a second", rate, 5.0))
            what = "embedding against sentence-transformers in bfloat16"
            found.append(GoalRow("G6", what, embedded.ratio, 8.0))
    for exact in bench.exact:
        what = f"{exact.num_vectors:,} vectors by {exact.way}"
        if exact.num_queries == 1:
            milliseconds = exact.seconds * 1e3
            found.append(GoalRow("G7", f"{what}: ms of one query", milliseconds, 2.2, at_most=True))
        else:
            rate = exact.queries_per_second
            found.append(
                GoalRow("G7", f"{what}: queries/s, {exact.num_queries:,} at once", rate, 60_000)
            )
    return found


def _is_plain(bench: GpuBench, model: str) -> bool:
    """Say whether a window was fitted to a model: it has none of its own then."""
    return any(row.model == model and row.way == "windowed" for row in bench.prefill)


def card(bench: GpuBench) -> str:
    """Return the figures for people."""
    versions = ", ".join(f"{name} {version}" for name, version in bench.versions.items())
    lines = [
        f"{bench.device}, {bench.dtype}; {versions}; {bench.seconds:,.0f} s in all",
        f"ceilings in this run: {bench.matmul_flops_per_second / 1e12:,.1f} TFLOP/s,"
        f" {bench.copy_bytes_per_second / 1e9:,.0f} GB/s",
        *gpu_attention.lines(bench.attention, bench.one_query),
        *gpu_prefill.prefill_lines(bench.prefill),
        *gpu_decode.lines(bench.decode),
        *gpu_rows.lines(bench.rows),
        *gpu_prefill.twin_lines(bench.twins),
        *gpu_search.lines(bench.search, bench.exact),
        *gpu_embed.lines(bench.embed),
    ]
    if bench.goals:
        lines += ["", f"{'goal':<4} {'what':<72} {'found':>10}  {'wanted':>12}"]
        lines += [
            f"{row.goal:<4} {row.what:<72} {row.found:>10,.2f}"
            f"  {'<=' if row.at_most else '>='} {row.wanted:>9,g}"
            f"  {'reached' if row.is_reached else 'missed'}"
            for row in bench.goals
        ]
    lines += ["", *(f"left out: {reason}" for reason in bench.left_out)]
    return "\n".join(lines).rstrip()


def _random_model(facts: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Any:  # noqa: ANN401
    """Return a model of these shapes, its random weights made on the device."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config: PreTrainedConfig = CONFIG_MAPPING[facts["model_type"]](
        **{name: deepcopy(value) for name, value in facts.items() if name != "model_type"}
    )
    torch.manual_seed(7)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=dtype
        )
    return model.eval()


def _versions() -> dict[str, str]:
    import faiss
    import torch

    return library_versions() | {
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "none",
        "faiss": faiss.__version__,
    }
