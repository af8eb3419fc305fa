"""Trains recorded runs again, as the cells of a study of their own: in parallel, resumed when stopped, recorded."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dense_lab import registry
from dense_lab.errors import InputError
from dense_lab.files import write_json
from dense_lab.reproduce.agreement import Agreement, Cells, Expected, Held
from dense_lab.reproduce.environment import Difference, differences, threads
from dense_lab.reproduce.recorded import Recorded, recorded
from dense_lab.statistics.comparison import without_nan

if TYPE_CHECKING:
    from dense_lab.results import StudyResults
    from dense_lab.search import Outcome, Progress
    from dense_lab.search.worker import Train
    from dense_lab.space import Study

RECORD = "reproduce.json"
"""What came of it, in the folder of the new runs."""
STUDY = "again.yaml"
CODE = ("commit", "device", "dtype", "torch", "triton")
"""Tags that runs of an earlier call must share with those of this one to count as its own."""


@dataclass(frozen=True)
class Reproduction:
    """What came of it."""

    recorded: Recorded
    folder: Path
    """Of the new runs: a study's."""
    environment: tuple[Difference, ...]
    agreements: tuple[Agreement, ...]
    stopped: bool
    """Whether the user stopped it: not every run is there yet."""
    trained: int
    """Runs that this call trained; the others were there from an earlier one."""

    @property
    def reproduced(self) -> bool:
        """Whether every number fell where it was expected."""
        return not self.stopped and all(one.holds for one in self.agreements)

    def summary(self) -> str:
        """One sentence."""
        if self.stopped:
            return "stopped: the same command goes on"
        runs = [one for one in self.agreements if one.kind == "trial"]
        equal = sum(one.outcome == "exact" for one in runs)
        level = f"all intervals together hold with probability {1 - self.recorded.alpha:.4g}"
        if equal == len(runs):
            return f"reproduced: {equal} of {equal} runs bit for bit"
        off = [one for one in self.agreements if not one.holds]
        bits = f"{equal} of {len(runs)} runs bit for bit, {_largest(runs)}"
        if any(one.outcome == "not exact" for one in runs):
            bits += "; on a CPU and with all that is recorded of the environment unchanged, every run should be"
        if not off:
            return f"reproduced: all numbers are where they were expected ({level}); {bits}"
        shifted = [one.arm for one in off if one.kind == "paired" and one.outcome == "outside"]
        moved = f", all seeds of {', '.join(shifted)} have moved one way" if shifted else ""
        count = f"{len(off)} of {len(self.agreements)} numbers"
        return f"NOT reproduced: {count} are not where they were expected ({level}){moved}; {bits}"

    def caution(self) -> str:
        """One sentence where a number is inside an interval that two seeds made; else empty."""
        known, chosen = self.recorded.known, self.recorded.chosen
        reaches = [
            one.reach
            for one in self.agreements
            if one.outcome == "inside" and len((chosen if one.kind == "paired" else known).get(one.arm, ())) == 2
        ]
        if not reaches:
            return ""
        return (
            f"2 seeds say little: with one degree of freedom, 'inside' is up to {max(reaches):.3g} times the spread to "
            "each side, which hardly any number misses"
        )

    def as_json(self) -> dict[str, Any]:
        """For JSON, which knows no number that is none."""
        rows = without_nan([asdict(one) for one in self.agreements])
        return {
            "reproduced": self.reproduced,
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "summary": self.summary(),
            "caution": self.caution(),
            "folder": str(self.recorded.folder),
            "metric": self.recorded.metric,
            "alpha": self.recorded.alpha,
            "environment": [one._asdict() for one in self.environment],
            "trained": self.trained,
            "left_out": list(self.recorded.left_out),
            "numbers": rows,
        }


def _largest(runs: Sequence[Agreement]) -> str:
    """How far a run is from the recorded one at most."""
    worst = max((one for one in runs if one.new is not None), key=lambda one: abs(one.deviation), default=None)
    if worst is None:
        return "no run to compare"
    share = f", {worst.share:.2g} of the spread between seeds" if math.isfinite(worst.share) else ""
    return f"each within {abs(worst.deviation):.2g} of the recorded one{share}"


def reproduce(
    folder: Path,
    *,
    into: Path | None = None,
    arms: Collection[str] = (),
    seeds: Collection[int] = (),
    device: str = "auto",
    workers: int = 1,
    other_data: Literal["refused", "allowed"] = "refused",
    kernels: Literal["verified", "unverified"] = "verified",
    on_environment: Callable[[Recorded, list[Difference]], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    train: Train | None = None,
) -> Reproduction:
    """Train what is recorded in `folder` again, into `into`, and compare.

    `folder` is a study's, one of its trials', or a single run's. `arms` and `seeds` choose from a study. Every other
    difference of the environment is told to `on_environment` and accepted; other data only with `other_data="allowed"`.
    Operations that are wrong on this machine are refused as in a search, unless `kernels` is "unverified".
    Raises InputError where nothing can be trained again, for other data, and when `into` has runs by other code.
    """
    from dense_lab.search import search

    found = recorded(folder, arms, seeds)
    into = (into or found.folder / "reproduced" / found.key).resolve()
    cores = threads(found.trials)
    environment = differences(found, device, cores, registry.default())
    if on_environment:
        on_environment(found, environment)
    _check_data(environment, other_data)
    _check_made(found, into, environment)
    study = _study(found, into)
    if train is None:
        _verify(study, device, kernels)
    with _threads(cores):
        options: dict[str, Any] = {"workers": workers, "device": device, "on_progress": on_progress, "train": train}
        outcome = search(study, into, mlflow_uri="none", **options)
    made = _held(found, into, environment, outcome)
    write_json(into / RECORD, made.as_json())
    return made


def _verify(study: Study, device: str, kernels: Literal["verified", "unverified"]) -> None:
    from dense_lab.verification import ensure

    ensure((arm.spec.run() for arm in study.arms()), device, kernels)


def _check_data(environment: list[Difference], other_data: Literal["refused", "allowed"]) -> None:
    other = [one for one in environment if one.what == "data"]
    if other and other_data == "refused":
        raise InputError(f"the data is not that of the recorded runs ({other[0]}): get it, or --allow-different-data")


def _check_made(found: Recorded, into: Path, environment: list[Difference]) -> None:
    """Raise InputError when `into` has runs by other code, which say nothing of this one."""
    from dense_lab.results import read_study

    made = read_study(into).having("complete") if (into / "study.json").exists() else []
    changed = {one.what: one.now for one in environment}
    for name in CODE:
        now = changed.get(name) or next((trial.tags[name] for trial in found.trials if name in trial.tags), None)
        other = sorted({trial.tags[name] for trial in made if name in trial.tags} - {now})
        if now and other:
            raise InputError(
                f"{into} has runs of an earlier reproduction with {name} {other[0]}, now it is {now}: name another "
                "folder with --into, or remove this one"
            )


def _held(found: Recorded, into: Path, environment: list[Difference], outcome: Outcome) -> Reproduction:
    new = _cells(outcome.results, found.metric)
    held = Held(
        found.metric, found.alpha, found.baseline, found.chosen, found.known, new, _expected(found, environment)
    )
    agreements = () if outcome.stopped else tuple(held.agreements())
    return Reproduction(found, into, tuple(environment), agreements, outcome.stopped, outcome.trained)


def _expected(found: Recorded, environment: Sequence[Difference]) -> Expected:
    # A GPU may take sums in another order every time.
    on_cpu = all(trial.tags.get("device", "").startswith("cpu") for trial in found.trials)
    return "bits" if on_cpu and not environment else "spread"


def _study(found: Recorded, into: Path) -> Study:
    """The study of the new runs; raises InputError when some of its specs are not the stored ones."""
    from dense_lab.files import write_text
    from dense_lab.reproduce.recorded import stored_spec
    from dense_lab.space import Study

    # JSON is YAML too.
    write_text(into / STUDY, json.dumps(found.tree(registry.default()), indent=2) + "\n")
    study = Study.load(into / STUDY)
    for arm, cells in found.chosen.items():
        for seed, trial in cells.items():
            if study.cell(arm, seed, {}, "cell").canonical() != stored_spec(trial, registry.default()).canonical():
                raise InputError(
                    f"{trial.folder}/spec.json differs from the other specs of {arm!r} in more than the seed"
                )
    return study


def _cells(results: StudyResults, metric: str) -> Cells:
    found: Cells = {}
    for trial in results.having("complete"):
        if metric in trial.metrics:
            found.setdefault(trial.label, {})[int(trial.params["seed"])] = trial
    return found


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Within the block workers use so many CPU threads: sums of other threads' parts round differently."""
    name, before = "OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS")
    if count is not None:
        os.environ[name] = str(count)
    try:
        yield
    finally:
        if count is not None:
            os.environ.pop(name)
            os.environ.update({} if before is None else {name: before})
