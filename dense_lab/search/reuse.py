"""Finished trials of other studies' folders that a trial can take over instead of being trained again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dense_lab.errors import InputError
from dense_lab.results import TrialView, read_study

if TYPE_CHECKING:
    from dense_lab.study import RunSpec

FILES = ("spec.json", "metrics.jsonl", "result.json")
"""What is copied, the last one last; checkpoints stay where they are."""


class Shelf:
    """Finished trials by digest of their spec, plugins included, and role."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._known: dict[tuple[str, str], TrialView] = {}
        for folder in folders:
            for trial in read_study(folder).having("complete"):
                if trial.folder is not None and trial.digest:
                    self._known.setdefault((trial.digest, trial.role), trial)

    def find(self, digest: str, role: str) -> TrialView | None:
        """A trial of this very spec in this role."""
        return self._known.get((digest, role))


def check(folders: Sequence[Path], own: Path) -> None:
    """Raise InputError for a folder that holds no study, or is the study's own."""
    for folder in folders:
        if folder.resolve() == own.resolve():
            raise InputError(f"--reuse {folder}: this is the study's own folder; name that of another one")
        if not (folder / "study.json").exists():
            raise InputError(f"--reuse {folder}: no study here (no study.json)")


def fits(trial: TrialView, spec: RunSpec) -> bool:
    """Whether a trial of this spec saw the data that it names today: a file or a package may have changed since."""
    from dense_lab.training.loop import prepared

    return trial.tags.get("data") == prepared(spec.data).fingerprint


def take(trial: TrialView, folder: Path) -> str:
    """Copy the files of a finished trial into `folder`; returns where they came from, seen from the study's folder."""
    assert trial.folder is not None
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        draft = folder / f".{name}.{os.getpid()}"
        shutil.copyfile(trial.folder / name, draft)
        draft.replace(folder / name)
    return os.path.relpath(trial.folder, folder.parent.parent)
