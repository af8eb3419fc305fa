"""`dense-lab reproduce`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from dense_lab.cli import options

if TYPE_CHECKING:
    from dense_lab.reproduce import Reproduction
    from dense_lab.reproduce.environment import Difference
    from dense_lab.reproduce.recorded import Recorded


@click.command("reproduce")
@click.argument("what", type=click.Path(path_type=Path), metavar="STUDY|FOLDER")
@options.runs
@click.option(
    "--into",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the new runs [`reproduced` in the study's folder].",
)
@click.option("--arms", metavar="A,B", help="Arms to train again [all].")
@click.option("--seeds", metavar="0,1", help="Seeds to train again [all].")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1), help="Processes that train at once.")
@options.device
@click.option(
    "--allow-different-data",
    "other_data",
    flag_value="allowed",
    default="refused",
    help="Go on when the data is not that of the recorded runs.",
)
@options.allow_unverified
@options.as_json
def command(
    what: Path,
    runs: Path,
    into: Path | None,
    arms: str | None,
    seeds: str | None,
    workers: int,
    device: str,
    other_data: Literal["refused", "allowed"],
    allow: Literal["verified", "unverified"],
    as_json: bool,
) -> None:
    """Train recorded runs again from their stored specs, and say whether the numbers come out as recorded.

    STUDY is the name of a study or of a single run, its YAML file or its folder; FOLDER may also be one trial's
    (`runs/NAME/trials/0003`). Started again, it goes on. Exit code 1 when a number is not where the recorded ones say,
    seed by seed or by their spread, when a run on a CPU is not bit for bit though nothing recorded has changed, or
    when one failed.
    """
    from dense_lab.cli.live import Display
    from dense_lab.reproduce import reproduce

    folder = options.study_or_run_folder(what, runs)
    with Display(options.console(), "valid/loss") as display:
        made = reproduce(
            folder,
            into=into,
            arms=_listed(arms),
            seeds=_numbers(seeds),
            device=device,
            workers=workers,
            other_data=other_data,
            kernels=allow,
            on_environment=None if as_json else _tell_environment,
            on_progress=None if as_json else display.update,
        )
    _tell(made, as_json)
    if not made.reproduced:
        raise click.exceptions.Exit(1)


def _listed(text: str | None) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()] if text else []


def _numbers(text: str | None) -> list[int]:
    words = _listed(text)
    if not all(word.isdecimal() for word in words):
        raise click.BadParameter(f"expected numbers such as 0,1, got {text!r}", param_hint="--seeds")
    return [int(word) for word in words]


def _tell_environment(recorded: Recorded, found: list[Difference]) -> None:
    from dense_lab.units import counted

    console = options.console()
    arms, runs = counted(len(recorded.chosen), "arm"), counted(len(recorded.trials), "run")
    console.print(f"{recorded.name}: training {runs} of {arms} again", markup=False)
    for sentence in recorded.left_out:
        console.print(sentence, markup=False)
    for one in found:
        console.print(f"differs: {one}", style="yellow", markup=False)
    if not found:
        console.print("commit, device, libraries, plugins and data are as recorded")


def _tell(made: Reproduction, as_json: bool) -> None:
    if as_json:
        options.print_json({**made.as_json(), "into": str(made.folder)})
        return
    from rich.markup import escape

    def text(value: float | None) -> str:
        return "" if value is None or not math.isfinite(value) else f"{value:.6g}"

    rows = [
        [
            one.kind,
            escape(one.arm),
            "" if one.seed is None else one.seed,
            text(one.recorded),
            text(one.new),
            f"{one.deviation:.2g}" if math.isfinite(one.deviation) else "",
            f"{one.share:.2g}" if math.isfinite(one.share) else "",
            escape(f"[{text(one.interval[0])}, {text(one.interval[1])}]") if math.isfinite(one.interval[0]) else "",
            one.outcome,
        ]
        for one in made.agreements
    ]
    columns = ("of", "arm", "seed", "recorded", "new", "deviation", "of spread", "expected", "outcome")
    options.print_table(made.recorded.metric, columns, rows, right=columns[2:8])
    console = options.console()
    console.print(made.summary(), style="green" if made.reproduced else "red")
    if caution := made.caution():
        console.print(caution, style="yellow", markup=False)
    earlier = "" if made.trained else " (nothing was trained just now: all are of an earlier call)"
    console.print(f"new runs: {made.folder}{earlier}", soft_wrap=True)
