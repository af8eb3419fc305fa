"""What the report says of one study, whatever form it is then written in."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field
from typing import Any

from dense_lab.report import plots, tables
from dense_lab.report.ablated import Ablated, gather
from dense_lab.report.drawing import Picture
from dense_lab.report.table import Cell, Table
from dense_lab.results import StudyResults, TrialView

KINDS = ("better", "worse", "no difference shown", "underpowered")
"""Verdicts, in the order in which they are summed up."""
LISTED = 6
"""Arms of one verdict that a sentence names; of more it says the number."""


@dataclass(frozen=True)
class Section:
    """One study."""

    results: StudyResults
    lead: tuple[str, ...]
    """Sentences: what was found, how far the study is, whether it is fair."""
    head: tuple[Table, ...]
    """Tables before the pictures."""
    pictures: tuple[Picture, ...]
    tail: tuple[Table, ...]
    """Tables behind the pictures."""
    data: dict[str, str] = field(default_factory=dict)
    """Files for other programs, by name: numbers in full."""
    certificate: Any = None
    """As JSON; None for a search."""
    ablated: Ablated | None = None

    @property
    def tables(self) -> tuple[Table, ...]:
        """All of them."""
        return (*self.head, *self.tail)


def section(results: StudyResults) -> Section:
    """The section of a study, which is an ablation or a search, or of a single run."""
    if results.kind == "run":
        from dense_lab.report.single import run_section

        return run_section(results)
    ablated = gather(results)
    return _search(results) if ablated is None else _ablation(ablated)


def _search(results: StudyResults) -> Section:
    from dense_lab.report.table import comma_separated

    board = tables.leaderboard(results)
    return Section(
        results,
        (search_summary(results),),
        _filled(board),
        tuple(plots.pictures(results)),
        _filled(tables.effects(results), tables.troubles(results), tables.provenance(results)),
        {"leaderboard.csv": comma_separated(board)},
    )


def _ablation(ablated: Ablated) -> Section:
    from dense_lab.report import ablation_plots, verdicts
    from dense_lab.report.factors import grids

    results, certificate = ablated.results, ablated.certificate
    found = grids(ablated)
    rest = (verdicts.overhead_table(ablated), verdicts.interaction_table(ablated, found))
    return Section(
        results,
        (ablation_summary(ablated), *([certificate.line()] if certificate else [])),
        (verdicts.verdict_table(ablated), verdicts.cost_table(ablated)),
        tuple(ablation_plots.pictures(ablated, found)),
        _filled(*rest, verdicts.arm_table(ablated), tables.troubles(results), tables.provenance(results)),
        {"arms.csv": _arms_csv(ablated), "cells.csv": _cells_csv(ablated)},
        certificate.as_json() if certificate else None,
        ablated,
    )


def _filled(*found: Table) -> tuple[Table, ...]:
    return tuple(table for table in found if table.rows)


def search_summary(results: StudyResults) -> str:
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


def ablation_summary(ablated: Ablated) -> str:
    """One sentence for each kind of verdict, and how many cells are complete."""
    from dense_lab.report.verdicts import signed

    planned = sum(ablated.planned(arm) for arm in ablated.arms)
    done = sum(len(arm.cells) for arm in ablated.arms)
    cells = f"{done} of {planned} cells complete ({len(ablated.arms)} arms)."
    if ablated.comparison is None:
        return f"{cells} No verdicts: no cell of {ablated.baseline.name}, the baseline, is complete."
    said = []
    for kind in KINDS:
        mine = [f"{a.name} ({signed(ablated.metric, v.difference)})" for a, v in ablated.judged if v.verdict == kind]
        said += [f"{kind}: {', '.join(mine) if len(mine) <= LISTED else f'{len(mine)} arms'}"] if mine else []
    return f"{ablated.metric} against {ablated.baseline.name} - {'; '.join(said) or 'nothing to compare yet'}. {cells}"


def overview(sections: list[Section]) -> Table:
    """A row for each study."""
    rows = [_overview_row(one) for one in sections]
    columns = ("study", "what", "fair", "cells", *KINDS, "largest gain")
    return Table("All studies", columns, tuple(rows), name="overview", left=3)


def _overview_row(one: Section) -> tuple[str | Cell, ...]:
    from dense_lab.report.verdicts import interval, signed

    results, ablated = one.results, one.ablated
    if ablated is None:
        best = results.best
        metric = results.goals[0].metric
        found = f"best {tables.metric_text(metric, best.metrics[metric])}" if best else "–"
        done = f"{len(results.having('complete'))} of {results.total}"
        what = "single run" if results.kind == "run" else "search"
        return (results.name, f"{what}, {metric}", "–", done, *("–" for _ in KINDS), found)
    counts = [str(sum(verdict.verdict == kind for _, verdict in ablated.judged)) for kind in KINDS]
    done = f"{sum(len(a.cells) for a in ablated.arms)} of {sum(ablated.planned(a) for a in ablated.arms)}"
    gains = [(arm, verdict) for arm, verdict in ablated.judged if verdict.verdict == "better"]
    sign = -1 if ablated.maximize else 1
    gain: str | Cell = "none shown"
    if gains:
        arm, verdict = min(gains, key=lambda pair: sign * pair[1].difference)
        ends = interval(ablated.metric, verdict.t_interval, signed)
        gain = f"{arm.name} {signed(ablated.metric, verdict.difference)} {ends}"
    fair = "–" if ablated.certificate is None else "FAIR" if ablated.certificate.fair else "not fair"
    return (results.name, f"{ablated.metric} against {ablated.baseline.name}", fair, done, *counts, gain)


def _arms_csv(ablated: Ablated) -> str:
    """Everything that is known of each arm, numbers in full."""
    from dataclasses import asdict

    rows = []
    for arm in ablated.arms:
        said: dict[str, Any] = {"number": arm.number, "arm": arm.name}
        for name, value in asdict(arm.verdict).items() if arm.verdict else ():
            ends = value if isinstance(value, tuple) else None
            said |= {f"{name}_low": ends[0], f"{name}_high": ends[1]} if ends else {name: value}
        metrics = sorted({name for cell in arm.cells.values() for name in cell.metrics})
        rows.append({**said, **{f"mean {name}": arm.mean(name) for name in metrics}})
    return _csv(rows)


def _cells_csv(ablated: Ablated) -> str:
    """A row for each trial, tuning included."""
    return _csv([_cell_row(trial) for trial in ablated.results.trials])


def _cell_row(trial: TrialView) -> dict[str, Any]:
    train = trial.spec.get("train", {})
    said = {"trial": trial.number, "role": trial.role, "arm": trial.label, "seed": trial.params.get("seed")}
    tuned = {key: train.get(key) for key in ("lr", "weight_decay")}
    return {**said, "state": trial.state, **tuned, **trial.metrics}


def _csv(rows: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
