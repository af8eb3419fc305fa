"""Sends a running study to MLflow from one thread of the parent, so that MLflow can neither race nor fail a trial."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from dense_lab.files import FileLock
from dense_lab.results import TrialView, read_study
from dense_lab.urls import masked

if TYPE_CHECKING:
    from dense_lab.tracking.mlflow_store import Projection

INTERVAL = 3.0
"""Seconds between two passes, so that the curves in MLflow's pages move while trials run."""
_LONGEST_PAUSE = 60.0
"""Seconds at most before MLflow is tried again after it failed."""


class Projector:
    """The thread. Nothing it meets gets out of it but the sentence that `finish` returns."""

    def __init__(self, folder: Path, uri: str) -> None:
        self.folder, self.uri = folder, uri
        self.problem = ""
        """Why the last pass failed; empty when it did not."""
        self._projection: Projection | None = None
        self._finished: dict[int, TrialView] = {}
        self._last = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="mlflow")

    def start(self) -> None:
        """Begin sending."""
        self._thread.start()

    def finish(self, seconds: float) -> str:
        """Send what is left, for so long at most; a sentence for the user when something is missing, else nothing."""
        self._last.set()
        self._thread.join(seconds)
        if not self._thread.is_alive() and not self.problem:
            return ""
        why = f" ({self.problem})" if self.problem else ""
        return f"MLflow at {masked(self.uri)} has not got everything{why}. `dense-lab sync {self.folder}` completes it."

    def _run(self) -> None:
        pause = INTERVAL
        while True:
            # Read before the pass: what is written during it would otherwise be missing at the end.
            last = self._last.is_set()
            self.problem = self._pass()
            if last:
                return
            pause = min(_LONGEST_PAUSE, 2 * pause) if self.problem else INTERVAL
            self._last.wait(pause)

    def _pass(self) -> str:
        from dense_lab.tracking.mlflow_store import LOCK, Projection

        lock = FileLock(self.folder / LOCK)
        if not lock.acquire(wait=False):
            return "`dense-lab sync` is at it"
        try:
            if self._projection is None:
                self._projection = Projection(self.folder, self.uri)
            self._projection.send(read_study(self.folder, self._finished))
        # The isolation boundary: MLflow unreachable, slow, locked or broken is no concern of the trials.
        except Exception as error:  # noqa: BLE001
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        finally:
            lock.release()
        return ""
