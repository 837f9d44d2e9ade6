"""How fast a model prefills here: measured once, remembered, and mended where answers differ."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, Any

from rag.lm.device import free_device_bytes
from rag.lm.kv_bytes import kv_cache_bytes, measured_kv_bytes
from rag.lm.prefill_cost import (
    PrefillRate,
    chunk_work,
    fit_rate,
    prefill_seconds,
)
from rag.lm.spec import ModelSpec
from rag.store.calibrations import CalibrationStore

if TYPE_CHECKING:
    from transformers import Cache

# Chunks of two sizes, a prompt's and a question's, are timed with nothing in the cache and with
# this many tokens in it.
_CACHED_TOKENS = 2048
_SMALL_CHUNK_TOKENS = 32
# Each of the four is timed this often, but no new round is begun after so many seconds.
_ROUNDS = 5
_PATIENCE_SECONDS = 2.0
# A rate that a prefill misses by more than this share is mended; one of fewer new tokens is not
# judged by, for it is over in a moment.
_DRIFT = 0.25
_LEAST_JUDGED_TOKENS = 256
# Caches of the calibration stand in memory beside their copies for a moment.
_COPIES = 3

Clock = Callable[[], float]


class PrefillClock:
    """The prefill rate of one model on this machine's device."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        model_name: str,
        device_type: str,
        calibrations: CalibrationStore | None = None,
    ) -> None:
        """Measure nothing yet.

        Args:
            spec: of the model.
            model_name: what tells it from others.
            device_type: cpu or cuda.
            calibrations: where the rate is remembered; by default each process measures.
        """
        self._spec = spec
        self._model_name = model_name
        self._device_type = device_type
        self._calibrations = calibrations
        self._rate: PrefillRate | None = None

    @property
    def is_set(self) -> bool:
        """Whether the rate is known, in this process or from an earlier one."""
        if self._rate is None and self._calibrations:
            found = self._calibrations.load(self.key)
            self._rate = PrefillRate(**found) if found else None
        return self._rate is not None

    def measure(self, model: Any) -> None:  # noqa: ANN401 - a causal model of transformers
        """Time a few chunks; see `measure_rate`."""
        self._remember(measure_rate(model, self._spec))

    def seconds(self, num_tokens: int, *, cached_tokens: int = 0) -> float:
        """Return the predicted seconds of a prefill; the first `cached_tokens` are there already.

        Raises:
            RuntimeError: if the rate is not known yet; see `is_set`.
        """
        if self._rate is None:
            raise RuntimeError("the prefill rate has not been measured")
        return prefill_seconds(self._spec, self._rate, num_tokens, cached_tokens=cached_tokens)

    def observe(self, num_tokens: int, seconds: float, *, cached_tokens: int = 0) -> None:
        """Mend a rate that a real prefill shows to be off: the machine is not what it was.

        All of it is scaled by what that prefill showed: what slows a machine down, other work or
        heat, slows everything, and to measure again would keep a question waiting.
        """
        if self._rate is None or num_tokens - cached_tokens < _LEAST_JUDGED_TOKENS:
            return
        predicted = self.seconds(num_tokens, cached_tokens=cached_tokens)
        if abs(seconds - predicted) > _DRIFT * predicted:
            self._remember(self._rate.scaled(seconds / predicted))

    @property
    def key(self) -> str:
        """What the rate depends on: model, element size, kernels, chunk, libraries and device."""
        import torch
        import transformers

        if self._device_type == "cuda":
            device = torch.cuda.get_device_name()
        else:
            device = f"{platform.node()} {torch.backends.cpu.get_cpu_capability()}"
            device += f" {torch.get_num_threads()} threads"
        masks = sum(not layer.maskless for layer in self._spec.layers)
        return (
            f"prefill rates: {self._model_name}, {self._spec.num_parameters} parameters of"
            f" {self._spec.dtype_bytes} bytes, weights in blocks, chunks of"
            f" {self._spec.chunk_tokens}, under a mask in {masks} layers,"
            f" torch {torch.__version__}, transformers {transformers.__version__}, {device}"
        )

    def _remember(self, rate: PrefillRate) -> None:
        self._rate = rate
        if self._calibrations:
            self._calibrations.save(self.key, rate.to_json())


def measure_rate(
    model: Any,  # noqa: ANN401 - a causal model of transformers
    spec: ModelSpec,
    *,
    clock: Clock = time.perf_counter,
) -> PrefillRate:
    """Return the prefill rate of a loaded model: four kinds of chunk are timed, each a few times.

    Nothing is prefilled up to the longer cache: the tokens of one chunk are repeated until it is
    full, so a point takes one chunk's time whatever the length. Each kind counts with its median.

    Args:
        model: ready to run.
        spec: of the model.
        clock: returns seconds; another than wall-clock time tells what a shared machine took.
    """
    longest = spec.max_positions or 2 * spec.chunk_tokens + _CACHED_TOKENS
    chunk = max(1, min(spec.chunk_tokens, longest // 2))
    small = min(_SMALL_CHUNK_TOKENS, chunk // 2 or 1)
    _, read = time_chunk(model, spec, chunk, clock=clock)  # warms up, too
    cached_tokens = min(_CACHED_TOKENS, longest - chunk)
    cached = synthetic_cache(read, spec, cached_tokens, device_type=model.device.type)
    if cached is None:
        cached_tokens, cached = chunk, read

    # The smaller ones last: the first pass of a size takes longer than the next.
    kinds = [(chunk, cached_tokens), (chunk, 0), (small, cached_tokens), (small, 0)]
    taken: dict[tuple[int, int], list[float]] = {kind: [] for kind in kinds}
    begun = time.perf_counter()
    for number in range(_ROUNDS):
        if number and time.perf_counter() - begun > _PATIENCE_SECONDS:
            break
        for kind in kinds:
            num_tokens, held = kind
            cache = cached if held else None
            taken[kind].append(time_chunk(model, spec, num_tokens, cache, clock=clock)[0])
    return fit_rate([(chunk_work(spec, *kind), median(seconds)) for kind, seconds in taken.items()])


def time_chunk(
    model: Any,  # noqa: ANN401 - a causal model of transformers
    spec: ModelSpec,
    num_tokens: int,
    cache: Cache | None = None,
    *,
    clock: Clock = time.perf_counter,
) -> tuple[float, Cache]:
    """Put a chunk of tokens behind those of a cache; return the seconds and the new cache.

    Args:
        model: ready to run.
        spec: of the model.
        num_tokens: of the chunk; which ones does not matter.
        cache: stays as it is; None stands for an empty one.
        clock: returns seconds.
    """
    from rag.lm.forward import forward
    from rag.lm.native_cache import branch, native_cache

    ids = [7919 * index % spec.vocab_size for index in range(num_tokens)]
    used = native_cache(model.config) if cache is None else branch(cache, 1)
    begun = clock()
    int(forward(model, [ids], used)[0, -1].argmax())  # waits for the GPU
    return clock() - begun, used


def synthetic_cache(
    read: Cache, spec: ModelSpec, num_tokens: int, *, device_type: str
) -> Cache | None:
    """Return a cache like one of `num_tokens` tokens, without prefilling them.

    Its tokens are those of a shorter one, over and over: good for timing, not for answers.

    Args:
        read: a cache that holds a few real tokens; stays as it is.
        spec: of the model.
        num_tokens: no fewer than `read` holds.
        device_type: cpu or cuda, where `read` lies.

    Returns:
        None where a layer is of a kind that this does not fill: its bytes then differ from the
        exact ones of `kv_cache_bytes`; or where the memory is short.
    """
    import torch

    from rag.lm.native_cache import branch

    num_bytes = kv_cache_bytes(spec, num_tokens)
    if num_tokens < read.get_seq_length() or _COPIES * num_bytes > free_device_bytes(device_type):
        return None
    cache = branch(read, 1)
    layer: Any  # the mixins of transformers do not declare what their subclasses have
    for layer in cache.layers:
        window = getattr(layer, "sliding_window", None)
        kept = num_tokens if window is None else min(num_tokens, window - 1)
        for name in ("keys", "values"):
            states = getattr(layer, name, None)
            if not isinstance(states, torch.Tensor) or not states.numel():
                continue
            repeats = -(-kept // states.shape[-2])
            repeated = states.repeat(*[1] * (states.dim() - 2), repeats, 1)
            setattr(layer, name, repeated[..., :kept, :].contiguous())
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = num_tokens
    is_right = cache.get_seq_length() == num_tokens and measured_kv_bytes(cache) == num_bytes
    return cache if is_right else None
