"""What MLflow is to say of a study and its trials: a pure function of the study's files, timestamps included."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from dense_lab.results import StudyResults, TrialView

Point = tuple[str, float, int, int]
"""Metric, value, milliseconds since 1970, step."""
_NOT_METRICS = ("step", "tokens", "seconds")
"""Keys of a curve's line that say when, not what; tokens are kept as a metric of their own."""
_UNNAMABLE = re.compile(r"[^/\w.\- :]")
"""What MLflow refuses in names, such as the braces of the label `retnet{heads=2}`."""
PARAMETER_LENGTH = 6000
"""Longest parameter value in characters; MLflow cuts longer ones without a word."""


class Status(NamedTuple):
    """A run's status as MLflow has it, and when it ended."""

    name: str
    ended: int | None


def milliseconds(when: datetime | None) -> int:
    """Since 1970; 0 for an unknown time."""
    return round(when.timestamp() * 1000) if when else 0


def params(trial: TrialView) -> dict[str, str]:
    """Every value of the run by dotted path, sampled or not."""
    found = {path: value for path, value in (trial.values or trial.params).items() if path != "dense_lab"}
    return {path: _text(value)[:PARAMETER_LENGTH] for path, value in found.items()}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def tags(study: StudyResults, trial: TrialView) -> dict[str, str]:
    """What runs are filtered by."""
    plugins = trial.spec.get("plugins") or {}
    found = {
        **trial.tags,
        "role": trial.role or "trial",
        "study": study.name,
        "study_digest": study.digest,
        "trial": str(trial.number),
        "arm": trial.label or " ".join(value for value in trial.params.values() if isinstance(value, str)),
        "seed": str(trial.spec.get("seed", trial.tags.get("seed", ""))),
        "spec": trial.digest or str(trial.spec.get("digest", "")),
        "plugins": ", ".join(f"{key} {value}" for key, value in sorted(plugins.items()))
        or trial.tags.get("plugins", ""),
        "status": trial.state,
        "reason": trial.reason,
        "mlflow.source.name": "dense-lab",
    }
    return {key: str(value)[:5000] for key, value in found.items() if value != ""}


def name(trial: TrialView) -> str:
    """A run's name: the trial's number and what was chosen."""
    chosen = " ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in trial.params.values())
    return f"{trial.number:04d} {trial.label or chosen}".strip()[:250]


def points(trial: TrialView, lines: list[dict[str, float]]) -> list[Point]:
    """The curve's points; a line's time is the trial's start plus its own seconds."""
    start = milliseconds(trial.started)
    found: list[Point] = []
    for line in lines:
        when, step = start + round(1000 * line.get("seconds", 0.0)), int(line.get("step", 0))
        found += [(key, float(value), when, step) for key, value in line.items() if key not in _NOT_METRICS]
        if "tokens" in line:
            found.append(("tokens", float(line["tokens"]), when, step))
    return found


def final_points(trial: TrialView) -> list[Point]:
    """The final metrics that the curve does not end with already."""
    last: dict[str, float] = {}
    for line in trial.curve:
        last |= line
    step, when = int(last.get("step", 0)), milliseconds(trial.ended)
    return [(key, float(value), when, step) for key, value in trial.metrics.items() if last.get(key) != value]


def status(trial: TrialView) -> Status:
    """A pruned trial has FINISHED, as the tag `status` tells; an interrupted one is KILLED until it is resumed."""
    names = {"complete": "FINISHED", "pruned": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
    return Status(names.get(trial.state, "RUNNING"), milliseconds(trial.ended) or None)


def study_tags(study: StudyResults) -> dict[str, str]:
    """Tags of the parent run."""
    goals = ", ".join(f"{goal.direction} {goal.metric}" for goal in study.goals)
    best = study.best
    value = (
        f", best {study.goals[0].metric} {best.metrics[study.goals[0].metric]:.4g} (trial {best.number})"
        if best
        else ""
    )
    return {
        "study": study.name,
        "study_digest": study.digest,
        "objective": goals,
        "mlflow.source.name": "dense-lab",
        "mlflow.note.content": f"{goals}; {len(study.having('complete'))} of {study.total} trials complete{value}.",
    }


def study_points(study: StudyResults) -> list[Point]:
    """The best value of each objective so far over the number of finished trials: the parent run's own curve."""
    ended = sorted(
        (trial for trial in study.having("complete", "pruned", "failed") if trial.ended),
        key=lambda t: t.ended or datetime.min,
    )
    found: list[Point] = []
    for goal in study.goals:
        best: float | None = None
        for count, trial in enumerate(ended, 1):
            value = trial.metrics.get(goal.metric)
            if trial.state == "complete" and value is not None and (best is None or goal.better(value, best)):
                best = value
                found.append((f"best/{goal.metric}", best, milliseconds(trial.ended), count))
    return found


def artifacts(folder: Path) -> list[Path]:
    """The files of a trial that are worth keeping beside its run."""
    return [path for name in ("spec.json", "result.json", "traceback.txt") if (path := folder / name).is_file()]
