"""What a study has found so far, read from its folder: trials, their parameters, metrics, curves and reasons.

Reading costs a few milliseconds and imports neither torch nor MLflow, so that `status`, the live display and the report
all look at the same thing. Every file is written whole or appended to, so reading while trials run is safe.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from dense_lab.ablation.results import Ablation, read_ablation
from dense_lab.errors import InputError
from dense_lab.files import last_line, read_json, read_lines

State = Literal["complete", "pruned", "failed", "running", "interrupted"]
FINISHED: tuple[State, ...] = ("complete", "pruned", "failed")
"""States that no resumption changes."""
TRIAL_FILE = "trial.json"
"""What the search says of a trial before it is trained: number, parameters, owner."""
TRIALS = "trials"
"""Folder of the trials' folders within a study's folder."""


@dataclass(frozen=True)
class Goal:
    """One objective of a study: the name of a metric, and where it should go."""

    metric: str
    direction: Literal["minimize", "maximize"]

    def better(self, value: float, other: float) -> bool:
        """Whether `value` is strictly better than `other`."""
        return value < other if self.direction == "minimize" else value > other


@dataclass(frozen=True)
class TrialView:
    """One trial as a reader sees it; a trial that was interrupted and run again is one trial."""

    number: int
    state: State
    params: dict[str, Any]
    """Sampled value of each open parameter, by dotted path."""
    metrics: dict[str, float]
    """Final metrics; of a running trial those of its last line."""
    tags: dict[str, str]
    reason: str
    """Why it failed, was pruned or was interrupted."""
    values: dict[str, Any]
    """Every value of the run, sampled or not, by dotted path; empty for what another machine ran."""
    folder: Path | None
    """None when the trial was run on another machine that does not share this folder."""
    label: str = ""
    """The arm's name in an ablation, otherwise empty."""
    role: str = ""
    """In an ablation `cell`, or `tune` for a trial that a learning rate is chosen by."""
    tuned: dict[str, float] = field(default_factory=dict)
    """Of a cell whose arm was tuned: the values chosen, by dotted path."""
    digest: str = ""
    """Of the resolved spec."""
    started: datetime | None = None
    ended: datetime | None = None

    @functools.cached_property
    def spec(self) -> dict[str, Any]:
        """The resolved spec as stored; empty when the trial never got that far."""
        return read_json(self.folder / "spec.json") if self.folder else {}

    @functools.cached_property
    def curve(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl: `step`, `tokens`, `seconds` and metrics."""
        return list(read_lines(self.folder / "metrics.jsonl")) if self.folder else []

    @property
    def seconds(self) -> float | None:
        """Seconds of training, earlier attempts that were continued included."""
        value = self.metrics.get("seconds")
        if value is None and self.started and self.ended:
            value = (self.ended - self.started).total_seconds()
        return value

    @property
    def tokens_planned(self) -> int | None:
        """Training tokens of the whole trial."""
        tokens = self.spec.get("train", {}).get("tokens")
        return int(tokens) if tokens else None


@dataclass(frozen=True)
class StudyResults:
    """A study: what was asked, and its trials by number."""

    name: str
    folder: Path
    digest: str
    """Of the study as it was created."""
    goals: tuple[Goal, ...]
    search: dict[str, Any]
    """The search spec as stored."""
    trials: list[TrialView]
    total: int
    """Trials in all once the study is complete."""
    manifest: dict[str, Any] = field(default_factory=dict)
    ablation: Ablation | None = None
    """The arms that it compares, if it compares some."""
    kind: Literal["study", "run"] = "study"
    """A run belongs to no study, and is the one trial."""

    def having(self, *states: State) -> list[TrialView]:
        """The trials in one of `states`."""
        return [trial for trial in self.trials if trial.state in states]

    @property
    def complete(self) -> bool:
        """Whether every trial that was asked for has finished."""
        return len(self.having(*FINISHED)) >= self.total

    def ranked(self) -> list[TrialView]:
        """Complete trials, best first by the first objective; those that only tune are left out."""
        goal = self.goals[0]
        scored = [t for t in self.having("complete") if goal.metric in t.metrics and t.role != "tune"]
        sign = 1 if goal.direction == "minimize" else -1
        return sorted(scored, key=lambda trial: (sign * trial.metrics[goal.metric], trial.number))

    @property
    def best(self) -> TrialView | None:
        """The best complete trial by the first objective."""
        ranked = self.ranked()
        return ranked[0] if ranked else None

    def pareto(self) -> list[TrialView]:
        """Complete trials that no other beats in one objective without losing in another."""
        scored = [t for t in self.ranked() if all(goal.metric in t.metrics for goal in self.goals)]
        return [t for t in scored if not any(self._dominates(other, t) for other in scored)]

    def _dominates(self, one: TrialView, other: TrialView) -> bool:
        pairs = [(goal, one.metrics[goal.metric], other.metrics[goal.metric]) for goal in self.goals]
        return any(g.better(a, b) for g, a, b in pairs) and not any(g.better(b, a) for g, a, b in pairs)


def read_study(folder: Path, finished: dict[int, TrialView] | None = None, storage: str | None = None) -> StudyResults:
    """The study in `folder`; raises InputError when there is none.

    `finished` is a cache that a caller who reads again and again may pass: trials that cannot change any more are
    put into it and taken from it. Trials that other machines ran are read from Optuna's storage when the study has
    one that is not a file in the folder; `storage` is its URL when the manifest's, which has no password, will not do.
    """
    study = read_json(folder / "study.json")
    if not study:
        raise InputError(f"{folder}: no study here (no study.json). `dense-lab search STUDY.yaml` makes one")
    manifest = read_json(folder / "manifest.json")
    search = study.get("x-search", {})
    trials = {trial.number: trial for trial in _local_trials(folder, {} if finished is None else finished)}
    if manifest.get("storage"):
        from dense_lab.search.remote import remote_trials

        for trial in remote_trials(storage or manifest["storage"], study["x-name"]):
            trials.setdefault(trial.number, trial)
    return StudyResults(
        name=study["x-name"],
        folder=folder,
        digest=manifest.get("digest", ""),
        goals=goals_of(search),
        search=search,
        trials=[trials[number] for number in sorted(trials)],
        total=int(manifest.get("trials", search.get("trials", 0))),
        manifest=manifest,
        ablation=read_ablation(study, manifest),
    )


def goals_of(search: dict[str, Any]) -> tuple[Goal, ...]:
    """The objectives of a stored search spec."""
    return tuple(
        Goal(item["minimize"], "minimize") if item.get("minimize") else Goal(item["maximize"], "maximize")
        for item in search.get("objective", [{"minimize": "valid/loss"}])
    )


def _local_trials(folder: Path, finished: dict[int, TrialView]) -> Iterable[TrialView]:
    root = folder / TRIALS
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        if not path.name.isdigit():
            continue
        number = int(path.name)
        trial = finished.get(number) or read_trial(path)
        if trial is None:
            continue
        if trial.state in FINISHED:
            finished[number] = trial
        yield trial


def read_trial(folder: Path) -> TrialView | None:
    """The trial in `folder`, or the single run, whose number is 0; None when nothing was written there yet."""
    said, result = read_json(folder / TRIAL_FILE), read_json(folder / "result.json")
    if not said and not result and not (folder / "spec.json").exists():
        return None
    state, reason = _state(said, result)
    metrics = result.get("metrics") or last_line(folder / "metrics.jsonl")
    return TrialView(
        number=int(folder.name) if folder.name.isdigit() else 0,
        state=state,
        params=said.get("params", {}),
        values=said.get("values", {}),
        metrics={name: value for name, value in metrics.items() if isinstance(value, (int, float))},
        tags={**result.get("tags", {}), **said.get("tags", {})},
        reason=reason,
        folder=folder,
        label=said.get("label", ""),
        role=said.get("role", ""),
        tuned=said.get("tuned", {}).get("values", {}),
        digest=said.get("digest", ""),
        started=_time(said.get("started") or result.get("started")),
        ended=_time(result.get("ended")),
    )


def _state(said: dict[str, Any], result: dict[str, Any]) -> tuple[State, str]:
    own, other = said.get("digest"), result.get("tags", {}).get("spec")
    if own and other and own != other:
        # Files of two starts of a study, copied over each other: its numbers would pass as those of another trial.
        return "failed", f"result.json is of the spec {other}, trial.json of {own}: two trials' files were mixed"
    if result.get("status") in FINISHED:
        return result["status"], result.get("reason", "")
    from dense_lab.search.owner import liveness

    alive = liveness(said.get("owner"))
    if alive == "dead" or said.get("interrupted"):
        return "interrupted", said.get("interrupted") or "its process is gone"
    return "running", "" if alive == "alive" else "on another machine"


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
