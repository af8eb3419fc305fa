"""Options that several commands share, and how they print."""

from __future__ import annotations

import contextlib
import gc
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from dense_lab.errors import InputError, Problem

if TYPE_CHECKING:
    from rich.console import Console

    from dense_lab.results import StudyResults
    from dense_lab.space import Study
    from dense_lab.study import RunSpec

F = TypeVar("F", bound=Callable[..., Any])
RUNS, RUNS_VARIABLE = Path("runs"), "DENSE_LAB_RUNS"

study_argument = click.argument("study", type=click.Path(path_type=Path), metavar="STUDY.yaml")
overrides = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="PATH=VALUE",
    help="Override one value of the study, such as `--set train.tokens=500k`. May be given several times.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
runs = click.option(
    "--runs",
    type=click.Path(path_type=Path, file_okay=False),
    default=RUNS,
    envvar=RUNS_VARIABLE,
    show_default=True,
    help="Folder that holds one folder for each study. Also $DENSE_LAB_RUNS.",
)
allow_unverified = click.option(
    "--allow-unverified",
    "allow",
    flag_value="unverified",
    default="verified",
    help="Use operations that `dense-lab verify` finds wrong on this machine, and mark the results.",
)
device = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")


@contextlib.contextmanager
def nothing_collected() -> Iterator[None]:
    """For a command that makes much, drops little and ends: Python's collector would look through all of torch again
    and again, for a seventh of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def load_study(path: Path, overrides: Sequence[str], runs: Path | None = None) -> Study:
    """The study of a YAML file with `--set` overrides applied.

    Raises InputError, which tells of a loose plugin that the study in `runs` (as of the option) was begun with.
    """
    from dense_lab import registry
    from dense_lab.loose import missing
    from dense_lab.runs import SINGLE
    from dense_lab.space import Study
    from dense_lab.space_set import split_override

    changed = [split_override(text) for text in overrides]
    try:
        return Study.load(path, changed)
    except InputError as error:
        name = dict(changed).get("name") or _name(path)
        folder = (runs or Path(os.environ.get(RUNS_VARIABLE) or RUNS)) / name
        hint = missing(registry.default(), folder, folder / SINGLE)
        raise InputError([*error.problems, *([Problem(hint)] if hint else [])]) from None


def study_folder(study: Path, runs: Path) -> Path:
    """The folder of a study given by name, by its YAML file, or by its folder; raises InputError when there is none."""
    if study.is_dir() and (study / "manifest.json").exists():
        return study
    name = _name(study)
    folder = runs / name
    if not (folder / "manifest.json").exists():
        known = sorted(p.parent.name for p in runs.glob("*/manifest.json"))
        listed = f" Studies there: {', '.join(known)}" if known else ""
        raise InputError(f"no study {name!r} in {runs}: `dense-lab search` starts one.{listed}")
    return folder


def _name(study: Path) -> str:
    """Of a study by its name, folder or file, whether what the file says is valid or not."""
    from dense_lab import yaml_file

    if study.suffix not in {".yaml", ".yml"}:
        return study.name
    return str(yaml_file.load(study).tree.get("name", study.stem)) if study.exists() else study.stem


def study_or_run(study: Path, runs: Path) -> StudyResults:
    """A study, or a single run, given by name, by its YAML file, or by its folder; raises InputError."""
    from dense_lab.results import read_study
    from dense_lab.runs import is_run, read_run

    folder = study_or_run_folder(study, runs)
    return read_run(folder) if is_run(folder) else read_study(folder)


def study_or_run_folder(study: Path, runs: Path) -> Path:
    """The folder of a study or of a single run, given by name, by its YAML file, or by its folder; raises
    InputError."""
    from dense_lab.runs import SINGLE, is_run

    below = runs / _name(study)
    for folder in (study, study / SINGLE, below, below / SINGLE):
        if (folder / "manifest.json").exists() or is_run(folder):
            return folder
    return study_folder(study, runs)


def console() -> Console:
    """Where text goes; a pipe or a file has no edge to wrap at, so it is given a wide one."""
    import sys

    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def judge_kernels(runs: Iterable[RunSpec], device: str, allow: Literal["verified", "unverified"]) -> None:
    """Judge the operations that the runs use, unless that is remembered; raises KernelError."""
    import time

    from dense_lab.verification import ensure

    begin = time.perf_counter()
    found = ensure(runs, device, allow)
    seconds = time.perf_counter() - begin
    if seconds > 1:
        click.echo(f"kernels judged on this machine in {seconds:.0f} s, remembered from now on: {found}", err=True)


def look_at_outsiders(study: Study) -> None:
    """Try the combinations of components that are not built in; raises InputError for one whose output foresees."""
    from dense_lab.outsiders import look

    for sentence in look((study.point(point).model for point in study.points()), study.registry):
        click.echo(sentence, err=True)


def print_json(value: Any) -> None:
    """`value` as indented JSON on standard output."""
    click.echo(json.dumps(value, indent=2, default=str))


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    right: Sequence[str] = (),
    spare: Sequence[str] = (),
) -> None:
    """A table; columns named in `right` are right-aligned and hold numbers, which are not broken.

    Where that is too wide for the terminal, the columns in `spare` are left out, the first one first, and named below.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    texts = [[str(cell) for cell in row] for row in rows]
    least = {name: _least(name, [row[i] for row in texts], right) for i, name in enumerate(columns)}
    wide, left_out = console(), list[str]()
    for name in spare:
        if sum(least[kept] + 3 for kept in columns if kept not in left_out) + 4 > wide.width and name in least:
            left_out.append(name)
    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left")
    for name in columns:
        if name not in left_out:
            justify: Literal["left", "right"] = "right" if name in right else "left"
            table.add_column(name, justify=justify, overflow="fold", min_width=least[name])
    for row in texts:
        table.add_row(*(escape(cell) for name, cell in zip(columns, row, strict=True) if name not in left_out))
    wide.print(table)
    if left_out:
        wide.print(f"too narrow for: {', '.join(left_out)}", style="dim", markup=False)


_LONG = 20
"""Words of more characters may be broken, but for numbers."""


def _least(name: str, cells: Sequence[str], right: Sequence[str]) -> int:
    """Width below which a number would be broken, or a word that is no path."""
    longest = max((len(word) for text in (name, *cells) for word in text.split()), default=1)
    return longest if name in right else min(longest, _LONG)
