"""A study at a glance, for the live display: cheap enough to be asked for several times a second."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import fmean

from dense_lab.ablation.results import cells
from dense_lab.results import FINISHED, StudyResults, TrialView


@dataclass(frozen=True)
class Running:
    """A trial that is being trained."""

    trial: TrialView
    fraction: float | None
    """Of its training tokens; None before the first line of metrics."""
    loss: float | None
    """Latest loss in nats per token: of the validation if there was one, else of the training batch."""
    tokens_per_second: float | None


@dataclass(frozen=True)
class ArmProgress:
    """An arm of an ablation so far."""

    name: str
    done: int
    """Cells that are complete."""
    failed: int
    cells: int
    """Of the arm in all, as far as is known."""
    mean: float | None
    """Of what arms are compared by, over the cells that are complete; None before the first."""
    tuned: dict[str, float]
    """What tuning has chosen, by dotted path."""


@dataclass(frozen=True)
class Progress:
    """A snapshot of a study."""

    complete: int
    pruned: int
    failed: int
    interrupted: int
    """To be run again."""
    total: int
    workers: int
    running: tuple[Running, ...]
    best: TrialView | None
    seconds_left: float | None
    """Estimate; None before the first trial has finished."""
    arms: tuple[ArmProgress, ...] = ()
    """Of an ablation, in the order of the study."""
    metric: str = ""
    """What its arms are compared by."""

    @property
    def finished(self) -> int:
        """Trials that nothing changes any more."""
        return self.complete + self.pruned + self.failed


def snapshot(study: StudyResults, workers: int) -> Progress:
    """The study as its files say it stands."""
    running = tuple(_running(trial) for trial in study.having("running"))
    return Progress(
        complete=len(study.having("complete")),
        pruned=len(study.having("pruned")),
        failed=len(study.having("failed")),
        interrupted=len(study.having("interrupted")),
        total=study.total,
        workers=workers,
        running=running,
        best=study.best,
        seconds_left=_seconds_left(study, running, workers),
        arms=arms(study),
        metric=study.ablation.analysis.metric if study.ablation else "",
    )


def arms(study: StudyResults) -> tuple[ArmProgress, ...]:
    """How each arm of an ablation is doing; empty for a search."""
    if study.ablation is None:
        return ()
    values = cells(study, study.ablation.analysis.metric)
    added = Counter(arm for arm, _ in study.manifest.get("added", []))
    mine = [trial for trial in study.trials if trial.role == "cell"]
    failed = Counter(trial.label for trial in mine if trial.state == "failed")
    tuned = {trial.label: trial.tuned for trial in mine if trial.tuned}
    return tuple(
        ArmProgress(
            name=arm,
            done=len(found),
            failed=failed[arm],
            cells=len(study.ablation.seeds) + added[arm],
            mean=fmean(found.values()) if found else None,
            tuned=tuned.get(arm, {}),
        )
        for arm, found in values.items()
    )


def _running(trial: TrialView) -> Running:
    line, planned = trial.metrics, trial.tokens_planned
    speed = line.get("tokens_per_second")
    if speed is None and line.get("seconds") and line.get("tokens"):
        speed = line["tokens"] / line["seconds"]
    return Running(
        trial=trial,
        fraction=min(1.0, line["tokens"] / planned) if planned and "tokens" in line else None,
        loss=line.get("valid/loss", line.get("train/loss")),
        tokens_per_second=speed,
    )


def _seconds_left(study: StudyResults, running: tuple[Running, ...], workers: int) -> float | None:
    times = [(t.ended - t.started).total_seconds() for t in study.having(*FINISHED) if t.ended and t.started]
    if not times:
        return None
    each = fmean(times)
    waiting = max(0, study.total - len(study.having(*FINISHED)) - len(running))
    now = datetime.now(UTC)
    # A trial that has taken longer than the mean without saying how far it is may end any moment.
    rest = sum(
        each * (1 - one.fraction)
        if one.fraction is not None
        else max(0.0, each - (now - one.trial.started).total_seconds() if one.trial.started else each)
        for one in running
    )
    return (waiting * each + rest) / max(1, workers)
