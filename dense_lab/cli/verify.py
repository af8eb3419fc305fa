"""`dense-lab verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dense_lab.cli import options

if TYPE_CHECKING:
    from dense_lab.study import RunSpec
    from dense_lab.verdicts import Finding

EVERYTHING = (
    ("model.core", "{choice: installed}"),
    ("model.dense", "{kind: densessm, span: 2, fusion: {choice: installed}}"),
    ("model.ffn", "{choice: installed}"),
    ("data", "{kind: python_source, tokenizer: byte, seq_len: 512}"),
)
"""Overrides of the defaults that between them call every operation."""


@click.command("verify")
@click.argument("study", type=click.Path(path_type=Path), metavar="[STUDY.yaml]", required=False)
@options.overrides
@options.device
@options.as_json
def command(study: Path | None, overrides: tuple[str, ...], device: str, as_json: bool) -> None:
    """Compare every operation that STUDY.yaml would use with a float64 reference, on this machine.

    Results, states and all gradients count: an implementation may be at most twice as far from float64 as the plain
    reference in the same precision. Without a study: every operation, with every installed core. Verdicts are kept;
    `search` and `train` look them up. Exit code 1 when one is wrong.
    """
    from dense_lab.verification import examine

    findings = examine(runs_of(study, overrides), device, "training and decoding")
    findings.sort(key=lambda found: (found.name, found.shapes))
    if as_json:
        from dataclasses import asdict

        options.print_json([asdict(found) for found in findings])
    else:
        _print(findings)
    if not all(found.ok for found in findings):
        raise click.exceptions.Exit(1)


def runs_of(study: Path | None, overrides: tuple[str, ...]) -> list[RunSpec]:
    """Runs that between them meet every option of a study, or, without one, every operation."""
    from dense_lab.space import Study
    from dense_lab.space_set import split_override

    if study is not None:
        loaded = options.load_study(study, overrides)
    else:
        loaded = Study.load(None, [*EVERYTHING, *map(split_override, overrides)])
    return [loaded.point(point) for point in loaded.covering()]


def _print(findings: list[Finding]) -> None:
    columns = ("operation", "by", "judged", "dtype", "batch, length", "shapes", "worst", "of allowed", "verdict")
    rows = (
        (
            found.operation,
            found.implementation,
            found.judged,
            found.dtype,
            found.size,
            found.shapes,
            found.worst,
            "-" if found.used is None else f"{found.used:.2f}",
            "ok" if found.ok else "WRONG",
        )
        for found in findings
    )
    options.print_table("", columns, rows, right=("of allowed",))
    for found in findings:
        if not found.ok:
            options.console().print(f"{found.name}: {found.text}", style="red", markup=False)
    wrong = sum(not found.ok for found in findings)
    told = f"{wrong} of {len(findings)} wrong" if wrong else f"all {len(findings)} right"
    options.console().print(f"{told}, against float64, results, states and gradients")
