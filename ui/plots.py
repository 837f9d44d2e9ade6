"""Pictures; the only place that imports matplotlib."""

from pathlib import Path

from matplotlib.figure import Figure

from eval.effective_length import KEPT_SHARE
from eval.judge_calibration import Calibration
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


def draw_calibration(calibration: Calibration, path: Path) -> None:
    """Draw accuracy over length with its interval, and beneath it by length and depth.

    Args:
        calibration: what `eval.calibrate` found.
        path: the picture; its suffix chooses the format, e.g. .png or .svg.
    """
    found, cells = calibration.found, calibration.cells
    lengths = [point.tokens for point in found.points]
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    above, below = figure.subplots(2, 1)

    above.fill_between(
        lengths,
        [point.low for point in found.points],
        [point.high for point in found.points],
        color=_COLOURS[0],
        alpha=0.2,
        label="95% interval",
    )
    above.plot(lengths, [point.correct for point in found.points], "o-", color=_COLOURS[0])
    wanted = KEPT_SHARE * found.base
    above.axhline(wanted, color="grey", linestyle=":", label=f"{KEPT_SHARE:.0%} of the base")
    if found.is_measurable:
        mark = f"effective length, 5th percentile: {found.tokens:,}"
        above.axvline(found.tokens, color=_COLOURS[5], linestyle="--", label=mark)
    above.set_xscale("log", base=2)
    above.set_xticks(lengths, [f"{tokens:,}" for tokens in lengths])
    above.set_ylim(0, 1.05)
    above.set_ylabel("lookups right")
    num_questions = sum(point.num_questions for point in found.points)
    above.set_title(f"{found.model}: {num_questions:,} lookups, scored by {found.scored_by}")
    above.legend(loc="lower left", fontsize="small")

    depths = sorted({cell.depth_from for cell in cells})
    at = {(cell.tokens, cell.depth_from): cell for cell in cells}
    grid = [[at[t, d].correct if (t, d) in at else float("nan") for t in lengths] for d in depths]
    image = below.imshow(grid, aspect="auto", vmin=0, vmax=1, cmap="cividis")
    for row, depth in enumerate(depths):
        for column, tokens in enumerate(lengths):
            if (tokens, depth) in at:
                cell = at[tokens, depth]
                below.text(
                    column,
                    row,
                    f"{cell.correct:.0%}\n{cell.num_questions} asked",
                    ha="center",
                    va="center",
                    fontsize="small",
                    color="black" if cell.correct > 0.6 else "white",
                )
    below.set_xticks(range(len(lengths)), [f"{tokens:,}" for tokens in lengths])
    ends = {cell.depth_from: cell.depth_to for cell in cells}
    below.set_yticks(range(len(depths)), [f"{d:.0%} to {ends[d]:.0%}" for d in depths])
    below.set_xlabel("prompt tokens")
    below.set_ylabel("depth of the fact")
    figure.colorbar(image, ax=below)
    figure.savefig(path, dpi=150)
