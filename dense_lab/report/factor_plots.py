"""Grids of two factors as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dense_lab.report.drawing import Picture, clipped
from dense_lab.report.factors import Grid
from dense_lab.report.tables import metric_text
from dense_lab.report.verdicts import interval, signed


def interactions(grids: Sequence[Grid]) -> Picture | None:
    """Effect of one factor within each level of another."""
    if not grids:
        return None
    sizes = [(len(grid.rows), len(grid.columns)) for grid in grids]
    effects = [
        abs(grid.effect(row, column).difference) for grid in grids for row in grid.rows for column in grid.columns[1:]
    ]
    largest = max((value for value in effects if math.isfinite(value)), default=0.0) or 1.0

    def paint(figure: Any) -> None:
        panels = figure.subplots(len(grids), 1, squeeze=False, height_ratios=[rows + 1 for rows, _ in sizes])
        for axes, grid in zip(panels.flatten(), grids, strict=True):
            _panel(axes, grid, largest)

    caption = (
        f"Mean {grids[0].metric}, and below it the difference to the first column of the same row, paired by seed, "
        "with its t interval (not adjusted): purple is lower, orange higher. Rows that change alike do not interact."
    )
    width = min(12.0, 2.4 + 1.75 * max(columns for _, columns in sizes))
    return Picture("interactions", caption, width, sum(0.7 * rows + 0.9 for rows, _ in sizes), paint)


def _panel(axes: Any, grid: Grid, largest: float) -> None:
    from matplotlib import colormaps

    said = {(row, column): grid.effect(row, column) for row in grid.rows for column in grid.columns[1:]}
    shades = [
        [said[row, column].difference / largest if (row, column) in said else 0.0 for column in grid.columns]
        for row in grid.rows
    ]
    # Orange to blue: told apart by everybody, and light enough at both ends for black text.
    axes.imshow(shades, cmap=colormaps["PuOr_r"], vmin=-2.2, vmax=2.2, aspect="auto")
    for height, row in enumerate(grid.rows):
        for across, column in enumerate(grid.columns):
            text = metric_text(grid.metric, grid.mean(row, column))
            if (row, column) in said:
                effect = said[row, column]
                text += (
                    f"\n{signed(grid.metric, effect.difference)}\n{interval(grid.metric, effect.t_interval, signed)}"
                )
            axes.text(across, height, text, ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(grid.columns)), [clipped(name, 20) for name in grid.columns])
    axes.set_yticks(range(len(grid.rows)), [clipped(name, 20) for name in grid.rows])
    axes.set(xlabel=grid.column, ylabel=grid.row)
    axes.grid(visible=False)
