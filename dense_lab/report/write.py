"""Writes report.html, report.md, leaderboard.csv and the plots into the study's folder."""

from __future__ import annotations

import csv
import html
import io
from pathlib import Path
from typing import NamedTuple

from dense_lab.report import tables
from dense_lab.report.plots import all_plots
from dense_lab.report.tables import Table
from dense_lab.results import StudyResults

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.2rem; } .sub { color: #666; margin-top: .2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: left; border-bottom: 1px solid #e5e5e5; white-space: nowrap; }
td.wrap { white-space: normal; overflow-wrap: anywhere; }
th { border-bottom: 2px solid #999; } tbody tr:first-child td { font-weight: 600; }
table.plain tbody tr:first-child td { font-weight: inherit; }
figure { margin: 0; } figcaption { color: #666; font-size: 13px; } svg { max-width: 100%; height: auto; }
.plots { display: flex; flex-wrap: wrap; gap: 2rem; }
"""


class ReportFiles(NamedTuple):
    """Where the report went."""

    page: Path
    markdown: Path
    leaderboard: Path
    plots: tuple[Path, ...]


def write_report(results: StudyResults) -> ReportFiles:
    """Write the report of a study as it stands into `<study>/report/`; what there is no data for is left out."""
    folder = results.folder / "report"
    folder.mkdir(exist_ok=True)
    plots = all_plots(results)
    paths = []
    for name, (_, svg) in plots.items():
        path = folder / f"{name}.svg"
        path.write_text('<?xml version="1.0" encoding="utf-8"?>\n' + svg)
        paths.append(path)
    shown = [table for table in (tables.leaderboard(results), tables.effects(results)) if table.rows]
    rest = [table for table in (tables.troubles(results), tables.provenance(results)) if table.rows]
    page, markdown, leaderboard = folder / "report.html", folder / "report.md", folder / "leaderboard.csv"
    page.write_text(_page(results, shown, rest, plots))
    markdown.write_text(_markdown(results, [*shown, *rest], plots))
    leaderboard.write_text(_csv(tables.leaderboard(results)))
    return ReportFiles(page, markdown, leaderboard, tuple(paths))


def summary(results: StudyResults) -> str:
    """One sentence: how many trials, and the best."""
    done = f"{len(results.having('complete'))} of {results.total} trials complete"
    best = results.best
    if best is None:
        return f"{done}."
    metric = results.goals[0].metric
    what = ", ".join(
        f"{path} = {value:.3g}" if isinstance(value, float) else f"{path} = {value}"
        for path, value in best.params.items()
    )
    return f"{done}. Best {metric}: {tables.metric_text(metric, best.metrics[metric])}, trial {best.number} ({what})."


def _page(results: StudyResults, shown: list[Table], rest: list[Table], plots: dict[str, tuple[str, str]]) -> str:
    figures = "".join(
        f'<figure id="{name}">{svg}<figcaption>{html.escape(caption)}</figcaption></figure>'
        for name, (caption, svg) in plots.items()
    )
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(results.name)} - dense-lab</title><style>{STYLE}</style></head><body>",
        f'<h1>{html.escape(results.name)}</h1><p class="sub">dense-lab study {html.escape(results.digest)}</p>',
        f"<p>{html.escape(summary(results))}</p>",
        _table(shown[0], "") if shown else "",
        f'<h2>Plots</h2><div class="plots">{figures}</div>' if figures else "",
        *(_table(table, "plain") for table in [*shown[1:], *rest]),
        "</body></html>\n",
    ]
    return "".join(parts)


def _table(table: Table, look: str) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    body = "".join(
        "<tr>" + "".join(f"<td{_wrap(cell)}>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    note = f'<p class="sub">{html.escape(table.note)}</p>' if table.note else ""
    return (
        f'<h2>{html.escape(table.title)}</h2>{note}<div class="scroll"><table class="{look}">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _wrap(cell: str) -> str:
    return ' class="wrap"' if len(cell) > 60 else ""


def _markdown(results: StudyResults, shown: list[Table], plots: dict[str, tuple[str, str]]) -> str:
    parts = [f"# {results.name}", summary(results)]
    parts += [f"![{caption}]({name}.svg)" for name, (caption, _) in plots.items()]
    for table in shown:
        lines = [f"| {' | '.join(row)} |" for row in (table.columns, tuple("---" for _ in table.columns))]
        lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in table.rows]
        parts += [f"## {table.title}", *([table.note] if table.note else []), "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _csv(table: Table) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([table.columns, *table.rows])
    return out.getvalue()
