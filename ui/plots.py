"""Pictures; the only place that imports matplotlib."""

from pathlib import Path

from matplotlib.figure import Figure

from rag.lm.kv_bytes import KVDtype, kv_bytes_by_kind
from rag.lm.peak_bytes import peak_bytes
from rag.lm.positions import position_limit
from rag.lm.spec import ModelSpec
from rag.routing.model_plan import ModelPlan

_GIB = 2**30
_POINTS = 200
# Okabe and Ito's colours, which the colour-blind can tell apart.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


def draw_model_plan(
    plan: ModelPlan, spec: ModelSpec, path: Path, *, kv_dtype: KVDtype | None = None
) -> None:
    """Draw cache bytes over length, one band for each kind of layer, and the limits as lines.

    Args:
        plan: what is drawn.
        spec: the model's shape.
        path: the picture; its suffix chooses the format, e.g. .png or .svg.
        kv_dtype: the format of the cache that was planned.
    """
    limit = position_limit(spec)
    longest = max(plan.tokens, plan.max_tokens or 0, limit or 0)
    lengths = sorted({max(2, round(1.08 * longest * i / _POINTS)) for i in range(1, _POINTS + 1)})
    by_kind = [kv_bytes_by_kind(spec, tokens, kv_dtype=kv_dtype) for tokens in lengths]
    kinds = [kind for kind, num_bytes in by_kind[-1].items() if num_bytes]
    room = plan.device_bytes - plan.weights_bytes - plan.reserve_bytes

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.stackplot(
        lengths,
        [[row[kind] / _GIB for row in by_kind] for kind in kinds],
        labels=[f"cache of {kind} layers" for kind in kinds],
        colors=_COLOURS,
        alpha=0.75,
    )
    highest = max(sum(row.values()) for row in by_kind) / _GIB
    if room > 0:
        left = [(room - peak_bytes(spec, tokens)) / _GIB for tokens in lengths]
        here = (room - plan.peak_bytes) / _GIB
        axes.plot(lengths, left, color="black", label=f"memory for the cache: {here:,.1f} GiB")
        axes.set_ylim(0, 1.1 * min(max(highest, left[0]), 4 * highest))
    if limit is not None:
        axes.axvline(limit, color="grey", linestyle="--", label=f"positions end: {limit:,}")
    axes.axvline(plan.tokens, color="grey", linestyle=":", label=f"asked for: {plan.tokens:,}")
    if plan.max_tokens:
        held = sum(kv_bytes_by_kind(spec, plan.max_tokens, kv_dtype=kv_dtype).values()) / _GIB
        mark = f"longest admissible: {plan.max_tokens:,}"
        axes.plot([plan.max_tokens], [held], "o", color="#D55E00", label=mark)
    axes.set_xlabel("tokens in one sequence")
    axes.set_ylabel("GiB")
    axes.set_title(
        f"{plan.model}: weights {plan.weights_bytes / _GIB:,.1f} GiB of"
        f" {plan.device_bytes / _GIB:,.1f} GiB, cache in {plan.kv_dtype}"
    )
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(loc="upper left", fontsize="small")
    figure.savefig(path, dpi=150)
