"""What a GPU does for Fathom, within ten minutes and without weights: random ones of real shapes.

Predicted against allocated bytes, prefill full against windowed, decode against the bandwidth
limit, every GPU path against its plain twin, FAISS on the card. The ceilings are measured in the
same run. What did not fit, in memory or in time, is named; nothing is left out in silence.
"""

from __future__ import annotations

import gc
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.bench.machine import (
    copy_bytes_per_second,
    device_name,
    library_versions,
    matmul_flops_per_second,
    timed,
)
from rag.errors import UnsupportedModelError
from rag.lm.known_models import known_models
from rag.lm.kv_bytes import kv_cache_bytes, measured_kv_bytes
from rag.lm.prefill_cost import PREFILL_CHUNK_TOKENS, prefill_work
from rag.lm.spec import ModelSpec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

_MIB = 2**20
_NUM_QUERIES = 256
_EMBEDDING_DIM = 384


@dataclass(frozen=True, slots=True)
class GpuShapes:
    """What is run; `SMALL` tries the bench itself, on any device."""

    models: tuple[tuple[str, dict[str, Any]], ...]
    prefill_tokens: tuple[int, ...]
    decode_context_tokens: int
    decode_tokens: int
    num_sinks: int
    window: int
    num_vectors: int
    ceiling_side: int  # of the square matrices whose product is the ceiling
    ceiling_bytes: int  # of the copy whose speed is the limit of decode


# The shapes of published models, one without windows and one with.
REAL = GpuShapes(
    models=tuple((name, known_models()[name].config) for name in ("llama-3.1-8b", "gemma-3-4b")),
    prefill_tokens=(8_192, 32_768, 131_072),
    decode_context_tokens=8_192,
    decode_tokens=64,
    num_sinks=64,
    window=4_096,
    num_vectors=1_000_000,
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
    num_sinks=4,
    window=64,
    num_vectors=2_000,
    ceiling_side=256,
    ceiling_bytes=4 * _MIB,
)


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """One prefill in chunks, after one that warmed the kernels up.

    `way` is `full`, through the model's own cache (which keeps a window where a layer has one),
    or `windowed`, through a fitted window with sinks. `peak_bytes` is the most that was allocated
    beside the weights. `flops_share` is the share of the measured matrix-product ceiling; None
    where the operations are not counted.
    """

    model: str
    way: str
    num_tokens: int
    seconds: float
    tokens_per_second: float
    flops_share: float | None
    kv_bytes_predicted: int
    kv_bytes_actual: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """Greedy decoding at one context; the limit reads all weights and the cache once a token."""

    model: str
    context_tokens: int
    tokens_per_second: float
    limit_tokens_per_second: float
    share: float


@dataclass(frozen=True, slots=True)
class TwinRow:
    """A path beside its plain twin: root mean square of the difference, relative."""

    name: str
    difference: float
    tolerance: float
    agrees: bool


@dataclass(frozen=True, slots=True)
class SearchRow:
    """One FAISS index, on the card and on the CPU, over the same queries, a batch of them at once.

    `overlap_at_10` is the share of the CPU's ten nearest that the card finds too.
    """

    kind: str
    num_vectors: int
    cpu_queries_per_second: float
    gpu_queries_per_second: float
    ratio: float
    overlap_at_10: float


@dataclass(slots=True)
class GpuBench:
    """What `fathom bench gpu` shows; filled section by section."""

    device: str
    versions: dict[str, str]
    dtype: str
    matmul_flops_per_second: float = 0.0
    copy_bytes_per_second: float = 0.0
    prefill: list[PrefillRow] = field(default_factory=list)
    decode: list[DecodeRow] = field(default_factory=list)
    twins: list[TwinRow] = field(default_factory=list)
    search: list[SearchRow] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the object that `fathom bench gpu` prints last."""
        return {"bench": "gpu", **asdict(self)}


def bench_gpu(
    shapes: GpuShapes,
    device: torch.device,
    *,
    deadline_seconds: float = 540.0,
    on_progress: Callable[[str], None] = lambda _: None,
) -> GpuBench:
    """Run every section, the cheap and telling ones first.

    Args:
        shapes: what is run.
        device: a CUDA device; a CPU does for `SMALL`, to try the bench.
        deadline_seconds: no measurement is begun later than this; what is left out is named.
        on_progress: called with what is run next.
    """
    import torch

    run = _Run(device, time.perf_counter() + deadline_seconds, on_progress)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bench = GpuBench(device_name(device), _versions(), str(dtype).removeprefix("torch."))
    begun = time.perf_counter()
    on_progress("the ceilings")
    bench.matmul_flops_per_second = matmul_flops_per_second(shapes.ceiling_side, dtype, device)
    bench.copy_bytes_per_second = copy_bytes_per_second(shapes.ceiling_bytes, device)

    for name, facts in shapes.models:
        with run.section(f"{name}: building", bench):
            model = _random_model(facts, dtype, device)
            spec = ModelSpec.from_config(model.config, dtype_bytes=dtype.itemsize)
            _bench_twins(bench, run, name, model, shapes)
            _bench_decode(bench, run, name, model, spec, shapes)
            for num_tokens in shapes.prefill_tokens:
                _bench_prefill(bench, run, name, model, spec, shapes, num_tokens)
        model = None  # its memory goes back before the next is built
        _collect(device)
    with run.section("FAISS", bench):
        _bench_search(bench, run, shapes)
    bench.seconds = time.perf_counter() - begun
    return bench


def card(bench: GpuBench) -> str:
    """Return the figures for people."""
    versions = ", ".join(f"{name} {version}" for name, version in bench.versions.items())
    lines = [
        f"{bench.device}, {bench.dtype}; {versions}; {bench.seconds:,.0f} s in all",
        f"ceilings in this run: {bench.matmul_flops_per_second / 1e12:,.1f} TFLOP/s,"
        f" {bench.copy_bytes_per_second / 1e9:,.0f} GB/s",
        "",
        f"{'prefill':<14} {'way':<9} {'tokens':>8} {'s':>8} {'tokens/s':>9} {'of ceiling':>10}"
        f" {'cache MiB':>10} {'predicted':>10} {'peak MiB':>9}",
    ]
    for row in bench.prefill:
        share = "-" if row.flops_share is None else f"{row.flops_share:.0%}"
        lines.append(
            f"{row.model:<14} {row.way:<9} {row.num_tokens:>8,} {row.seconds:>8.2f}"
            f" {row.tokens_per_second:>9,.0f} {share:>10} {row.kv_bytes_actual / _MIB:>10,.1f}"
            f" {row.kv_bytes_predicted / _MIB:>10,.1f} {row.peak_bytes / _MIB:>9,.0f}"
        )
    lines += ["", f"{'decode':<14} {'context':>8} {'tokens/s':>9} {'limit':>9} {'share':>6}"]
    lines += [
        f"{row.model:<14} {row.context_tokens:>8,} {row.tokens_per_second:>9,.1f}"
        f" {row.limit_tokens_per_second:>9,.1f} {row.share:>6.0%}"
        for row in bench.decode
    ]
    lines += ["", f"{'twins':<60} {'difference':>10}  tolerance"]
    lines += [
        f"{row.name:<60} {row.difference:>10.2e}  {row.tolerance:.0e}"
        f"  {'agree' if row.agrees else 'DIFFER'}"
        for row in bench.twins
    ]
    if bench.search:
        lines += [
            "",
            f"{'search':<14} {'vectors':>10} {'GPU q/s':>10} {'CPU q/s':>10} {'ratio':>7}",
        ]
        lines += [
            f"{row.kind:<14} {row.num_vectors:>10,} {row.gpu_queries_per_second:>10,.0f}"
            f" {row.cpu_queries_per_second:>10,.0f} {row.ratio:>7.1f}"
            f"  overlap@10 {row.overlap_at_10:.3f}"
            for row in bench.search
        ]
    lines += ["", *(f"left out: {reason}" for reason in bench.left_out)]
    return "\n".join(lines).rstrip()


@dataclass(slots=True)
class _Run:
    device: torch.device
    deadline: float
    on_progress: Callable[[str], None]

    @contextmanager
    def section(self, what: str, bench: GpuBench) -> Iterator[None]:
        """Name what runs; a lack of memory or a refusal ends this section alone, and is said."""
        import torch

        self.on_progress(what)
        try:
            yield
        except torch.cuda.OutOfMemoryError:
            bench.left_out.append(f"{what}: the card has too little memory")
        except (UnsupportedModelError, ImportError) as error:
            bench.left_out.append(f"{what}: {error}")
        finally:
            _collect(self.device)

    def too_late(self, what: str, bench: GpuBench) -> bool:
        """Return whether the deadline has passed; what it costs is said."""
        late = time.perf_counter() > self.deadline
        if late:
            bench.left_out.append(f"{what}: the time was up")
        return late

    def timed(self, work: Callable[[], Any]) -> float:
        """Return the seconds of `work`, all that it queued on the device included."""
        return timed(work, self.device)

    def timed_with_peak(self, work: Callable[[], Any]) -> tuple[float, int]:
        """Return `timed`, and the most bytes allocated meanwhile; 0 where they are not counted."""
        import torch

        if self.device.type != "cuda":
            return self.timed(work), 0
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        seconds = self.timed(work)
        return seconds, torch.cuda.max_memory_allocated(self.device) - before


def _bench_prefill(
    bench: GpuBench,
    run: _Run,
    name: str,
    model: Any,  # noqa: ANN401
    spec: ModelSpec,
    shapes: GpuShapes,
    num_tokens: int,
) -> None:
    ids = _ids(num_tokens, spec.vocab_size)
    what = f"{name}: full prefill of {num_tokens:,} tokens"
    if not run.too_late(what, bench):
        with run.section(what, bench):
            bench.prefill.append(_full_prefill(bench, run, name, model, spec, ids))
    if any(layer.window is not None for layer in spec.layers):
        return  # a model's own windows are part of `full`
    what = f"{name}: windowed prefill of {num_tokens:,} tokens"
    if not run.too_late(what, bench):
        with run.section(what, bench):
            bench.prefill.append(_windowed_prefill(run, name, model, spec, shapes, ids))


def _full_prefill(
    bench: GpuBench,
    run: _Run,
    name: str,
    model: Any,  # noqa: ANN401
    spec: ModelSpec,
    ids: list[int],
) -> PrefillRow:
    from rag.lm.native_cache import native_cache

    _read(model, native_cache(model.config), ids[: 2 * PREFILL_CHUNK_TOKENS])  # warms up
    cache = native_cache(model.config)
    seconds, peak = run.timed_with_peak(lambda: _read(model, cache, ids))
    flops = prefill_work(spec, len(ids)).flops
    return PrefillRow(
        model=name,
        way="full",
        num_tokens=len(ids),
        seconds=seconds,
        tokens_per_second=len(ids) / seconds,
        flops_share=flops / seconds / bench.matmul_flops_per_second,
        kv_bytes_predicted=kv_cache_bytes(spec, len(ids)),
        kv_bytes_actual=measured_kv_bytes(cache),
        peak_bytes=peak,
    )


def _windowed_prefill(
    run: _Run,
    name: str,
    model: Any,  # noqa: ANN401
    spec: ModelSpec,
    shapes: GpuShapes,
    ids: list[int],
) -> PrefillRow:
    from rag.lm.windowed_attention import WindowedSession, WindowPlan, check_windowed

    checked = check_windowed(model)
    plan = WindowPlan(num_sinks=shapes.num_sinks, window=shapes.window)
    # Every shape of mask that the run meets is compiled before it, until the window is full.
    WindowedSession(checked, plan).read(ids[: plan.kept_tokens(len(ids)) + PREFILL_CHUNK_TOKENS])
    session = WindowedSession(checked, plan)
    seconds, peak = run.timed_with_peak(lambda: session.read(ids))
    return PrefillRow(
        model=name,
        way="windowed",
        num_tokens=len(ids),
        seconds=seconds,
        tokens_per_second=len(ids) / seconds,
        flops_share=None,
        kv_bytes_predicted=kv_cache_bytes(spec, plan.kept_tokens(len(ids))),
        kv_bytes_actual=session.kv_bytes,
        peak_bytes=peak,
    )


def _bench_decode(
    bench: GpuBench,
    run: _Run,
    name: str,
    model: Any,  # noqa: ANN401
    spec: ModelSpec,
    shapes: GpuShapes,
) -> None:
    from rag.lm.native_cache import native_cache

    context = shapes.decode_context_tokens
    what = f"{name}: decode at {context:,} tokens"
    if run.too_late(what, bench):
        return
    with run.section(what, bench):
        cache = native_cache(model.config)
        _read(model, cache, _ids(context, spec.vocab_size))
        _read(model, cache, [1])

        def decode() -> None:
            next_id = 1
            for _ in range(shapes.decode_tokens):
                next_id = _read(model, cache, [next_id])

        rate = shapes.decode_tokens / run.timed(decode)
        held = sum(p.numel() * p.element_size() for p in model.parameters())
        table = model.get_input_embeddings().weight
        if table is not model.get_output_embeddings().weight:  # a lookup reads one row of it
            held -= table.numel() * table.element_size()
        limit = bench.copy_bytes_per_second / (held + kv_cache_bytes(spec, context))
        bench.decode.append(DecodeRow(name, context, rate, limit, rate / limit))


def _bench_twins(
    bench: GpuBench,
    run: _Run,
    name: str,
    model: Any,  # noqa: ANN401
    shapes: GpuShapes,
) -> None:
    import torch

    from rag.lm.native_cache import native_cache
    from rag.lm.windowed_attention import WindowedSession, WindowPlan, check_windowed

    text = model.config.get_text_config(decoder=True)
    num_tokens = max(2 * shapes.window, 3 * PREFILL_CHUNK_TOKENS // 2)  # more than one chunk
    ids = _ids(num_tokens, text.vocab_size)
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    what = f"{name}: twins"
    if run.too_late(what, bench):
        return
    with run.section(what, bench), torch.inference_mode():
        whole = model(input_ids=torch.tensor([ids], device=run.device), logits_to_keep=1)
        cache = native_cache(model.config)
        for chunk in _chunks(ids):
            output = model(
                input_ids=torch.tensor([chunk], device=run.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        difference = _difference(output.logits, whole.logits)
        twin = "a prompt in chunks, and in one piece"
        bench.twins.append(
            TwinRow(f"{name}: {twin}", difference, tolerance, difference < tolerance)
        )
        if any(getattr(layer, "is_sliding", False) for layer in cache.layers):
            return
        # A window that holds all that was read must show what plain attention shows.
        session = WindowedSession(
            check_windowed(model), WindowPlan(num_sinks=shapes.num_sinks, window=num_tokens)
        )
        difference = _difference(session.read(ids), whole.logits)
        twin = "a window that holds everything, and plain attention"
        bench.twins.append(
            TwinRow(f"{name}: {twin}", difference, tolerance, difference < tolerance)
        )


def _bench_search(bench: GpuBench, run: _Run, shapes: GpuShapes) -> None:
    import faiss

    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        bench.left_out.append("FAISS on the card: this build of FAISS has no GPU part")
        return
    from rag.retrieval.vector_index import IndexPlan

    generator = np.random.default_rng(7)
    centres = generator.standard_normal((1_000, _EMBEDDING_DIM), dtype=np.float32)

    def vectors(count: int) -> Any:  # noqa: ANN401
        noise = generator.standard_normal((count, _EMBEDDING_DIM), dtype=np.float32)
        found = centres[generator.integers(0, len(centres), count)] + noise
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    stored, queries = vectors(shapes.num_vectors), vectors(_NUM_QUERIES)
    for kind in ("Flat", "SQfp16", IndexPlan().kind(shapes.num_vectors)):
        what = f"FAISS {kind}"
        if run.too_late(what, bench):
            continue
        run.on_progress(what)
        index = faiss.index_factory(_EMBEDDING_DIM, kind, faiss.METRIC_INNER_PRODUCT)
        sample = stored[: max(50_000, 40 * math.isqrt(shapes.num_vectors))]
        index.train(sample)
        index.add(stored)
        on_card = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
        on_card.search(queries, 10)
        gpu_seconds = run.timed(lambda index=on_card: index.search(queries, 10))  # type: ignore[misc]
        cpu_seconds = run.timed(lambda index=index: index.search(queries, 10))  # type: ignore[misc]
        found, expected = on_card.search(queries, 10)[1], index.search(queries, 10)[1]
        overlap = np.mean([len({*a} & {*b}) / 10 for a, b in zip(found, expected, strict=True)])
        bench.search.append(
            SearchRow(
                kind=kind,
                num_vectors=shapes.num_vectors,
                cpu_queries_per_second=_NUM_QUERIES / cpu_seconds,
                gpu_queries_per_second=_NUM_QUERIES / gpu_seconds,
                ratio=cpu_seconds / gpu_seconds,
                overlap_at_10=float(overlap),
            )
        )


def _read(model: Any, cache: Any, ids: Sequence[int]) -> int:  # noqa: ANN401
    """Prefill in chunks as the local engine does; return the likeliest next token."""
    import torch

    with torch.inference_mode():
        for chunk in _chunks(ids):
            output = model(
                input_ids=torch.tensor([chunk], device=model.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return int(output.logits[0, -1].argmax())


def _chunks(ids: Sequence[int]) -> Iterator[list[int]]:
    for start in range(0, len(ids), PREFILL_CHUNK_TOKENS):
        yield list(ids[start : start + PREFILL_CHUNK_TOKENS])


def _ids(num_tokens: int, vocab_size: int) -> list[int]:
    return [7919 * index % vocab_size for index in range(num_tokens)]


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


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.float().flatten(), expected.float().flatten()
    return float((found - expected).norm() / expected.norm())


def _collect(device: torch.device) -> None:
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _versions() -> dict[str, str]:
    import faiss
    import torch

    return library_versions() | {
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "none",
        "faiss": faiss.__version__,
    }
