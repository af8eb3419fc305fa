"""The pictures of a search. Colours follow one choice (the core, where it is open) through all of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dense_lab.report.drawing import COLOURS, Picture
from dense_lab.report.tables import by_option, importance
from dense_lab.results import StudyResults, TrialView
from dense_lab.units import human

HIGHLIGHTED = 5
"""Curves drawn in full colour."""
IMPORTANCE = (
    "Share of the objective's variance that each parameter explains by itself (fANOVA). One that only some trials have "
    "is judged among those alone, which are numbered beside it: its share is not to be compared with the others'."
)


def pictures(results: StudyResults) -> list[Picture]:
    """Every plot that these results can fill."""
    metric = results.goals[0].metric
    plots = {
        "curves": (f"Validation loss while training; the best {HIGHLIGHTED} in colour.", _curves(results)),
        "speed": (
            f"{metric} against training speed.",
            _scatter(results, "tokens_per_second", "training tokens per second"),
        ),
        "state": (
            f"{metric} against the recurrent state of one sequence.",
            _scatter(results, "state_bytes", "state, bytes"),
        ),
        "parameters": (f"{metric} against the number of parameters.", _scatter(results, "parameters", "parameters")),
        "importance": (IMPORTANCE, _importance(results)),
        "effects": (f"{metric} by option of each choice; a dot is a trial, the bar the median.", _effects(results)),
    }
    if len(results.goals) > 1:
        plots["pareto"] = ("Pareto front of the first two objectives.", _pareto(results))
    return [replace(one, name=name, caption=caption) for name, (caption, one) in plots.items() if one]


def run_pictures(results: StudyResults) -> list[Picture]:
    """The plot of a single run."""
    trial = results.trials[0]
    lines = {
        name: [(line["tokens"], line[name]) for line in trial.curve if name in line]
        for name in ("train/loss", "valid/loss")
    }
    if not any(lines.values()):
        return []

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        for colour, (name, points) in zip(("#bbbbbb", COLOURS[0]), lines.items(), strict=True):
            if points:
                tokens, losses = zip(*points, strict=True)
                axes.plot(tokens, losses, color=colour, label=name, marker="." if name == "valid/loss" else None)
        axes.set(xlabel="training tokens", ylabel="loss, nats per token")
        axes.xaxis.set_major_formatter(lambda value, _: human(value))
        axes.legend(frameon=False, fontsize=9)

    return [Picture("curve", "Loss while training.", 7.2, 4.2, paint)]


def _grouping(results: StudyResults) -> tuple[str, dict[str, str]]:
    """The choice that colours the plots, and a colour for each of its options."""
    groups = by_option(results)
    path = "model.core" if "model.core" in groups else next(iter(groups), "")
    options = sorted(groups.get(path, {}))
    return path, {option: COLOURS[i % len(COLOURS)] for i, option in enumerate(options)}


def _colour(trial: TrialView, path: str, colours: dict[str, str]) -> str:
    return colours.get(str(trial.params.get(path)), COLOURS[0])


def _legend(axes: Any, path: str, colours: dict[str, str]) -> None:
    from matplotlib.lines import Line2D

    if colours:
        handles = [Line2D([], [], marker="o", linestyle="", color=c, label=o) for o, c in colours.items()]
        axes.legend(handles=handles, title=path, frameon=False, fontsize=9)


def _curves(results: StudyResults) -> Picture | None:
    path, colours = _grouping(results)
    ranked = results.ranked()
    drawn = [t for t in [*results.having("pruned"), *reversed(ranked)] if _valid(t)]
    best = {trial.number for trial in ranked[:HIGHLIGHTED]}
    if not drawn:
        return None

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        for trial in drawn:
            top = trial.number in best
            tokens, losses = zip(*_valid(trial), strict=True)
            colour = _colour(trial, path, colours) if top else "#bbbbbb"
            axes.plot(tokens, losses, color=colour, linewidth=1.6 if top else 0.8, marker="." if top else None)
            if top:
                axes.annotate(f" {trial.number}", (tokens[-1], losses[-1]), fontsize=8, color=colour, va="center")
        axes.set(xlabel="training tokens", ylabel="valid/loss, nats per token")
        axes.xaxis.set_major_formatter(lambda value, _: human(value))
        _legend(axes, path, colours)

    return Picture("", "", 7.2, 4.2, paint)


def _valid(trial: TrialView) -> list[tuple[float, float]]:
    return [(line["tokens"], line["valid/loss"]) for line in trial.curve if "valid/loss" in line]


def _scatter(results: StudyResults, cost: str, label: str) -> Picture | None:
    metric = results.goals[0].metric
    path, colours = _grouping(results)
    trials = [t for t in results.ranked() if cost in t.metrics]
    if not trials or metric == cost or len({t.metrics[cost] for t in trials}) < 2:
        return None

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        for trial in trials:
            x, y = trial.metrics[cost], trial.metrics[metric]
            axes.scatter(x, y, color=_colour(trial, path, colours), s=28, alpha=0.85, linewidths=0)
            axes.annotate(f" {trial.number}", (x, y), fontsize=7, color="#555555")
        values = [t.metrics[cost] for t in trials]
        if min(values) > 0 and max(values) > 4 * min(values):
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(lambda value, _: human(value))
        axes.xaxis.set_major_formatter(lambda value, _: human(value))
        axes.tick_params(axis="x", which="minor", labelsize=8)
        axes.set(xlabel=label, ylabel=metric)
        _legend(axes, path, colours)

    return Picture("", "", 5.2, 3.8, paint)


def _importance(results: StudyResults) -> Picture | None:
    shares = importance(results)
    if not shares:
        return None
    number = len(results.ranked())

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        rows = [
            (path if share.trials == number else f"{path} ({share.trials} of {number} trials)", share)
            for path, share in reversed(shares.items())
        ]
        colours = [COLOURS[0] if share.trials == number else COLOURS[5] for _, share in rows]
        axes.barh([name for name, _ in rows], [share.value for _, share in rows], color=colours)
        axes.set(xlabel="share of variance", xlim=(0, 1))
        axes.grid(visible=False, axis="y")

    return Picture("", "", 7.2, 0.9 + 0.28 * len(shares), paint)


def _effects(results: StudyResults) -> Picture | None:
    groups = by_option(results)
    metric = results.goals[0].metric
    if not groups:
        return None
    rows = [(path, option) for path, options in groups.items() for option in sorted(options)]

    def paint(figure: Any) -> None:
        import statistics

        axes = figure.add_subplot()
        for height, (path, option) in enumerate(reversed(rows)):
            values = [trial.metrics[metric] for trial in groups[path][option]]
            colour = COLOURS[list(groups).index(path) % len(COLOURS)]
            axes.scatter(values, [height] * len(values), color=colour, s=22, alpha=0.6, linewidths=0)
            axes.plot([statistics.median(values)] * 2, [height - 0.35, height + 0.35], color=colour, linewidth=2.2)
        axes.set_yticks(
            range(len(rows)), [f"{path.removeprefix('model.')} = {option}" for path, option in reversed(rows)]
        )
        axes.set(xlabel=metric, ylim=(-0.6, len(rows) - 0.4))

    return Picture("", "", 7.2, 0.9 + 0.27 * len(rows), paint)


def _pareto(results: StudyResults) -> Picture | None:
    first, second = (goal.metric for goal in results.goals[:2])
    trials = [t for t in results.ranked() if second in t.metrics]
    front = sorted(results.pareto(), key=lambda t: t.metrics[first])
    if not trials:
        return None

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.scatter([t.metrics[second] for t in trials], [t.metrics[first] for t in trials], color="#bbbbbb", s=24)
        xs, ys = [t.metrics[second] for t in front], [t.metrics[first] for t in front]
        axes.plot(xs, ys, color=COLOURS[1], marker="o", linewidth=1.2)
        for trial, x, y in zip(front, xs, ys, strict=True):
            axes.annotate(f" {trial.number}", (x, y), fontsize=8)
        axes.xaxis.set_major_formatter(lambda value, _: human(value))
        axes.set(xlabel=second, ylabel=first)

    return Picture("", "", 5.2, 3.8, paint)
