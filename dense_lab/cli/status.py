"""`dense-lab status`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from dense_lab.cli import options

if TYPE_CHECKING:
    from dense_lab.results import StudyResults, TrialView


@click.command("status")
@click.argument("study", type=click.Path(path_type=Path), required=False)
@options.runs
@click.option("--top", default=10, show_default=True, help="How many trials of the leaderboard to print.")
@options.as_json
def command(study: Path | None, runs: Path, top: int, as_json: bool) -> None:
    """How STUDY (a name, a folder or its YAML file) is going, also a single run; without one, all that --runs holds."""
    if study is None:
        _all(runs, as_json)
        return
    results = options.study_or_run(study, runs)
    if as_json:
        options.print_json({**_summary(results), "trials": [_as_dict(trial) for trial in results.trials]})
        return
    console = options.console()
    console.print(_sentence(results))
    print_findings(results, top)
    # Of a single run the sentence says it.
    for trial in results.having("failed") if results.kind == "study" else ():
        console.print(f"trial {trial.number} failed: {trial.reason}", style="red", markup=False)


def _all(runs: Path, as_json: bool) -> None:
    from dense_lab.results import read_study
    from dense_lab.runs import read_run, runs_below

    found = [read_study(path.parent) for path in sorted(runs.glob("*/study.json"))]
    found += map(read_run, runs_below(runs))
    if as_json:
        options.print_json([_summary(results) for results in found])
    elif not found:
        options.console().print(f"no studies in {runs}: `dense-lab search STUDY.yaml` starts one, `train` a run")
    else:
        for results in found:
            options.console().print(_sentence(results))


def _summary(results: StudyResults) -> dict[str, Any]:
    from dense_lab.results import State
    from dense_lab.search.progress import arms

    best = results.best
    return {
        "name": results.name,
        "kind": results.kind,
        "folder": str(results.folder),
        "digest": results.digest,
        "total": results.total,
        **{state: len(results.having(state)) for state in get_args(State)},
        "best": _as_dict(best) if best else None,
        **({"arms": [vars(arm) for arm in arms(results)]} if results.ablation else {}),
    }


def _sentence(results: StudyResults) -> str:
    if results.kind == "run":
        from dense_lab.report.single import summary

        return f"{results.name}: a single run, {summary(results.trials[0])}"
    counts = _summary(results)
    states = ", ".join(f"{counts[s]} {s}" for s in ("pruned", "failed", "running", "interrupted") if counts[s])
    text = f"{results.name}: {counts['complete']} of {results.total} trials complete"
    text += f", {states}" if states else ""
    if results.best and not results.ablation:
        metric = results.goals[0].metric
        text += f"; best {metric} {results.best.metrics[metric]:.4f} (trial {results.best.number})"
    return text


def _as_dict(trial: TrialView) -> dict[str, Any]:
    return {
        "number": trial.number,
        "state": trial.state,
        "reason": trial.reason,
        "arm": trial.label,
        "role": trial.role,
        "params": trial.params,
        "metrics": trial.metrics,
        "digest": trial.digest,
        "folder": str(trial.folder) if trial.folder else None,
    }


def print_findings(results: StudyResults, top: int) -> None:
    """The arms of an ablation, or the best trials of a search."""
    if results.ablation is None:
        print_leaderboard(results, top)
        return
    from dense_lab.cli.live import arms_table
    from dense_lab.search.progress import arms

    options.console().print(arms_table(arms(results), results.ablation.analysis.metric))


def print_leaderboard(results: StudyResults, top: int) -> None:
    """The best `top` complete trials by the first objective, with what they cost."""
    from dense_lab.cli.live import short
    from dense_lab.units import human

    goals = [goal.metric for goal in results.goals]
    extra = [m for m in ("tokens_per_second", "parameters", "state_bytes") if m not in goals]
    columns = ["#", "trial", *goals, *extra, "what"]
    rows = [
        [place, trial.number]
        + [f"{trial.metrics[m]:.4f}" if m in trial.metrics else "" for m in goals]
        + [human(trial.metrics[m]) if m in trial.metrics else "" for m in extra]
        + [short(trial)]
        for place, trial in enumerate(results.ranked()[:top], 1)
    ]
    if rows:
        options.print_table("", columns, rows, right=columns[:-1], spare=extra)
    if (number := len(results.ranked())) > len(rows):
        options.console().print(f"the best {len(rows)} of {number} complete trials")
