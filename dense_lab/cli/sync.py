"""`dense-lab sync`."""

from __future__ import annotations

from pathlib import Path

import click

from dense_lab.cli import options


@click.command("sync")
@click.argument("study", type=click.Path(path_type=Path))
@options.runs
@click.option("--mlflow", "uri", help="MLflow tracking URI [the store in the study's folder].")
@options.as_json
def command(study: Path, runs: Path, uri: str | None, as_json: bool) -> None:
    """Send to MLflow what it is missing of STUDY. Safe to run again and again."""
    from dense_lab.tracking import sync

    repaired = sync(options.study_folder(study, runs), uri)
    if as_json:
        options.print_json(repaired)
    else:
        options.console().print(str(repaired))
