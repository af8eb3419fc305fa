"""`dense-lab power`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dense_lab.cli import options

if TYPE_CHECKING:
    from dense_lab.pilot import Cost, PowerPlan


@click.command("power")
@click.argument("study", type=click.Path(path_type=Path))
@click.option(
    "--effect",
    type=click.FloatRange(0, min_open=True),
    help="Smallest difference worth claiming, in the unit of the study's metric [analysis.smallest_effect].",
)
@click.option(
    "--power", type=click.FloatRange(0, 1, min_open=True, max_open=True), help="Chance of showing it [analysis.power]."
)
@options.runs
@options.as_json
def command(study: Path, effect: float | None, power: float | None, runs: Path, as_json: bool) -> None:
    """How many seeds STUDY (a name, a folder or its YAML file) needs, by the scatter of the cells that it has."""
    from dense_lab.pilot import plan
    from dense_lab.results import read_study

    results = read_study(options.study_folder(study, runs))
    found = plan(results, effect, power)
    if as_json:
        options.print_json(found.as_json())
        return
    console = options.console()
    console.print(_asked(results.name, found), markup=False)
    _table(found)
    for line in _answers(found):
        console.print(line, markup=False, soft_wrap=True)


def _asked(name: str, plan: PowerPlan) -> str:
    arms = "an arm" if plan.comparisons == 1 else f"{plan.comparisons} arms"
    how = f"power {plan.power:g}, alpha {plan.alpha:g}, {arms} against {plan.baseline}"
    how += f" by {plan.correction}" if plan.comparisons > 1 else ""
    return f"{name}: seeds to show a difference of {plan.effect:g} in {plan.metric} ({how})"


def _table(plan: PowerPlan) -> None:
    columns = ["arm", "pairs", "scatter", "at most", "seeds", "seeds at most", "detectable now"]
    rows = []
    for arm in plan.arms:
        if arm.needed is None:
            rows.append([arm.arm, arm.pairs, *[""] * 5])
            continue
        one = arm.needed
        rows.append([arm.arm, arm.pairs, *_figures(one.sd, one.sd_upper, one.seeds, one.seeds_upper, arm.detectable)])
    if len(rows) > 1:
        one = plan.needed
        rows.append(["together", "", *_figures(one.sd, one.sd_upper, one.seeds, one.seeds_upper), ""])
    options.print_table("", columns, rows, right=columns[1:])


def _figures(*values: float) -> list[str]:
    return [str(value) if isinstance(value, int) else f"{value:.3g}" for value in values]


def _answers(plan: PowerPlan) -> list[str]:
    needed = plan.needed
    return [
        f"{needed.seeds} seeds of every arm if the scatter is {needed.sd:.3g}, as seen: {_cost(plan.cost)}",
        f"{needed.seeds_upper} if it is {needed.sd_upper:.3g}, which it exceeds after a fifth of such pilots at most: "
        f"{_cost(plan.cost_upper)}",
    ]


def _cost(cost: Cost) -> str:
    if not cost.trials:
        return "they are there"
    return f"{cost.trials} more trials, {cost.hours:.2g} hours of one worker"
