"""What one route needs, compared with what this model on this machine can give."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rag.lm.kv_bytes import KVDtype, kv_cache_bytes
from rag.lm.peak_bytes import peak_bytes
from rag.lm.positions import PositionVerdict, position_limit, position_verdict
from rag.lm.spec import ModelSpec
from rag.types import Gate, Route

# What a person who asks for everything to be read may overrule, and what he is told.
SOFT_GATES = {
    "prefill_seconds": "it is slow",
    "effective_length": "the model was not measured to use that much well",
}


@dataclass(frozen=True, slots=True)
class Need:
    """What a route asks of the model: tokens with the template, and room for the answer."""

    route: Route
    prompt_tokens: int
    max_new_tokens: int

    @property
    def total_tokens(self) -> int:
        """Tokens of prompt and longest answer together."""
        return self.prompt_tokens + self.max_new_tokens


@dataclass(frozen=True, slots=True)
class Limits:
    """What there is: context and effective length in tokens, free bytes, the longest prefill.

    `memory_bytes` is free device memory less the reserve: the cache and what a forward pass takes
    beside it have to fit; None where a server has it. `context_tokens` is None if the model
    declares no end and no cap is set. `effective_tokens` is the longest prompt that the model was
    measured to use well, 0 if it does not even use the shortest one, None if nothing was measured.
    """

    context_tokens: int | None
    memory_bytes: int | None
    prefill_seconds: float
    effective_tokens: int | None = None


def check_gates(
    need: Need,
    spec: ModelSpec | None,
    limits: Limits,
    *,
    predicted_prefill_seconds: float | None,
    kv_dtype: KVDtype | None = None,
) -> tuple[Gate, ...]:
    """Return every gate of one route, failed ones included.

    The value of `kv_bytes` is the exact cache; its limit is the memory less the peak that a forward
    pass of this length needs beside the cache.

    Args:
        need: exact counts of the templated prompt.
        spec: the loaded model's shape; None where a server runs it, and then the gates for
            positions and KV bytes are left out: they are the server's.
        limits: what this machine has now.
        predicted_prefill_seconds: for `need.prompt_tokens`; None where it was not measured, and
            then that gate is left out.
        kv_dtype: the format of the cache; by default that of the spec.
    """
    total = need.total_tokens
    gates = [
        Gate(
            "tokens",
            total,
            limits.context_tokens,
            "tokens",
            limits.context_tokens is None or total <= limits.context_tokens,
            need.route,
        ),
    ]
    if spec is not None:
        verdict = position_verdict(spec, total)
        in_range = verdict in (PositionVerdict.NATIVE, PositionVerdict.EXTENDED)
        gates.append(
            Gate("positions", total, position_limit(spec), "positions", in_range, need.route)
        )
    if spec is not None and limits.memory_bytes is not None:
        kv_bytes = kv_cache_bytes(spec, total, kv_dtype=kv_dtype)
        kv_limit = max(0, limits.memory_bytes - peak_bytes(spec, total))
        fits = kv_bytes <= kv_limit
        gates.append(Gate("kv_bytes", kv_bytes, kv_limit, "bytes", fits, need.route))
    if predicted_prefill_seconds is not None:
        gates.append(
            Gate(
                "prefill_seconds",
                round(predicted_prefill_seconds, 2),
                limits.prefill_seconds,
                "seconds",
                predicted_prefill_seconds <= limits.prefill_seconds,
                need.route,
            )
        )
    if need.route is Route.FULL and limits.effective_tokens is not None:
        # Where it is not measurable no limit is known, and what is not known is not relied on.
        effective = limits.effective_tokens or None
        fits = effective is not None and need.prompt_tokens <= effective
        gates.append(
            Gate("effective_length", need.prompt_tokens, effective, "tokens", fits, need.route)
        )
    if spec is not None and spec.kv_dtype is not None:
        return tuple(replace(gate, kv_dtype=str(spec.kv_dtype)) for gate in gates)
    return tuple(gates)


def failed(gates: tuple[Gate, ...], route: Route) -> list[Gate]:
    """Return the gates that a route fails; with the cache format that was tried last."""
    tried = [gate for gate in gates if gate.route == route]
    return [gate for gate in tried if not gate.passed and gate.kv_dtype == tried[-1].kv_dtype]


def hard(gates: Sequence[Gate]) -> list[Gate]:
    """Return those of the gates that not even a person who asks for a route may overrule."""
    return [gate for gate in gates if gate.gate not in SOFT_GATES]


def describe(gate: Gate) -> str:
    """Return one gate in words, e.g. `tokens 110,233 of 32,768`."""
    if gate.unit == "bytes":
        value, limit = (f"{(v or 0) / 2**20:,.0f} MiB" for v in (gate.value, gate.limit))
        return f"{gate.gate} {value} of {limit}"
    limit = "unknown" if gate.limit is None else f"{gate.limit:,.10g}"
    if gate.gate == "effective_length" and gate.limit is None:
        return f"{gate.gate} not measurable: the model answers too little even on short prompts"
    return f"{gate.gate} {gate.value:,.10g} of {limit}"
