"""The pictures of an ablation: differences, costs, learning curves."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from dense_lab.report.ablated import Ablated, Arm
from dense_lab.report.drawing import COLOURS, QUIET, Picture, clipped, label_points, settle, spread
from dense_lab.report.factor_plots import interactions
from dense_lab.report.factors import Grid
from dense_lab.report.verdicts import COSTS, interval, signed

LOOKS = {
    "baseline": ("#000000", "D", "full"),
    "better": ("#0072b2", "v", "full"),
    "worse": ("#d55e00", "^", "full"),
    "no difference shown": (QUIET, "o", "full"),
    "underpowered": (QUIET, "o", "none"),
}
"""Colour, marker and filling of each verdict; the shapes tell them apart in print."""
SINGLED_OUT = 6
"""Arms besides the baseline that learning curves show in colour."""
PLOTTED = 4
"""Costs that are plotted, of those in the table."""
CURVE = "valid/loss"
"""What learning curves show."""


def pictures(ablated: Ablated, grids: Sequence[Grid]) -> list[Picture]:
    """Every picture that the results can fill."""
    found = [forest(ablated), costs(ablated), curves(ablated), interactions(grids)]
    return [picture for picture in found if picture is not None]


def forest(ablated: Ablated) -> Picture | None:
    """Paired difference of each arm, with its interval and its seeds."""
    arms = [(arm, verdict) for arm, verdict in ablated.judged if verdict.verdict != "baseline"]
    if not any(ablated.differences(arm) for arm, _ in arms):
        return None
    metric, effect = ablated.metric, ablated.ablation.analysis.smallest_effect

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.axvline(0, color="#000000", linewidth=1)
        if effect is not None:
            axes.axvspan(-effect, effect, color="#000000", alpha=0.07, linewidth=0)
        for height, (arm, verdict) in enumerate(arms):
            colour, marker, filling = LOOKS[verdict.verdict]
            dots = list(ablated.differences(arm).values())
            axes.plot(dots, [height + 0.26] * len(dots), ".", color=colour, alpha=0.5, markersize=5)
            if all(map(math.isfinite, verdict.t_interval)):
                axes.plot(verdict.t_interval, [height] * 2, color=colour, linewidth=2, solid_capstyle="butt")
            axes.plot(verdict.difference, height, marker, color=colour, fillstyle=filling, markersize=7)
            text = f"{signed(metric, verdict.difference)} {interval(metric, verdict.t_interval, signed)}"
            axes.text(1.02, height, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8.5)
        axes.set_yticks(range(len(arms)), [f"{arm.number} {clipped(arm.name)}" for arm, _ in arms])
        axes.set(ylim=(len(arms) - 0.4, -0.6), xlabel=f"{metric}: difference to {clipped(ablated.baseline.name)}")
        axes.grid(visible=False, axis="y")
        _verdict_legend(figure, [verdict.verdict for _, verdict in arms])

    level = 1 - ablated.ablation.analysis.alpha
    band = ", grey band: smaller than the smallest effect worth claiming" if effect is not None else ""
    caption = (
        f"Paired difference of {metric} to {ablated.baseline.name} with its t interval (level {level:.4g}); dots: "
        f"single seeds{band}. {'Right' if ablated.maximize else 'Left'} of zero is better."
    )
    return Picture("differences", caption, 8.2, 1.5 + 0.34 * len(arms), paint)


def _verdict_legend(figure: Any, verdicts: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for name, (colour, marker, filling) in LOOKS.items():
        if name in verdicts:
            handles.append(
                Line2D([], [], color=colour, marker=marker, fillstyle=filling, linestyle="", label=name)  # type: ignore[arg-type]
            )
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=9)


def costs(ablated: Ablated) -> Picture | None:
    """Quality against each cost that differs between arms, with the Pareto front."""
    metric = ablated.metric
    judged = ablated.judged
    shown = []
    for cost, title in COSTS[:PLOTTED]:
        values = [value for arm, _ in judged if (value := arm.mean(cost)) is not None]
        if cost != metric and len(values) > 1 and max(values) - min(values) > 1e-3 * max(map(abs, values)):
            shown.append((cost, title))
    if not shown:
        return None
    wide = min(3, len(shown)) if len(shown) != 4 else 2
    high = math.ceil(len(shown) / wide)

    def paint(figure: Any) -> None:
        grid = figure.subplots(high, wide, squeeze=False).flatten()
        for axes in grid[len(shown) :]:
            axes.set_visible(False)
        for axes, (cost, title) in zip(grid, shown, strict=False):
            _cost(axes, ablated, cost, title)
        _verdict_legend(figure, [verdict.verdict for _, verdict in judged])
        for axes, (cost, _) in zip(grid, shown, strict=False):
            arms = [(arm, v) for arm, v in judged if arm.mean(cost) is not None]
            spots = [(arm.mean(cost) or 0.0, verdict.mean) for arm, verdict in arms]
            label_points(axes, spots, [str(arm.number) for arm, _ in arms], [LOOKS[v.verdict][0] for _, v in arms])

    caption = (
        f"Mean {metric} with its interval against cost; line: the Pareto front, arms that no other beats in both. "
        "Numbers are those of the tables."
    )
    return Picture("costs", caption, (3.7 if wide == 3 else 4.6) * wide + 0.4, 3.3 * high + 0.4, paint)


def _cost(axes: Any, ablated: Ablated, cost: str, title: str) -> None:
    points = []
    for arm, verdict in ablated.judged:
        value = arm.mean(cost)
        if value is None:
            continue
        colour, marker, filling = LOOKS[verdict.verdict]
        if all(map(math.isfinite, verdict.mean_interval)):
            axes.plot([value] * 2, verdict.mean_interval, color=colour, linewidth=1, alpha=0.5)
        axes.plot(value, verdict.mean, marker, color=colour, fillstyle=filling, markersize=6)
        points.append((value, verdict.mean))
    front = pareto(points, less=cost != "tokens_per_second", lower=not ablated.maximize)
    axes.plot(*zip(*front, strict=True), color="#000000", linewidth=0.9, alpha=0.6, zorder=0)
    axes.margins(0.12)
    axes.set(xlabel=title, ylabel=f"{ablated.metric} {'↑' if ablated.maximize else '↓'}")
    _count_axis(axes)


def _count_axis(axes: Any) -> None:
    """Few ticks, such as 1.015M."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def pareto(points: Sequence[tuple[float, float]], *, less: bool, lower: bool) -> list[tuple[float, float]]:
    """Points (cost, quality) that no other beats in both, by cost; `less` cost and `lower` quality say what is good."""
    signs = (1 if less else -1, 1 if lower else -1)
    found: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda p: (signs[0] * p[0], signs[1] * p[1])):
        if not found or signs[1] * point[1] < signs[1] * found[-1][1]:
            found.append(point)
    return sorted(found)


def curves(ablated: Ablated) -> Picture | None:
    """Validation loss while training, and its paired difference to the baseline."""
    losses = {arm.name: _losses(arm) for arm in ablated.arms}
    arms = [arm for arm in ablated.arms if losses[arm.name]]
    if ablated.baseline not in arms:
        return None
    final = {arm.name: fmean(losses[arm.name][max(losses[arm.name])].values()) for arm in arms}
    rivals = sorted(arms[1:], key=lambda arm: final[arm.name])[:SINGLED_OUT]
    colours = {ablated.baseline.name: "#000000", **{arm.name: COLOURS[i] for i, arm in enumerate(rivals)}}

    def paint(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        reference = losses[ablated.baseline.name]
        ends: dict[Any, list[tuple[float, str, str]]] = {left: [], right: []}
        for arm in sorted(arms, key=lambda arm: arm.name in colours):
            colour = colours.get(arm.name, "#bbbbbb")
            lines = {left: losses[arm.name], right: _paired(losses[arm.name], reference)}
            for axes, line in lines.items():
                if axes is right and arm is ablated.baseline:
                    continue
                last = _band(axes, line, colour, 1 - ablated.ablation.analysis.alpha)
                if arm.name in colours and last is not None:
                    ends[axes].append((last, str(arm.number), colour))
        right.axhline(0, color="#000000", linewidth=1)
        left.set(xlabel="training tokens", ylabel=f"{CURVE}, nats per token")
        right.set(xlabel="training tokens", ylabel=f"{CURVE}: difference to {clipped(ablated.baseline.name, 20)}")
        _curve_legend(figure, ablated, arms, colours)
        for axes in (left, right):
            _count_axis(axes)
        _end_labels(figure, ends)

    rest = f"; the other {len(arms) - len(colours)} arms in grey" if len(arms) > len(colours) else ""
    caption = (
        f"Left: {CURVE} while training, mean over seeds and t interval. Right: the same as paired difference to "
        f"{ablated.baseline.name}, where differences between seeds cancel. In colour: the baseline and the arms that "
        f"end lowest{rest}."
    )
    rows = math.ceil(len(colours) / 3)
    return Picture("curves", caption, 9.6, 3.7 + 0.2 * rows, paint)


def _losses(arm: Arm) -> dict[int, dict[int, float]]:
    """tokens -> seed -> validation loss, where every seed of the arm was measured."""
    found: dict[int, dict[int, float]] = defaultdict(dict)
    for seed, cell in arm.cells.items():
        for line in cell.curve:
            if CURVE in line:
                found[int(line["tokens"])][seed] = line[CURVE]
    return {tokens: values for tokens, values in sorted(found.items()) if len(values) == len(arm.cells)}


def _paired(mine: dict[int, dict[int, float]], theirs: dict[int, dict[int, float]]) -> dict[int, dict[int, float]]:
    pairs = {
        tokens: {s: mine[tokens][s] - theirs[tokens][s] for s in mine[tokens].keys() & theirs[tokens].keys()}
        for tokens in mine.keys() & theirs.keys()
    }
    return {tokens: values for tokens, values in sorted(pairs.items()) if values}


def _band(axes: Any, line: dict[int, dict[int, float]], colour: str, level: float) -> float | None:
    """Draw a mean with its interval; the last mean."""
    if not line:
        return None
    from scipy.stats import t

    tokens, means, halves = list(line), [], []
    for values in (list(found.values()) for found in line.values()):
        n = len(values)
        means.append(fmean(values))
        halves.append(t.ppf((1 + level) / 2, n - 1) * stdev(values) / math.sqrt(n) if n > 1 else 0.0)
    singled = colour != "#bbbbbb"
    axes.plot(tokens, means, color=colour, linewidth=1.5 if singled else 0.7, marker="." if singled else None)
    if singled:
        low, high = ([m + sign * h for m, h in zip(means, halves, strict=True)] for sign in (-1, 1))
        axes.fill_between(tokens, low, high, color=colour, alpha=0.1, linewidth=0)
    return means[-1]


def _end_labels(figure: Any, ends: dict[Any, list[tuple[float, str, str]]]) -> None:
    """Numbers of the arms beside the ends of their curves: drawn so that the layout has room, then moved apart."""
    drawn = {axes: [_end_label(axes, *end) for end in found] for axes, found in ends.items()}
    settle(figure)
    for axes, found in ends.items():
        bottom, top = axes.get_ylim()
        gap = (top - bottom) * 11 / (axes.get_window_extent().height / figure.dpi * 72)
        for height, label in zip(spread([end[0] for end in found], gap), drawn[axes], strict=True):
            label.set_position((1.03, height))


def _end_label(axes: Any, value: float, text: str, colour: str) -> Any:
    return axes.annotate(
        text,
        (1.0, value),
        (1.03, value),
        xycoords=axes.get_yaxis_transform(),
        textcoords=axes.get_yaxis_transform(),
        fontsize=8.5,
        color=colour,
        va="center",
        arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6},
        annotation_clip=False,
    )


def _curve_legend(figure: Any, ablated: Ablated, arms: Sequence[Arm], colours: dict[str, str]) -> None:
    from matplotlib.lines import Line2D

    named = sorted((arm for arm in arms if arm.name in colours), key=lambda arm: arm.number)
    handles = [Line2D([], [], color=colours[a.name], label=f"{a.number} {clipped(a.name)}") for a in named]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(3, len(handles)), frameon=False, fontsize=9)
