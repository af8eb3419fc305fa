"""`dense-lab report`."""

from __future__ import annotations

from pathlib import Path

import click

from dense_lab.cli import options


@click.command("report")
@click.argument("study", type=click.Path(path_type=Path))
@options.runs
@click.option("--top", default=10, show_default=True, help="How many trials of the leaderboard to print.")
@options.as_json
def command(study: Path, runs: Path, top: int, as_json: bool) -> None:
    """Leaderboard, plots and tables of STUDY (a name, a folder or its YAML file), as HTML, Markdown and CSV."""
    from dense_lab.cli.status import print_leaderboard
    from dense_lab.report import write_report
    from dense_lab.report.write import summary
    from dense_lab.results import read_study

    results = read_study(options.study_folder(study, runs))
    files = write_report(results)
    if as_json:
        told = {"page": files.page, "markdown": files.markdown, "leaderboard": files.leaderboard}
        options.print_json({"summary": summary(results), **{k: str(v) for k, v in told.items()}})
        return
    options.console().print(summary(results), markup=False)
    print_leaderboard(results, top)
    options.console().print(f"report: {files.page}", soft_wrap=True)
