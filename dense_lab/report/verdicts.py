"""The tables of an ablation: verdicts, costs, overhead, interactions, provenance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from dense_lab.report.ablated import Ablated, Arm
from dense_lab.report.factors import Grid, value_text
from dense_lab.report.table import Cell, Footnotes, Table
from dense_lab.report.tables import metric_text
from dense_lab.units import human

COSTS = (
    ("parameters", "parameters"),
    ("flops_per_token", "FLOPs/token"),
    ("tokens_per_second", "tokens/s"),
    ("state_bytes", "state, bytes"),
    ("peak_memory_bytes", "peak memory, bytes"),
)
"""Metrics of the table of costs, and what its columns are called."""
SPEEDS = {"train_tokens_per_second": "training tokens/s", "decode_tokens_per_second": "decoding tokens/s"}
"""Metrics of the overhead that are timed."""
CORRECTIONS = {
    "holm": "p adjusted by Holm",
    "dunnett": "p and intervals simultaneous (Dunnett)",
    "none": "p not adjusted",
}


def verdict_table(ablated: Ablated) -> Table:
    """Per arm: mean, paired difference to the baseline, p, effect size, verdict."""
    best, notes = ablated.best(), Footnotes()
    rows = []
    for arm in ablated.arms:
        marks = tuple(notes.mark(text) for text in remarks(ablated, arm))
        name = Cell(arm.name, bold=arm is best, marks=marks)
        rows.append((str(arm.number), name, *_numbers(ablated, arm, bold=arm is best)))
    columns = ("#", "arm", "seeds", ablated.metric, "difference", "p", "d_z", "shows from", "verdict")
    return Table("Verdicts", columns, tuple(rows), _legend(ablated), notes.listed(), "verdicts", left=2)


def _numbers(ablated: Ablated, arm: Arm, *, bold: bool) -> tuple[str | Cell, ...]:
    verdict, metric = arm.verdict, ablated.metric
    planned = ablated.planned(arm)
    seeds = str(len(arm.cells)) if len(arm.cells) == planned else f"{len(arm.cells)} of {planned}"
    if verdict is None:
        return (seeds, "–", "–", "–", "–", "–", "no result")
    mean = Cell(f"{metric_text(metric, verdict.mean)} {interval(metric, verdict.mean_interval)}", bold=bold)
    if verdict.verdict == "baseline":
        return (seeds, mean, "–", "–", "–", "–", "baseline")
    difference = f"{signed(metric, verdict.difference)} {interval(metric, verdict.t_interval, signed)}"
    shows = metric_text(metric, verdict.detectable) if math.isfinite(verdict.detectable) else "–"
    return (seeds, mean, difference, p_text(verdict.p_adjusted), _plain(verdict.effect_size), shows, verdict.verdict)


def _legend(ablated: Ablated) -> str:
    analysis = ablated.ablation.analysis
    level = f"{1 - analysis.alpha:.4g}"
    effect = analysis.smallest_effect
    best = "Bold: the best mean, where it differs significantly from the baseline's."
    return (
        f"Mean over seeds and paired difference to {ablated.baseline.name}, t intervals in brackets (level {level}); "
        f"{'higher' if ablated.maximize else 'lower'} is better; {_correction(ablated)}; "
        f"d_z: mean of the paired differences over their standard deviation; shows from: the smallest difference that "
        f"these seeds find with power {analysis.power:g}"
        + (f"; smallest effect worth claiming {metric_text(ablated.metric, effect)}" if effect is not None else "")
        + f". {best}"
    )


def _correction(ablated: Ablated) -> str:
    said = CORRECTIONS[ablated.ablation.analysis.correction]
    if ablated.ablation.looks is None:
        return said
    first, last = ablated.ablation.looks
    return f"seeds were added until arms were decided, {first} to {last}: p and intervals sequential, {said}"


def remarks(ablated: Ablated, arm: Arm) -> list[str]:
    """What a reader has to know of one arm: how it was tuned, what failed, what its seeds cannot show."""
    said = _tuning(ablated, arm)
    verdict = arm.verdict
    if verdict is not None and verdict.verdict == "underpowered":
        few = verdict.seeds < 2
        said.append(
            "Underpowered: fewer than two seeds in common with the baseline."
            if few
            else "Underpowered: nothing was shown, and these seeds may miss a difference worth claiming."
        )
    failed = ablated.failed(arm.name)
    said += [f"Seed {seed} {trial.state}: {_short(trial.reason)}" for seed, trial in sorted(failed.items())]
    left = ablated.planned(arm) - len(arm.cells) - len(failed)
    return said + ([f"{left} cells have not ended yet."] if left > 0 else [])


def _tuning(ablated: Ablated, arm: Arm) -> list[str]:
    """Whether an arm was tuned as the others were, and whether its best value lies at the grid's end."""
    grid = ablated.ablation.tune
    if not grid:
        return []
    trials = [t for t in ablated.results.having("complete") if t.role == "tune" and t.label == arm.name]
    if not trials:
        return ["Not tuned: no tuning trial of this arm is complete."]
    said = []
    train: dict[str, Any] = next(iter(arm.cells.values())).spec.get("train", {}) if arm.cells else {}
    for key in ("lr", "weight_decay"):
        options, taken = sorted(grid.get(key) or []), train.get(key)
        if len(options) > 1 and taken in (options[0], options[-1]):
            end = "smallest" if taken == options[0] else "largest"
            said.append(f"Tuned to the {end} {key} of the grid, {taken:g}: the best may lie outside.")
    return said


def _short(text: str, longest: int = 120) -> str:
    line = " ".join(text.split())
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def cost_table(ablated: Ablated) -> Table:
    """Per arm: what it costs, means over seeds, and relative to the baseline."""
    shown = [(m, title) for m, title in COSTS if any(arm.mean(m) is not None for arm in ablated.arms)]
    rows = tuple(
        (str(arm.number), arm.name, *(_cost(ablated, arm, metric) for metric, _ in shown)) for arm in ablated.arms
    )
    note = f"Means over seeds; in brackets the difference to {ablated.baseline.name}."
    if any(cell.tags.get("sharing", "1") != "1" for arm in ablated.arms for cell in arm.cells.values()):
        note += " Runs shared their device while they were timed: compare speeds by `dense-lab overhead`."
    columns = ("#", "arm", *(title for _, title in shown))
    return Table("Costs", columns, rows, note, name="costs", left=2)


def _cost(ablated: Ablated, arm: Arm, metric: str) -> str:
    value, base = arm.mean(metric), ablated.baseline.mean(metric)
    if value is None:
        return "–"
    if arm is ablated.baseline or not base:
        return human(value)
    change = value / base - 1
    return f"{human(value)} ({_minus(f'{change:+.1%}') if abs(change) >= 5e-4 else '='})"


def arm_table(ablated: Ablated) -> Table:
    """What each arm changes in the study, and what its tuning chose."""
    tuned = [key for key in ("lr", "weight_decay") if (ablated.ablation.tune or {}).get(key)]
    rows = tuple((str(arm.number), arm.name, _changes(ablated, arm), *_chosen(arm, tuned)) for arm in ablated.arms)
    return Table("Arms", ("#", "arm", "changes", *tuned), rows, name="arms", left=3)


def _changes(ablated: Ablated, arm: Arm) -> str:
    changes = ablated.ablation.arms.get(arm.name, {})
    return ", ".join(f"{path} = {value_text(value)}" for path, value in changes.items()) or "the study as written"


def _chosen(arm: Arm, keys: list[str]) -> list[str]:
    train: dict[str, Any] = next(iter(arm.cells.values())).spec.get("train", {}) if arm.cells else {}
    return [f"{train[key]:g}" if key in train else "–" for key in keys]


def overhead_table(ablated: Ablated) -> Table:
    """What each dense arm costs against its own twin without dense connections, at equal widths."""
    rows = ablated.overhead
    kinds = list(dict.fromkeys(str(row["metric"]) for row in rows))
    found = {(row["arm"], row["twin"], row["metric"]): row for row in rows}
    body = tuple(
        (arm, twin, *(_ratio(found.get((arm, twin, kind))) for kind in kinds))
        for arm, twin in dict.fromkeys((str(row["arm"]), str(row["twin"])) for row in rows)
    )
    conditions: dict[str, list[str]] = {}
    for row in rows:
        if row["metric"] in SPEEDS and SPEEDS[row["metric"]] not in conditions.setdefault(_conditions(row), []):
            conditions[_conditions(row)].append(SPEEDS[row["metric"]])
    timed = "; ".join(f"{' and '.join(kind)}: {how}" for how, kind in conditions.items())
    note = (
        "Change against the same model without dense connections, at equal widths; speeds as the median over "
        f"interleaved rounds, in brackets the 10th and the 90th percentile of single rounds. {timed}"
    )
    heads = {**dict(COSTS), **SPEEDS}
    columns = ("arm", "twin", *(heads.get(kind, kind) for kind in kinds))
    return Table("Overhead of the dense connections", columns, body, note, name="overhead", left=2)


def _conditions(row: dict[str, Any]) -> str:
    words = [str(row[key]) for key in ("device", "dtype") if row.get(key)]
    return ", ".join([*words, *(f"{key} {row[key]}" for key in ("batch", "seq_len", "rounds") if row.get(key))])


def _ratio(row: dict[str, Any] | None) -> str:
    if row is None or row.get("ratio") is None:
        return "–"
    low, high = row.get("low"), row.get("high")
    text = _minus(f"{row['ratio'] - 1:+.1%}")
    if low is None or high is None or low == high:
        return text
    return f"{text} [{_minus(f'{low - 1:+.1%}')}, {_minus(f'{high - 1:+.1%}')}]"


def interaction_table(ablated: Ablated, grids: list[Grid]) -> Table:
    """By how much the effect of one factor differs between the levels of another."""
    metric = ablated.metric
    rows = tuple(
        (
            f"{grid.column} = {item.column}, {grid.row} = {item.row}",
            signed(metric, item.verdict.difference),
            interval(metric, item.verdict.t_interval, signed),
            p_text(item.verdict.p),
        )
        for grid in grids
        for item in grid.interactions()
    )
    note = (
        "How much more the first change does together with the second than without it, paired by seed; "
        "t interval and p, neither adjusted for the number of rows."
    )
    columns = ("changes", "interaction", "interval", "p")
    return Table("Interactions", columns, rows, note, name="interactions")


def signed(metric: str, value: float) -> str:
    """A difference: with its sign, zero without one."""
    if not math.isfinite(value):
        return "–"
    text = metric_text(metric, abs(value))
    if value == 0 or float(f"{value:.4f}" if "/" in metric else value) == 0:
        return text
    return ("+" if value > 0 else "−") + text


def interval(metric: str, ends: tuple[float, float], text: Callable[[str, float], str] = metric_text) -> str:
    """`[low, high]`; empty when there is none."""
    if not all(map(math.isfinite, ends)):
        return ""
    return f"[{text(metric, ends[0])}, {text(metric, ends[1])}]"


def p_text(p: float) -> str:
    """Three decimals."""
    if not math.isfinite(p):
        return "–"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _plain(value: float) -> str:
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return _minus(f"{value:+.2f}") if math.isfinite(value) else "–"


def _minus(text: str) -> str:
    return text.replace("-", "−")
