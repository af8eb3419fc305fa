"""`dense-lab report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dense_lab.cli import options

if TYPE_CHECKING:
    from dense_lab.report.section import Section
    from dense_lab.report.table import Table


@click.command("report")
@click.argument("studies", type=click.Path(path_type=Path), metavar="STUDY...", nargs=-1, required=True)
@options.runs
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder to write into [of one study its own `report`, of several `report` in the folder of --runs].",
)
@click.option("--top", default=10, show_default=True, help="How many trials of a search's leaderboard to print.")
@options.as_json
def command(studies: tuple[Path, ...], runs: Path, out: Path | None, top: int, as_json: bool) -> None:
    """Verdicts, tables and plots of STUDY (a name, a folder or its YAML file), as HTML, Markdown, LaTeX and CSV.

    Of a single run: its curve, what was measured, its settings, and where the numbers come from. Several studies make
    one report, each with a section of its own. The LaTeX compiles as it is (`pdflatex report.tex`); each table also
    stands in a file of its own for a paper, and needs booktabs and graphicx.
    """
    from dense_lab.cli.status import print_leaderboard
    from dense_lab.report import write_report

    found = [options.study_or_run(study, runs) for study in studies]
    files = write_report(found, out or (runs / "report" if len(found) > 1 else None))
    if as_json:
        options.print_json(
            {
                **{key: str(getattr(files, key)) for key in ("page", "markdown", "latex")},
                "files": [str(path) for path in files.others],
                "studies": [_as_dict(one) for one in files.sections],
            }
        )
        return
    for one in files.sections:
        for line in one.lead:
            options.console().print(line, markup=False)
        if one.ablated is None and one.results.kind == "study":
            print_leaderboard(one.results, top)
        else:
            _print(one.head[0])
    options.console().print(f"report: {files.page}", soft_wrap=True)


def _as_dict(one: Section) -> dict[str, object]:
    comparison = one.ablated.comparison if one.ablated else None
    said = {"name": one.results.name, "summary": one.lead[0], "certificate": one.certificate}
    return {**said, "comparison": comparison.as_json() if comparison else None}


SPARE = ("shows from", "d_z", "p", "peak memory, bytes", "FLOPs/token", "tokens/s")
"""Columns that a narrow terminal does without; the files have them."""


def _print(table: Table) -> None:
    from rich.markup import escape

    from dense_lab.report.table import Cell, cell

    def text(one: Cell) -> str:
        return escape(one.text) + "".join(f" ({mark})" for mark in one.marks)

    rows = [[text(cell(value)) for value in row] for row in table.rows]
    options.print_table(table.title, table.columns, rows, right=table.columns[table.left :], spare=SPARE)
    for mark, said in table.footnotes:
        options.console().print(f"({mark}) {said}", markup=False)
