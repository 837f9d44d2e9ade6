"""What one model could read in given memory: every gate, before a byte of it is loaded."""

from bisect import bisect_right
from dataclasses import asdict, dataclass
from typing import Any

from rag.lm.kv_bytes import KVDtype, kv_bytes_by_kind, kv_cache_bytes
from rag.lm.peak_bytes import peak_bytes
from rag.lm.positions import position_limit, trained_limit
from rag.lm.spec import ModelSpec
from rag.routing.gates import Limits, Need, check_gates, hard
from rag.types import Gate, Route

# Where neither positions nor memory end the context, the search ends here.
_MOST_TOKENS = 2**30


@dataclass(frozen=True, slots=True)
class ContextRanges:
    """How long a context a model was trained for, was scaled to, and was measured to use well.

    In tokens. `trained` and `scaled` are None where nothing ends them, `scaled` also where the
    checkpoint declares no scaling; `effective` is None where nothing was measured here, 0 where it
    is not measurable.
    """

    trained: int | None
    scaled: int | None
    effective: int | None

    @property
    def counts(self) -> int | None:
        """The range that counts: what positions allow, or what was measured if that is less.

        None if nothing ends it.
        """
        positions = self.trained if self.scaled is None else self.scaled
        known = [limit for limit in (positions, self.effective) if limit is not None]
        return min(known, default=None)

    def to_json(self) -> dict[str, Any]:
        """Return the object that `fathom plan --json` prints."""
        return asdict(self) | {"counts": self.counts}


def context_ranges(spec: ModelSpec, effective_tokens: int | None) -> ContextRanges:
    """Return the ranges of a model; `effective_tokens` is what `fathom calibrate` found."""
    trained, declared = trained_limit(spec), position_limit(spec)
    return ContextRanges(trained, declared if declared != trained else None, effective_tokens)


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """One model on one device, for a context of `tokens` tokens.

    `kv_bytes` is the cache of one sequence once all of them are in it: a prefill of `tokens - 1`
    and one decoded. `weights_bytes` is what the engine holds, `file_bytes` the size of the files,
    where they are here. `max_tokens` is the longest context that fits, None where nothing ends it;
    `num_sequences` how many caches of `tokens` tokens fit at once.
    """

    model: str
    source: str
    model_type: str
    quantization: str | None
    tokens: int
    num_parameters: int
    weights_bytes: int
    file_bytes: int | None
    kv_dtype: str
    kv_bytes: int
    kv_bytes_by_kind: dict[str, int]
    peak_bytes: int
    device_bytes: int
    reserve_bytes: int
    gates: tuple[Gate, ...]
    max_tokens: int | None
    num_sequences: int
    prefill_seconds: float | None
    ranges: ContextRanges

    @property
    def fits(self) -> bool:
        """Whether every gate passes but two: what is merely slow, or badly used, does fit."""
        return all(gate.passed for gate in hard(self.gates))

    def to_json(self) -> dict[str, Any]:
        """Return the object that `fathom plan --model NAME --tokens N --json` prints."""
        return asdict(self) | {"fits": self.fits, "ranges": self.ranges.to_json()}


def plan_model(
    spec: ModelSpec,
    tokens: int,
    *,
    model: str,
    device_bytes: int,
    reserve_bytes: int,
    kv_dtype: KVDtype | None = None,
    max_context_tokens: int | None = None,
    prefill_deadline_seconds: float = 60.0,
    predicted_prefill_seconds: float | None = None,
    effective_tokens: int | None = None,
    source: str = "",
    file_bytes: int | None = None,
    quantization: str | None = None,
) -> ModelPlan:
    """Return the plan of a model in `device_bytes` of memory that holds nothing else.

    Args:
        spec: the model's shape.
        tokens: prompt and answer of one sequence; 2 or more.
        model: what the plan calls it.
        device_bytes: memory for weights, cache and everything else.
        reserve_bytes: what of it is left alone.
        kv_dtype: the format of the cache; by default the model's own. In the one that this engine
            has beside it, full layers alone are; in the others, windows too.
        max_context_tokens: a cap below what the model declares.
        prefill_deadline_seconds: the longest acceptable prefill.
        predicted_prefill_seconds: of `tokens`, where a rate was measured here.
        effective_tokens: what `fathom calibrate` found of it, 0 if not measurable.
        source: where the facts are from.
        file_bytes: the size of the weight files.
        quantization: the format of a checkpoint that is stored in another than its dtype.
    """
    if spec.quantised and spec.quantised.kv_dtype is kv_dtype:
        spec, kv_dtype = spec.quantised, None
    caps = [cap for cap in (max_context_tokens, position_limit(spec)) if cap is not None]
    room = device_bytes - spec.weights_bytes - reserve_bytes
    limits = Limits(min(caps, default=None), room, prefill_deadline_seconds, effective_tokens)
    gates = check_gates(
        Need(Route.FULL, tokens - 1, 1),
        spec,
        limits,
        predicted_prefill_seconds=predicted_prefill_seconds,
        kv_dtype=kv_dtype,
    )
    kv_bytes = kv_cache_bytes(spec, tokens, kv_dtype=kv_dtype)
    peak = peak_bytes(spec, tokens)
    longest = longest_context(spec, room, kv_dtype=kv_dtype)
    longest = min([longest, *caps])
    return ModelPlan(
        model=model,
        source=source,
        model_type=spec.model_type,
        quantization=quantization,
        tokens=tokens,
        num_parameters=spec.num_parameters,
        weights_bytes=spec.weights_bytes,
        file_bytes=file_bytes,
        kv_dtype=str(kv_dtype or spec.kv_dtype or _dtype_name(spec.dtype_bytes)),
        kv_bytes=kv_bytes,
        kv_bytes_by_kind=kv_bytes_by_kind(spec, tokens, kv_dtype=kv_dtype),
        peak_bytes=peak,
        device_bytes=device_bytes,
        reserve_bytes=reserve_bytes,
        gates=gates,
        max_tokens=None if longest >= _MOST_TOKENS else longest,
        num_sequences=max(0, (room - peak) // kv_bytes),
        prefill_seconds=predicted_prefill_seconds,
        ranges=context_ranges(spec, effective_tokens),
    )


def longest_context(spec: ModelSpec, room_bytes: int, *, kv_dtype: KVDtype | None = None) -> int:
    """Return the most tokens whose cache and forward pass take at most `room_bytes`; 0 if none."""

    def needed(tokens: int) -> int:
        return kv_cache_bytes(spec, tokens, kv_dtype=kv_dtype) + peak_bytes(spec, tokens)

    return bisect_right(range(1, _MOST_TOKENS), room_bytes, key=needed)


def _dtype_name(dtype_bytes: int) -> str:
    return {1: "fp8", 2: "bfloat16", 4: "float32"}.get(dtype_bytes, f"{8 * dtype_bytes} bits")
