"""How fast a model prefills here: measured once, remembered, and mended where answers differ."""

from __future__ import annotations

import platform
import time
from dataclasses import asdict
from statistics import median
from typing import Any

from rag.lm.prefill_cost import PrefillRate, prefill_flops, prefill_seconds
from rag.lm.spec import ModelSpec
from rag.store.calibrations import CalibrationStore

_TOKENS = 256
_RUNS = 2
# A rate that a real prefill misses by more than this share is replaced by what that one showed.
_DRIFT = 0.25


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
        """Time short prefills of an empty cache, the first of them to warm up."""
        num_tokens = min(_TOKENS, self._spec.max_positions or _TOKENS)
        seconds = [_prefill(model, self._spec, num_tokens) for _ in range(1 + _RUNS)][1:]
        self._remember(num_tokens, median(seconds))

    def seconds(self, num_tokens: int, *, cached_tokens: int = 0) -> float:
        """Return the predicted seconds of a prefill; the first `cached_tokens` are there already.

        Raises:
            RuntimeError: if the rate is not known yet; see `is_set`.
        """
        if self._rate is None:
            raise RuntimeError("the prefill rate has not been measured")
        whole = prefill_seconds(self._spec, self._rate, num_tokens)
        return whole - prefill_seconds(self._spec, self._rate, cached_tokens)

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Replace a rate that a real prefill shows to be off: the machine is not what it was."""
        if self._rate is None or num_tokens < min(_TOKENS, self._rate.measured_tokens):
            return
        predicted = prefill_seconds(self._spec, self._rate, num_tokens)
        if abs(seconds - predicted) > _DRIFT * predicted:
            self._remember(num_tokens, seconds)

    @property
    def key(self) -> str:
        """What the rate depends on: model, element size, attention and device."""
        import torch

        if self._device_type == "cuda":
            device = torch.cuda.get_device_name()
        else:
            device = f"{platform.node()} {torch.backends.cpu.get_cpu_capability()}"
            device += f" {torch.get_num_threads()} threads"
        return f"prefill rate: {self._model_name}, {self._spec.dtype_bytes} bytes, sdpa, {device}"

    def _remember(self, num_tokens: int, seconds: float) -> None:
        self._rate = PrefillRate(prefill_flops(self._spec, num_tokens) / seconds, num_tokens)
        if self._calibrations:
            self._calibrations.save(self.key, asdict(self._rate))


def _prefill(model: Any, spec: ModelSpec, num_tokens: int) -> float:  # noqa: ANN401
    """Return the seconds of one prefill of an empty cache."""
    import torch

    from rag.lm.native_cache import native_cache

    ids = [index % spec.vocab_size for index in range(num_tokens)]
    cache = native_cache(model.config)
    begun = time.perf_counter()
    with torch.inference_mode():
        output = model(
            input_ids=torch.tensor([ids], device=model.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        int(output.logits[0, -1].argmax())  # waits for the GPU
    return time.perf_counter() - begun
