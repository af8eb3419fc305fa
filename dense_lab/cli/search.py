"""`dense-lab search`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from dense_lab.cli import options

if TYPE_CHECKING:
    from dense_lab.search import Outcome
    from dense_lab.space import Study


@click.command("search")
@options.study_argument
@options.overrides
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1), help="Processes that train at once.")
@click.option("--trials", type=click.IntRange(1), help="Trials in all, instead of what the study says.")
@click.option(
    "--reuse",
    multiple=True,
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Folder or name of another "
    "study; finished trials of the very same spec are taken over from it. May be given several times.",
)
@click.option(
    "--until-decided",
    "until",
    flag_value="decided",
    default="seeds",
    help="After the study's seeds, add more to the arms that are undecided.",
)
@click.option(
    "--max-seeds", default=20, show_default=True, type=click.IntRange(2), help="At most, with --until-decided."
)
@options.device
@options.allow_unverified
@options.runs
@click.option("--storage", metavar="URL", help="Database that other machines share [SQLite in the study's folder].")
@click.option("--mlflow", "mlflow_uri", metavar="URI", help="MLflow tracking URI, or `none` [SQLite in the folder].")
@options.as_json
def command(
    study: Path,
    overrides: tuple[str, ...],
    workers: int,
    trials: int | None,
    reuse: tuple[Path, ...],
    until: Literal["decided", "seeds"],
    max_seeds: int,
    device: str,
    allow: Literal["verified", "unverified"],
    runs: Path,
    storage: str | None,
    mlflow_uri: str | None,
    as_json: bool,
) -> None:
    """Run STUDY.yaml, or go on with it: the same command resumes, and a complete study trains nothing.

    Ctrl-C once stops cleanly. A worker that dies loses nothing: its trial is run again.
    """
    loaded = options.load_study(study, overrides, runs)
    loaded.check_sizes()
    from dense_lab.search import search

    options.look_at_outsiders(loaded)
    options.judge_kernels((loaded.point(point) for point in loaded.covering()), device, allow)
    folder = runs / loaded.name
    if (folder / "manifest.json").exists():
        from dense_lab.search.changed import changed

        for text in changed(folder):
            click.secho(f"warning: {text}", fg="yellow", err=True)
    go = functools.partial(
        search,
        loaded,
        folder,
        workers=workers,
        storage=storage,
        device=device,
        trials=trials,
        mlflow_uri=mlflow_uri,
        reuse=[options.study_folder(other, runs) for other in reuse],
        max_seeds=max_seeds if until == "decided" else None,
    )
    _run(go, loaded, folder, workers, reuse, as_json)


def _run(
    go: Callable[..., Outcome], study: Study, folder: Path, workers: int, reuse: tuple[Path, ...], as_json: bool
) -> None:
    from dense_lab.cli.live import Display
    from dense_lab.units import counted

    console = options.console()
    if not as_json:
        console.print(f"{study.name}: {_what(study)}, {counted(workers, 'worker')}, into {folder}")
    with Display(console, study.search.objective[0].metric) as display:
        outcome = go(on_progress=None if as_json else display.update)
    _tell(outcome, folder, as_json)
    if reuse and not as_json:
        taken = sum("reused_from" in trial.tags for trial in outcome.results.trials)
        console.print(f"--reuse: {taken} of {counted(len(outcome.results.trials), 'trial')} taken over")
    if outcome.exit_code:
        raise click.exceptions.Exit(outcome.exit_code)


def _what(study: Study) -> str:
    from dense_lab.units import counted

    if study.ablation is None:
        return counted(len(study.space), "open value")
    tuned = ", each tuned first" if study.ablation.tune else ""
    return f"{counted(len(study.arms()), 'arm')} x {counted(len(study.ablation.spec.seeds), 'seed')}{tuned}"


def _tell(outcome: Outcome, folder: Path, as_json: bool) -> None:
    if as_json:
        told = {"message": outcome.message, "trained": outcome.trained, "stopped": outcome.stopped}
        options.print_json({**told, "mlflow": outcome.mlflow, "folder": str(folder)})
        return
    from dense_lab.cli.status import print_findings

    console = options.console()
    print_findings(outcome.results, top=10)
    for trial in outcome.results.having("failed"):
        console.print(f"trial {trial.number} failed: {trial.reason}", style="red", markup=False)
    console.print(f"{outcome.results.name}: {outcome.message}")
    if outcome.mlflow:
        console.print(outcome.mlflow, style="yellow", markup=False)
    console.print(f"now: dense-lab report {folder}   or: dense-lab ui {folder}", soft_wrap=True)
