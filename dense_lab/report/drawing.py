"""How pictures are drawn: one look, colours that everybody can tell apart, labels that keep out of each other's way."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
"""Okabe and Ito's palette, told apart by readers who see colours differently."""
QUIET = "#767676"
"""For what is not to stand out; still legible as text on white."""
_LOOK: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "0",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
}


@dataclass(frozen=True)
class Picture:
    """Something to be drawn: its name, its caption, its size in inches, and who draws it on a matplotlib figure."""

    name: str
    caption: str
    width: float
    height: float
    paint: Callable[[Any], None]

    @functools.cached_property
    def svg(self) -> str:
        """As an `<svg>` element, the same for the same data."""
        text = self._drawn("svg", {"Date": None}).decode()
        return text[text.index("<svg") :]

    def pdf(self) -> bytes:
        """For LaTeX."""
        return self._drawn("pdf", {"CreationDate": None})

    def png(self, dpi: int = 100) -> bytes:
        """As pixels."""
        return self._drawn("png", {}, dpi)

    def _drawn(self, form: str, metadata: dict[str, Any], dpi: int = 72) -> bytes:
        from matplotlib import rc_context

        out = io.BytesIO()
        with rc_context(_LOOK):
            self._figure.savefig(out, format=form, metadata=metadata, dpi=dpi)
        return out.getvalue()

    @functools.cached_property
    def _figure(self) -> Figure:
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        with rc_context(_LOOK):
            figure = Figure(figsize=(self.width, self.height), layout="constrained")
            self.paint(figure)
            settle(figure)
        return figure


def settle(figure: Any) -> None:
    """Lay a figure out for good, which takes longer than anything else; what is drawn later has to find room."""
    if figure.get_constrained_layout():
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


def clipped(name: str, longest: int = 34) -> str:
    """A name that leaves room for the plot beside it."""
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def label_points(
    axes: Any, points: Sequence[tuple[float, float]], labels: Sequence[str], colours: Sequence[str]
) -> None:
    """Write each label near its point, away from all points and other labels, with a line to it where it is far.

    The last thing that is drawn: it settles the figure. Greedy: the nearest of a ring of places that is free.
    """
    settle(axes.figure)
    scale = axes.figure.dpi / 72
    spots = [tuple(spot) for spot in axes.transData.transform(points)]
    taken = [(x - 5 * scale, y - 5 * scale, x + 5 * scale, y + 5 * scale) for x, y in spots]
    frame = axes.get_window_extent()
    for index, (spot, label) in enumerate(zip(spots, labels, strict=True)):
        size = (6.0 * scale * len(label), 10.0 * scale)
        offset, box = _free(spot, size, taken, frame, scale)
        taken.append(box)
        far = max(map(abs, offset)) > 14
        axes.annotate(
            label,
            points[index],
            offset,
            textcoords="offset points",
            fontsize=8.5,
            color=colours[index],
            ha="center",
            va="center",
            bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.5},
            arrowprops={"arrowstyle": "-", "color": colours[index], "linewidth": 0.6, "alpha": 0.6} if far else None,
        ).set_in_layout(False)


def _free(
    spot: tuple[float, ...],
    size: tuple[float, float],
    taken: Iterable[tuple[float, float, float, float]],
    frame: Any,
    scale: float,
) -> tuple[tuple[float, float], tuple[float, float, float, float]]:
    """Offset in points, and box in pixels, of the nearest free place; the first one when there is none."""
    import math

    found = []
    for ring in range(12):
        for turn in range(16):
            angle = math.tau * turn / 16
            reach = 8 + 6 * ring
            offset = ((reach + size[0] / scale / 2) * math.cos(angle), (reach + 1) * math.sin(angle))
            x, y = spot[0] + offset[0] * scale, spot[1] + offset[1] * scale
            box = (x - size[0] / 2, y - size[1] / 2, x + size[0] / 2, y + size[1] / 2)
            found.append((offset, box))
            inside = box[0] >= frame.x0 and box[2] <= frame.x1 and box[1] >= frame.y0 and box[3] <= frame.y1
            if inside and not any(_overlap(box, other) for other in taken):
                return offset, box
    return found[0]


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def spread(values: Sequence[float], gap: float) -> list[float]:
    """`values` moved as little as a pass upwards and one back can, so that any two are at least `gap` apart."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    # Runs of neighbours that would touch are laid out around their common centre.
    runs: list[list[int]] = []
    centres: list[float] = []
    for index in order:
        runs.append([index])
        centres.append(values[index])
        while len(runs) > 1 and centres[-1] - centres[-2] < gap * (len(runs[-1]) + len(runs[-2])) / 2:
            last, _ = runs.pop(), centres.pop()
            runs[-1] += last
            centres[-1] = sum(values[i] for i in runs[-1]) / len(runs[-1])
    found = [0.0] * len(values)
    for run, centre in zip(runs, centres, strict=True):
        for place, index in enumerate(run):
            found[index] = centre + gap * (place - (len(run) - 1) / 2)
    return found
