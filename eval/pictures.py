"""The report's pictures: drawn from an analysis, without a display."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from eval.analysis import Analysis, Cell

# Okabe and Ito's colours, which the colour-blind can tell apart.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#999999")
# A cell whose interval is wider than this to either side says too little to be coloured.
_MOST_HALF_WIDTH = 0.15


def draw_all(analysis: Analysis, folder: Path) -> dict[str, str]:
    """Draw every picture that there is something to draw of; return titles by file name."""
    drawn: dict[str, str] = {}
    wanted: Sequence[tuple[str, str, Callable[[Analysis], Figure | None]]] = (
        ("heatmap.png", "Score by length of the document and depth of the evidence", _heatmap),
        ("cost.png", "Score against cost", _cost),
        ("waterfall.png", "From knowing nothing to being shown the evidence", _waterfall),
        ("risk.png", "Risk and coverage", _risk),
        ("recall.png", "Evidence found within a token budget", _recall),
    )
    for name, title, draw in wanted:
        figure = draw(analysis)
        if figure is not None:
            figure.savefig(folder / name, dpi=110)
            drawn[name] = title
    return drawn


def _heatmap(analysis: Analysis) -> Figure | None:
    """Draw a panel an arm, and last the paired difference: one depth may ask harder questions."""
    drawn = [*analysis.grid, *analysis.grid_of_differences]
    panels = {
        arm: [cell for cell in drawn if cell.arm == arm]
        for arm in dict.fromkeys(cell.arm for cell in drawn)
    }
    if not panels:
        return None
    lengths = list(dict.fromkeys(cell.slice for cell in analysis.grid))
    depths = sorted({cell.value for cell in analysis.grid}, key=lambda d: int(d.split("-")[0]))
    height = 0.9 + 0.55 * len(lengths)
    figure = Figure(figsize=(8, height * len(panels)), layout="constrained")
    for number, (arm, cells) in enumerate(panels.items(), start=1):
        at = {(cell.slice, cell.value): cell for cell in cells}
        is_difference = cells[0] in analysis.grid_of_differences
        axes = figure.add_subplot(len(panels), 1, number)
        rows = [[at.get((length, depth)) for depth in depths] for length in lengths]
        axes.set_facecolor("#e4e4e4")
        axes.imshow(
            [[_shade(cell) for cell in row] for row in rows],
            vmin=-1 if is_difference else 0,
            vmax=1,
            cmap="PuOr" if is_difference else "viridis",
            aspect="auto",
        )
        for y, row in enumerate(rows):
            for x, cell in enumerate(row):
                _label(axes, x, y, cell, on_dark=not is_difference)
        axes.set_xticks(range(len(depths)), depths)
        axes.set_yticks(range(len(lengths)), lengths)
        axes.set_title(f"{arm} (grey: not known to 15 points)", fontsize=10)
    axes.set_xlabel("where the evidence lies in the document")
    return figure


def _is_known(cell: Cell | None) -> bool:
    return cell is not None and cell.score.half_width <= _MOST_HALF_WIDTH


def _shade(cell: Cell | None) -> float:
    return cell.score.mean if cell is not None and _is_known(cell) else float("nan")


def _label(
    axes: Any,  # noqa: ANN401 - matplotlib's
    x: int,
    y: int,
    cell: Cell | None,
    *,
    on_dark: bool,
) -> None:
    if cell is None:
        return
    words = f"{cell.score.mean:.2f} ±{cell.score.half_width:.2f}\nn = {cell.num_questions}"
    dark = on_dark and _is_known(cell) and cell.score.mean < 0.6
    colour = "white" if dark else "black"
    axes.text(x, y, words, ha="center", va="center", fontsize=8, color=colour)


def _cost(analysis: Analysis) -> Figure | None:
    if not analysis.frontier:
        return None
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for number, (attribute, words) in enumerate(
        (
            ("computed_tokens", "prompt tokens computed a question (a document read once)"),
            ("prompt_tokens", "prompt tokens a question (nothing kept)"),
        ),
        start=1,
    ):
        axes = figure.add_subplot(1, 2, number)
        if analysis.curve:
            axes.plot(
                [getattr(point, attribute) for point in analysis.curve],
                [point.score for point in analysis.curve],
                "-",
                color="grey",
                label="router's models,\nby thrift",
            )
        for place, point in enumerate(analysis.frontier):
            x = getattr(point, attribute)
            colour, mark = _COLOURS[place % len(_COLOURS)], "os"[place // len(_COLOURS)]
            axes.plot([x], [point.score], mark, color=colour, label=point.name, alpha=0.8)
        axes.set_xlabel(words)
        axes.set_ylabel("score")
        axes.set_ylim(-0.02, 1.02)
        axes.margins(x=0.1)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize="small")
    return figure


def _waterfall(analysis: Analysis) -> Figure | None:
    steps = analysis.waterfall
    if len(steps) < 2:
        return None
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    before = 0.0
    for place, (_, score) in enumerate(steps):
        colour = _COLOURS[2] if score >= before else _COLOURS[5]
        axes.bar(place, score - before, bottom=before, color=colour if place else _COLOURS[0])
        axes.text(place, max(score, before) + 0.02, f"{score:.2f}", ha="center", fontsize=9)
        before = score
    axes.set_xticks(range(len(steps)), [arm for arm, _ in steps])
    axes.set_ylim(0, 1.08)
    axes.set_ylabel("score, on the questions that all answered")
    return figure


def _risk(analysis: Analysis) -> Figure | None:
    if not any(analysis.risk.values()):
        return None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for place, (arm, points) in enumerate(analysis.risk.items()):
        if points:
            axes.plot(*zip(*points, strict=True), label=arm, color=_COLOURS[place % len(_COLOURS)])
    axes.set_xlabel("share of all questions answered, nearest evidence first")
    axes.set_ylabel("share of those answered that is wrong")
    axes.set_xlim(0, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.legend(fontsize="small")
    return figure


def _recall(analysis: Analysis) -> Figure | None:
    with_recall = [arm for arm in analysis.arms if arm.recall]
    if not with_recall:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for place, arm in enumerate(with_recall):
        budgets = {name: share for name, share in arm.recall.items() if name.endswith("tokens")}
        tokens = [int(name.split()[0]) for name in budgets]
        axes.plot(tokens, list(budgets.values()), "o-", label=arm.arm, color=_COLOURS[place])
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("token budget")
    axes.set_ylabel("evidence within it")
    axes.set_ylim(0, 1.02)
    axes.legend(fontsize="small")
    return figure
