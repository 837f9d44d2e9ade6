"""What `fathom plan --model NAME --tokens N` shows: a model planned alone, without a library."""

import re
from pathlib import Path

import typer
from rich.table import Table

from rag.lm.kv_bytes import KVDtype
from rag.lm.spec import ModelSpec
from rag.routing.model_plan import ContextRanges, ModelPlan
from rag.settings import Settings
from rag.store.calibrations import CalibrationStore
from ui.console import out, print_json
from ui.formatting import amount

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?", re.IGNORECASE)
_KV_DTYPES = {
    "bf16": KVDtype.BFLOAT16,
    "fp16": KVDtype.FLOAT16,
    "fp32": KVDtype.FLOAT32,
    **{str(dtype): dtype for dtype in KVDtype},
}
PICTURES = (".png", ".svg", ".pdf")


def parse_size(text: str) -> int:
    """Return the bytes of a size such as 24GiB, 24GB, 1.5 TiB or 25769803776."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise typer.BadParameter(f"{text!r} is no size; give e.g. 24GiB, 24GB or bytes")
    number, unit, binary = found.groups()
    power = " kmgt".index(unit.lower()) if unit else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def parse_kv_dtype(text: str) -> KVDtype:
    """Return the cache format of that name."""
    if text.lower() not in _KV_DTYPES:
        raise typer.BadParameter(f"{text!r} is none of {', '.join(_KV_DTYPES)}")
    return _KV_DTYPES[text.lower()]


def show_model_plan(
    tokens: int,
    settings: Settings,
    *,
    device_memory: str | None,
    kv_dtype: str | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Plan the model of the settings for a context of `tokens`, and show or draw it."""
    device_bytes = parse_size(device_memory) if device_memory else None
    dtype = parse_kv_dtype(kv_dtype) if kv_dtype else None
    if plot is not None and plot.suffix.lower() not in PICTURES:
        raise typer.BadParameter(f"--plot {plot} ends in none of {', '.join(PICTURES)}")

    from rag.lm.device import choose_device, free_device_bytes
    from rag.lm.engine import name_with_cache
    from rag.lm.model_facts import find_model_facts
    from rag.routing.model_plan import plan_model

    facts = find_model_facts(settings.model, settings)
    if device_bytes is None:
        device_bytes = free_device_bytes(choose_device(settings).type)
    plan = plan_model(
        facts.spec,
        tokens,
        model=facts.name,
        source=facts.source,
        file_bytes=facts.file_bytes,
        quantization=facts.quantization,
        device_bytes=device_bytes,
        reserve_bytes=settings.kv_reserve_bytes,
        kv_dtype=dtype,
        max_context_tokens=settings.max_context_tokens,
        prefill_deadline_seconds=settings.prefill_deadline_seconds,
        predicted_prefill_seconds=remembered_seconds(facts.name, facts.spec, tokens, settings),
        effective_tokens=remembered_effective_tokens(
            name_with_cache(facts.name, dtype) if dtype is KVDtype.Q8_0 else facts.name, settings
        ),
    )
    if plot is not None:
        from ui.plots import draw_model_plan

        draw_model_plan(plan, facts.spec, plot, kv_dtype=dtype)
    if as_json:
        print_json(plan.to_json())
        return
    _print_plan(plan)
    if plot is not None:
        out.print(f"drawn in {plot}", markup=False)


def remembered_seconds(name: str, spec: ModelSpec, tokens: int, settings: Settings) -> float | None:
    """Return the prefill seconds by a rate that this library remembers, None if it has none."""
    calibrations = _calibrations(settings)
    if calibrations is None:
        return None
    import torch

    from rag.lm.device import choose_device
    from rag.lm.prefill_rate import PrefillClock

    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    clock = PrefillClock(
        spec,
        model_name=name,
        device_type=choose_device(settings).type,
        calibrations=calibrations,
    )
    return clock.seconds(tokens) if clock.is_set else None


def remembered_effective_tokens(name: str, settings: Settings) -> int | None:
    """Return the effective length that this library remembers of a model of that name."""
    calibrations = _calibrations(settings)
    found = calibrations.effective_length_of(name) if calibrations else None
    return found.tokens if found else None


def ranges_text(ranges: ContextRanges) -> str:
    """Return how long a context was trained, scaled and measured, and what counts, in a line."""
    parts = [f"trained for {_tokens(ranges.trained)}"]
    if ranges.scaled is not None:
        parts.append(f"scaled to {_tokens(ranges.scaled)}")
    if ranges.effective is None:
        parts.append("effective length not measured here (fathom calibrate)")
    elif ranges.effective == 0:
        parts.append("effective length not measurable")
    else:
        parts.append(f"measured to use {_tokens(ranges.effective)} well")
    return f"context: {', '.join(parts)}; what counts: {_tokens(ranges.counts)}"


def _tokens(limit: int | None) -> str:
    if limit is None:
        return "any length"
    return f"{limit:,} tokens" if limit else "none"


def _calibrations(settings: Settings) -> CalibrationStore | None:
    """Return what the library remembers; None where there is no library, for none is made here."""
    url = settings.resolved_database_url
    if url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).is_file():
        return None
    from rag.store.database import Database

    return CalibrationStore(Database(url))


def _print_plan(plan: ModelPlan) -> None:
    """Print the plan for people: what it needs by kind, then every gate, then the limits."""
    out.print(f"{plan.model} ({plan.model_type}) for {plan.tokens:,} tokens", markup=False)
    out.print(f"from {plan.source}", markup=False)

    needs = Table(box=None, pad_edge=False)
    for column in ("memory", "bytes", ""):
        needs.add_column(column, justify="left" if column != "bytes" else "right")
    weights = f"{plan.num_parameters:,} parameters, as this engine holds them"
    if plan.quantization:
        weights += f"; the checkpoint is stored as {plan.quantization}"
    if plan.file_bytes:
        weights += f"; files {amount(plan.file_bytes, 'bytes')}"
    needs.add_row("weights", amount(plan.weights_bytes, "bytes"), weights)
    for kind, num_bytes in plan.kv_bytes_by_kind.items():
        needs.add_row(f"cache, {kind}", amount(num_bytes, "bytes"), f"in {plan.kv_dtype}")
    needs.add_row("peak beside it", amount(plan.peak_bytes, "bytes"), "an upper bound")
    needs.add_row("reserve", amount(plan.reserve_bytes, "bytes"), "FATHOM_KV_RESERVE_BYTES")
    needs.add_row("device", amount(plan.device_bytes, "bytes"), "")
    out.print(needs)

    gates = Table(box=None, pad_edge=False)
    for column in ("gate", "verdict", "needs", "limit"):
        gates.add_column(column, justify="left" if column in ("gate", "verdict") else "right")
    for gate in plan.gates:
        verdict = "passed" if gate.passed else "FAILED"
        limit = "none" if gate.limit is None else amount(gate.limit, gate.unit)
        gates.add_row(gate.gate, verdict, amount(gate.value, gate.unit), limit)
    out.print(gates)

    longest = "without end" if plan.max_tokens is None else f"{plan.max_tokens:,} tokens"
    out.print(f"longest context that fits: {longest}", markup=False)
    out.print(ranges_text(plan.ranges), markup=False)
    out.print(f"caches of {plan.tokens:,} tokens that fit at once: {plan.num_sequences:,}")
    if plan.prefill_seconds is None:
        out.print(
            "prefill time: not measured here; fathom plan --measure does, with the model fetched"
            " and a document ingested",
            markup=False,
        )
    else:
        out.print(f"prefill: {plan.prefill_seconds:,.1f} s by the rate measured here")
