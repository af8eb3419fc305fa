"""`dense-lab plan`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dense_lab.cli import options

if TYPE_CHECKING:
    from dense_lab.planning import Plan, Row

WIDE = 110
"""Columns of a terminal from which parameters are shown by part."""


@click.command("plan")
@options.study_argument
@options.overrides
@options.device
@options.runs
@options.as_json
@options.nothing_collected()
def command(study: Path, overrides: tuple[str, ...], device: str, runs: Path, as_json: bool) -> None:
    """What STUDY.yaml is about to do: arms, solved sizes, cost, doubts. Trains nothing.

    Of a search, few points that between them meet every option. Times come from finished runs in the study's folder
    where there are any.
    """
    from dense_lab.planning import plan
    from dense_lab.search import data
    from dense_lab.speeds import corpus

    loaded = options.load_study(study, overrides, runs)
    data.prepare(loaded, corpus)
    found = plan(loaded, runs / loaded.name, device)
    if as_json:
        options.print_json(found.as_json())
        return
    _print(found)


def _print(plan: Plan) -> None:
    from dense_lab.cli.live import duration
    from dense_lab.units import counted, human

    console = options.console()
    columns: dict[str, tuple[int, Callable[[Row], str]]] = {
        "arm": (0, lambda row: row.name),
        "width": (0, lambda row: f"{row.width}" + (f"/{row.ffn_width}" if row.ffn_width else "")),
        "size": (0, lambda row: human(row.non_embedding)),
        "total": (90, lambda row: human(row.total)),
        **{part: (WIDE, functools.partial(_part, part)) for part in ("core", "dense", "ffn", "embedding")},
        "FLOPs": (0, lambda row: human(row.flops_per_token)),
        "state": (0, lambda row: human(row.state_bytes)),
        "runs": (70, lambda row: f"{row.cells}" + (f"+{row.tuning}" if row.tuning else "")),
        "tokens": (90, lambda row: human(row.tokens)),
        "time": (0, lambda row: duration(row.seconds)),
    }
    shown = {name: cell for name, (least, cell) in columns.items() if console.width >= least}
    title = f"{plan.name}: {counted(plan.runs, 'run')} on {plan.device}"
    cells = ([cell(row) for cell in shown.values()] for row in plan.rows)
    options.print_table(title, list(shown), cells, right=list(shown)[1:])
    console.print("size: parameters outside embedding and head; FLOPs: per token, forward; state: bytes of a sequence")
    console.print(f"{human(plan.tokens)} tokens; {duration(plan.seconds)} one run after the other")
    console.print(f"times {plan.how}")
    for core, ran in plan.implementations.items():
        named = ", ".join(f"{operation} by {name}" for operation, name in ran.items())
        console.print(f"{core}: {named or 'not tried, for want of time'}")
    for warning in plan.warnings:
        console.print(f"[yellow]warning[/]: {warning}")


def _part(part: str, row: Row) -> str:
    from dense_lab.units import human

    return human(row.parameters[part])
