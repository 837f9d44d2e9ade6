"""Pictures; the only place that imports matplotlib."""

from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.effective_length import KEPT_SHARE
from eval.thrift import ThriftPoint
from rag.lm.kv_bytes import KVDtype, kv_bytes_by_kind
from rag.lm.peak_bytes import peak_bytes
from rag.lm.positions import position_limit
from rag.lm.spec import ModelSpec
from rag.routing.model_plan import ModelPlan
from rag.store.calibrations import DepthCell, EffectiveLength

_GIB = 2**30
_POINTS = 200
# Okabe and Ito's colours, which the colour-blind can tell apart.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


def draw_model_plan(
    plan: ModelPlan, spec: ModelSpec, path: Path, *, kv_dtype: KVDtype | None = None
) -> None:
    """Write the picture of `model_plan_figure`; the suffix chooses the format, e.g. .png."""
    model_plan_figure(plan, spec, kv_dtype=kv_dtype).savefig(path, dpi=150)


def model_plan_figure(
    plan: ModelPlan, spec: ModelSpec, *, kv_dtype: KVDtype | None = None
) -> Figure:
    """Draw cache bytes over length, one band for each kind of layer, and the limits as lines.

    Args:
        plan: what is drawn.
        spec: the model's shape.
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
    return figure


def prefill_figure(seconds: Mapping[int, float], tokens: int, deadline_seconds: float) -> Figure:
    """Draw the predicted seconds of a prefill over its length, and the deadline as a line.

    Args:
        seconds: of each length in tokens.
        tokens: the length asked for; one of those.
        deadline_seconds: the longest acceptable prefill.
    """
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(list(seconds), list(seconds.values()), color=_COLOURS[0], linewidth=2)
    axes.axhline(
        deadline_seconds, color="grey", linestyle="--", label=f"deadline: {deadline_seconds:,.0f} s"
    )
    here = f"asked for: {tokens:,} tokens, {seconds[tokens]:,.1f} s"
    axes.plot([tokens], [seconds[tokens]], "o", color="#D55E00", label=here)
    axes.set_xlabel("tokens")
    axes.set_ylabel("seconds")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(loc="upper left", fontsize="small")
    return figure


def thrift_figure(curve: Sequence[ThriftPoint], here: ThriftPoint) -> Figure:
    """Draw how likely an answer is right over what it costs, from no thrift to much.

    Args:
        curve: the thrifts tried, from 0 up.
        here: the one that is set.
    """
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.add_subplot()
    costs = [point.cost_tokens for point in curve]
    axes.plot(costs, [100 * point.probability for point in curve], "-", color=_COLOURS[0])
    axes.plot(costs, [100 * point.probability for point in curve], ".", color=_COLOURS[0])
    mark = f"thrift {here.thrift:g}: {here.cost_tokens:,.0f} tokens, {here.probability:.0%}"
    axes.plot([here.cost_tokens], [100 * here.probability], "o", color=_COLOURS[5], label=mark)
    axes.set_xlabel("prompt tokens a question")
    axes.set_ylabel("likely right, %")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.margins(y=0.25)
    axes.legend(loc="lower right", fontsize="small")
    return figure


def to_svg(figure: Figure) -> str:
    """Return a figure as an SVG element in the colour of the text around it, for light and dark."""
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
        if legend := axes.get_legend():
            legend.get_frame().set_alpha(0)
    stream = StringIO()
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    svg = stream.getvalue()
    return svg[svg.index("<svg") :].replace("#000000", "currentColor")


def effective_length_figure(found: EffectiveLength) -> Figure:
    """Draw how well a model uses prompts of each length, with its interval."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.add_subplot()
    _draw_accuracy(axes, found)
    axes.set_xlabel("prompt tokens")
    return figure


def draw_calibration(found: EffectiveLength, path: Path) -> None:
    """Draw accuracy over length with its interval, and beneath it by length and depth.

    Args:
        found: what `fathom calibrate` found.
        path: the picture; its suffix chooses the format, e.g. .png or .svg.
    """
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    above, below = figure.subplots(2, 1)
    _draw_accuracy(above, found)
    _draw_depths(below, found.cells)
    figure.savefig(path, dpi=150)


def depths_figure(cells: Sequence[DepthCell]) -> Figure:
    """Draw how many lookups were right by length of the prompt and depth of the fact."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    _draw_depths(figure.add_subplot(), cells)
    return figure


def _draw_depths(axes: Axes, cells: Sequence[DepthCell]) -> None:
    """Draw a heatmap that says each cell's number too; as paths, which an SVG may hold."""
    lengths = sorted({cell.tokens for cell in cells})
    depths = sorted({cell.depth_from for cell in cells})
    at = {(cell.tokens, cell.depth_from): cell for cell in cells}
    grid = [[at[t, d].correct if (t, d) in at else float("nan") for t in lengths] for d in depths]
    axes.pcolormesh(
        grid, vmin=0, vmax=1, cmap="cividis", edgecolors="white", linewidth=1, rasterized=False
    )
    for row, depth in enumerate(depths):
        for column, tokens in enumerate(lengths):
            if (tokens, depth) in at:
                cell = at[tokens, depth]
                axes.text(
                    column + 0.5,
                    row + 0.5,
                    f"{cell.correct:.0%}\n{cell.num_questions} asked",
                    ha="center",
                    va="center",
                    fontsize="small",
                    color="#101010" if cell.correct > 0.6 else "#ffffff",
                )
    axes.set_xticks([n + 0.5 for n in range(len(lengths))], [f"{tokens:,}" for tokens in lengths])
    ends = {cell.depth_from: cell.depth_to for cell in cells}
    axes.set_yticks(
        [n + 0.5 for n in range(len(depths))], [f"{d:.0%} to {ends[d]:.0%}" for d in depths]
    )
    axes.invert_yaxis()  # the start of the document above
    axes.set_xlabel("prompt tokens")
    axes.set_ylabel("depth of the fact")


def _draw_accuracy(axes: Axes, found: EffectiveLength) -> None:
    lengths = [point.tokens for point in found.points]
    axes.fill_between(
        lengths,
        [point.low for point in found.points],
        [point.high for point in found.points],
        color=_COLOURS[0],
        alpha=0.2,
        label="95% interval",
    )
    axes.plot(lengths, [point.correct for point in found.points], "o-", color=_COLOURS[0])
    wanted = KEPT_SHARE * found.base
    axes.axhline(wanted, color="grey", linestyle=":", label=f"{KEPT_SHARE:.0%} of the base")
    if found.is_measurable:
        mark = f"effective length, 5th percentile: {found.tokens:,}"
        axes.axvline(found.tokens, color=_COLOURS[5], linestyle="--", label=mark)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{tokens:,}" for tokens in lengths])
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("lookups right")
    num_questions = sum(point.num_questions for point in found.points)
    axes.set_title(f"{found.model}: {num_questions:,} lookups, scored by {found.scored_by}")
    axes.legend(loc="lower left", fontsize="small")
