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

WIDE = 130
"""Columns of a terminal from which parameters are shown by part."""


@click.command("plan")
@options.study_argument
@options.overrides
@options.device
@options.runs
@options.as_json
def command(study: Path, overrides: tuple[str, ...], device: str, runs: Path, as_json: bool) -> None:
    """What STUDY.yaml is about to do: arms, solved sizes, cost, doubts. Trains nothing.

    Of a search, few points that between them meet every option. Times come from finished runs in the study's folder
    where there are any.
    """
    from dense_lab.planning import plan

    loaded = options.load_study(study, overrides)
    found = plan(loaded, runs / loaded.name, device)
    if as_json:
        options.print_json(found.as_json())
        return
    _print(found)


def _print(plan: Plan) -> None:
    from dense_lab.cli.live import duration
    from dense_lab.units import human

    console = options.console()
    parts = ("core", "dense", "ffn", "embedding") if console.width >= WIDE else ()
    columns: dict[str, Callable[[Row], str]] = {
        "arm": lambda row: row.name,
        "width": lambda row: f"{row.width}" + (f"/{row.ffn_width}" if row.ffn_width else ""),
        "parameters": lambda row: human(row.total),
        "outside embedding": lambda row: human(row.non_embedding),
        **{part: functools.partial(_part, part) for part in parts},
        "FLOPs/token": lambda row: human(row.flops_per_token),
        "state bytes": lambda row: human(row.state_bytes),
        "runs": lambda row: f"{row.cells}" + (f"+{row.tuning}" if row.tuning else ""),
        "tokens": lambda row: human(row.tokens),
        "time": lambda row: duration(row.seconds),
    }
    title = f"{plan.name}: {plan.runs} runs on {plan.device}"
    cells = ([column(row) for column in columns.values()] for row in plan.rows)
    options.print_table(title, list(columns), cells, right=list(columns)[1:])
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
