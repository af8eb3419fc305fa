"""What the report says in numbers: leaderboard, effect of each choice, importance of each parameter."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any, NamedTuple

from dense_lab.files import read_json
from dense_lab.report.table import Table
from dense_lab.results import StudyResults, TrialView
from dense_lab.units import human

COSTS = ("tokens_per_second", "parameters", "state_bytes", "flops_per_token")
"""Shown beside the objectives."""
RECORDED = (
    *("commit", "dense_lab", "code", "device", "dtype", "data", "seed", "plugins", "implementations"),
    *("kernels.verified", "torch", "triton", "python"),
)
"""Tags of a trial that say where its numbers come from."""
FEWEST = 4
"""Complete trials below which importance is not computed: a forest of three points says nothing."""


def metric_text(name: str, value: float | None) -> str:
    """Losses with four decimals, counts in three digits."""
    if value is None:
        return ""
    return f"{value:.4f}" if "/" in name else human(value)


def leaderboard(results: StudyResults) -> Table:
    """Complete trials, best first."""
    goals = [goal.metric for goal in results.goals]
    measured = {name for trial in results.having("complete") for name in trial.metrics}
    shown = [*goals, *(m for m in ("test/loss", "valid/accuracy", *COSTS) if m in measured and m not in goals)]
    paths = sorted({path for trial in results.trials for path in trial.params})
    rows = tuple(
        (
            str(place),
            str(trial.number),
            *(metric_text(m, trial.metrics.get(m)) for m in shown),
            *(_param(trial.params.get(path)) for path in paths),
        )
        for place, trial in enumerate(results.ranked(), 1)
    )
    columns = ("#", "trial", *shown, *(path.removeprefix("model.") for path in paths))
    return Table("Leaderboard", columns, rows, name="leaderboard", left=0)


def effects(results: StudyResults) -> Table:
    """For each option of each choice: the objective's best, median and number of trials that took it."""
    metric = results.goals[0].metric
    groups = by_option(results)
    sign = 1 if results.goals[0].direction == "minimize" else -1
    rows = []
    for path, options in groups.items():
        for option, trials in sorted(options.items()):
            values = sorted(sign * t.metrics[metric] for t in trials)
            best, median = sign * values[0], sign * statistics.median(values)
            rows.append((path, option, str(len(trials)), metric_text(metric, best), metric_text(metric, median)))
    note = (
        "Trials of a search are not paired: other choices differ between the rows, and a sampler favours what it likes."
    )
    columns = ("choice", "option", "trials", f"best {metric}", f"median {metric}")
    return Table("Effect of each choice", columns, tuple(rows), note, name="effects", left=2)


def by_option(results: StudyResults) -> dict[str, dict[str, list[TrialView]]]:
    """Complete trials by path and option, for every parameter whose values are few names or numbers."""
    groups: dict[str, dict[str, list[TrialView]]] = defaultdict(lambda: defaultdict(list))
    for trial in results.ranked():
        for path, value in trial.params.items():
            if not isinstance(value, float):
                groups[path][str(value)].append(trial)
    return {path: dict(options) for path, options in sorted(groups.items()) if len(options) > 1}


class Share(NamedTuple):
    """Of the objective's variance, what a parameter explains by itself."""

    value: float
    trials: int
    """Among these: the trials that have the parameter."""


def importance(results: StudyResults) -> dict[str, Share]:
    """The share of each parameter, largest first (fANOVA, Hutter et al. 2014); those of too few trials are left out.

    A parameter that only some trials have (it belongs to one branch) is judged among those alone: over all trials, its
    absence would stand for the branch and take the credit for it. One that nothing else varies with there is left out.
    """
    trials = results.ranked()
    having: dict[frozenset[int], list[str]] = defaultdict(list)
    for path in sorted({path for trial in trials for path in trial.params}):
        having[frozenset(trial.number for trial in trials if path in trial.params)].append(path)
    found = {}
    for numbers, paths in having.items():
        mine = [trial for trial in trials if trial.number in numbers]
        shares = _shares(mine, results.goals[0].metric) if len(mine) >= FEWEST else {}
        if len(shares) == 1 and len(mine) < len(trials):
            continue  # By itself it explains all that a forest explains, noise too.
        found.update({path: Share(shares[path], len(mine)) for path in paths if path in shares})
    return dict(sorted(found.items(), key=lambda item: -item[1].value))


def _shares(trials: list[TrialView], metric: str) -> dict[str, float]:
    """Of the parameters that all of these trials have and that differ among them."""
    common = sorted(set.intersection(*(set(trial.params) for trial in trials)))
    varied = [path for path in common if len({repr(trial.params[path]) for trial in trials}) > 1]
    if not varied or len({t.metrics[metric] for t in trials}) < 2:
        return {}
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {path: _distribution([trial.params[path] for trial in trials]) for path in varied}
    study = optuna.create_study()
    for trial in trials:
        params = {path: _present(trial.params[path], space[path]) for path in varied}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=space, value=trial.metrics[metric]))
    # Not by `get_param_importances`, which brings the sum to 1: what stands alone would explain everything.
    return optuna.importance.FanovaImportanceEvaluator(seed=0).evaluate(study)


def _distribution(values: list[Any]) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if all(isinstance(value, float) for value in values):
        return FloatDistribution(min(values), max(values))
    return CategoricalDistribution(sorted({str(v) for v in values}))


def _present(value: Any, distribution: Any) -> Any:
    return value if hasattr(distribution, "low") else str(value)


def _param(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def troubles(results: StudyResults) -> Table:
    """Trials that were pruned or failed, and why."""
    rows = tuple((str(t.number), t.state, t.reason) for t in results.having("failed", "pruned", "interrupted"))
    return Table("Pruned, failed and interrupted trials", ("trial", "state", "why"), rows, name="troubles", left=3)


def _natural(text: str) -> tuple[int, str]:
    """Whole numbers by size, anything else by letter."""
    return (int(text), "") if text.isdecimal() else (0, text)


def provenance(results: StudyResults) -> Table:
    """What a reader needs to repeat the study."""
    trials = results.having("complete") if results.kind == "study" else results.trials
    rows = [(results.kind, results.name), ("digest", results.digest)]
    if results.ablation is None and results.kind == "study":
        rows += [("search", ", ".join(f"{k} {v}" for k, v in results.search.items() if k != "objective"))]
        rows += [("objective", ", ".join(f"{g.direction} {g.metric}" for g in results.goals))]
    found = {name: sorted({t.tags[name] for t in trials if name in t.tags}, key=_natural) for name in RECORDED}
    if not found["dense_lab"] and "dense_lab" in results.manifest:
        found["dense_lab"] = [str(results.manifest["dense_lab"])]
    dates = [time for t in trials for time in (t.started, t.ended) if time]
    found["date"] = [f"{min(dates):%Y-%m-%d %H:%M} to {max(dates):%Y-%m-%d %H:%M} UTC"] if dates else []
    rows += [(name.replace("_", "-"), "; ".join(values)) for name, values in found.items() if values]
    again = [read_json(path) for path in sorted(results.folder.glob("reproduced/*/reproduce.json"))]
    for said in again:
        sentences = filter(None, (said.get("summary"), said.get("caution")))
        rows.append(("trained again", f"{said.get('date', '')}: {'. '.join(sentences)}"))
    return Table("Provenance", ("what", "value"), tuple(rows), name="provenance", left=2)
