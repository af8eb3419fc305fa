"""Single runs: folders that `dense-lab train` makes, which belong to no study."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from dense_lab.errors import InputError
from dense_lab.files import read_json, write_json
from dense_lab.results import TRIAL_FILE, Goal, StudyResults, TrialView, read_trial

SINGLE = "single"
"""Folder of the run in the folder of its name."""


def is_run(folder: Path) -> bool:
    """Whether a run was begun in this very folder."""
    return (folder / "spec.json").exists()


def runs_below(folder: Path) -> list[Path]:
    """Folders of the single runs in a folder of studies and runs."""
    return sorted(path for pattern in ("*", f"*/{SINGLE}") for path in folder.glob(pattern) if is_run(path))


def sign(folder: Path, digest: str) -> None:
    """Say that this process trains the run of `digest` now, unless the folder is another run's."""
    if read_json(folder / "spec.json").get("digest", digest) != digest:
        return
    from dense_lab.search.owner import this_process

    began = read_json(folder / TRIAL_FILE).get("started") or datetime.now(UTC).isoformat(timespec="milliseconds")
    write_json(folder / TRIAL_FILE, {"digest": digest, "owner": this_process(), "started": began})


def read_run(folder: Path) -> StudyResults:
    """The run in `folder`, as a study of one trial; raises InputError when there is none."""
    folder = folder.resolve()
    trial = read_trial(folder) if is_run(folder) else None
    if trial is None:
        raise InputError(f"{folder}: no run here (no spec.json). `dense-lab train STUDY.yaml` makes one")
    name = folder.parent.name if folder.name == SINGLE else folder.name
    goals = (Goal("valid/loss", "minimize"),)
    return StudyResults(name, folder, trial.digest or trial.spec["digest"], goals, {}, [_known(trial)], 1, kind="run")


def _known(trial: TrialView) -> TrialView:
    """Of a run whose trainer did not sign, nobody knows that it still runs."""
    signed = trial.folder is not None and (trial.folder / TRIAL_FILE).exists()
    return trial if signed or trial.state != "running" else replace(trial, state="interrupted", reason="")
