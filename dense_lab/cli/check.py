"""`dense-lab check`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dense_lab.cli import options

if TYPE_CHECKING:
    from dense_lab.space import Study


@click.command("check")
@options.study_argument
@options.overrides
@options.as_json
def command(study: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Say whether STUDY.yaml is valid, and if not, where and why.

    Every option of every choice is checked, every architecture is sized without being allocated, and data that is on
    this machine is prepared.
    """
    from dense_lab.errors import InputError
    from dense_lab.search import data

    problems = []
    try:
        loaded = options.load_study(study, overrides)
        loaded.check_sizes()
        data.prepare(loaded, lambda source: source.prepare_here())
        options.look_at_outsiders(loaded)
    except InputError as error:
        if not as_json:
            raise
        problems = [{"where": p.where, "path": p.path, "message": p.message} for p in error.problems]
    if as_json:
        options.print_json({"study": str(study), "valid": not problems, "problems": problems})
    else:
        options.console().print(f"{study}: ok, {_what(loaded)}")
    if problems:
        raise click.exceptions.Exit(2)


def _what(study: Study) -> str:
    """How much there is of it."""
    from dense_lab.units import counted

    size = study.size()
    if study.ablation:
        return f"{counted(len(study.arms()), 'arm')}, {counted(size or 0, 'cell')}"
    points = "1 run" if not study.space else counted(size, "point") if size else "a continuous space"
    return f"{counted(len(study.space), 'open value')}, {points}"
