"""A search from beginning to end, or from where it was left."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from dense_lab.errors import InputError, MachineError
from dense_lab.files import FileLock, read_json
from dense_lab.results import StudyResults, TrialView, read_study
from dense_lab.search import ledger as book
from dense_lab.search import manifest, storage
from dense_lab.search.ledger import Ledger
from dense_lab.search.progress import Progress, snapshot
from dense_lab.search.project import Projector
from dense_lab.search.supervise import Supervisor
from dense_lab.search.worker import Job, Train
from dense_lab.tracking.place import NONE, default_uri, pending

if TYPE_CHECKING:
    from dense_lab.space import Study

MLFLOW_PATIENCE = 30.0
"""Seconds that MLflow has, after the last trial, to take what is left."""


@dataclass(frozen=True)
class Outcome:
    """How a call of `search` ended."""

    results: StudyResults
    trained: int
    """Trials that finished during this call."""
    stopped: bool
    """Whether the user stopped it."""
    message: str
    """What happened, in a sentence."""
    mlflow: str = ""
    """What MLflow is missing and what would complete it; empty when it has everything."""

    @property
    def exit_code(self) -> int:
        """1 when every trial that finished has failed, else 0."""
        finished = self.results.having("complete", "pruned", "failed")
        return int(bool(finished) and all(trial.state == "failed" for trial in finished))


def search(
    study: Study,
    folder: Path,
    *,
    workers: int = 1,
    storage: str | None = None,
    device: str = "auto",
    trials: int | None = None,
    mlflow_uri: str | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    train: Train | None = None,
) -> Outcome:
    """Run `study` in `folder`, or go on with it, until it has all its trials; a complete study trains nothing.

    `workers` processes share the machine's cores. `storage` is the URL of a database that other machines share; the
    default is SQLite in the folder. `trials` is their number in all, resumed ones included; by default what the study
    says. `mlflow_uri` is a tracking URI, `none`, or by default a database in the folder. `on_progress` is called about
    four times a second. `train` replaces `dense_lab.training.train`; it has to be importable.

    Ctrl-C once leaves the running trials to be run again; twice does so at once. Raises InputError when the folder
    holds another study, MachineError when the machine, the storage or another search of this folder is in the way.
    """
    if workers < 1:
        raise InputError(f"--workers {workers}: expected at least 1")
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "search.lock")
    if not lock.acquire(wait=False):
        raise MachineError(f"{folder}: another search is running this study. Wait for it, or stop it with Ctrl-C")
    try:
        return _Search(study, folder, workers, storage, device, trials, mlflow_uri, train).run(on_progress)
    finally:
        lock.release()


class _Search:
    def __init__(
        self,
        study: Study,
        folder: Path,
        workers: int,
        url: str | None,
        device: str,
        trials: int | None,
        mlflow_uri: str | None,
        train: Train | None,
    ) -> None:
        self.folder = folder
        self.uri = mlflow_uri or default_uri(folder)
        self.plan = manifest.plan(study, trials)
        manifest.write(study, folder, self.plan, storage=url, mlflow=mlflow_uri)
        digest = read_json(folder / manifest.MANIFEST)["digest"]
        url, shared = url or storage.default_url(folder), url is not None
        self.ledger = Ledger(*storage.create_study(url, study.name, study.search.objective, digest), shared=shared)
        self.job = Job(
            index=0,
            folder=folder,
            plan=self.plan,
            url=url,
            shared=shared,
            device=device,
            threads=max(1, _cores() // workers),
            plugin_files=study.registry.files,
            directory=Path.cwd(),
            environment=dict(os.environ),
            train=train,
        )
        self.supervisor = Supervisor(self.job, workers, self.ledger)
        self._seen: dict[int, TrialView] = {}

    def run(self, on_progress: Callable[[Progress], None] | None) -> Outcome:
        self.supervisor.settle()
        before = book.finished(self.ledger.trials())
        if not self.supervisor.may_start():
            return self._outcome(before, self._project_rest())
        projector = self._projector()
        with _interrupts(self.supervisor.stop):
            try:
                self.supervisor.run(lambda: on_progress(self._snapshot()) if on_progress else None)
            finally:
                missing = projector.finish(MLFLOW_PATIENCE) if projector else ""
        return self._outcome(before, missing)

    def _snapshot(self) -> Progress:
        return snapshot(read_study(self.folder, self._seen, self.job.url), self.supervisor.size)

    def _projector(self) -> Projector | None:
        if self.uri == NONE:
            return None
        projector = Projector(self.folder, self.uri)
        projector.start()
        return projector

    def _project_rest(self) -> str:
        """Send what an earlier search could not, if anything."""
        if self.uri == NONE or not pending(read_study(self.folder), self.uri):
            return ""
        projector = Projector(self.folder, self.uri)
        projector.start()
        return projector.finish(MLFLOW_PATIENCE)

    def _outcome(self, before: int, missing: str) -> Outcome:
        trained = book.finished(self.ledger.trials()) - before
        stopped = self.supervisor.stopping
        exhausted = not stopped and before + trained < self.plan.total
        if exhausted:
            manifest.set_total(self.folder, before + trained)
        message = self._message(before, trained, stopped=stopped, exhausted=exhausted)
        results = read_study(self.folder, storage=self.job.url)
        return Outcome(results, trained, stopped, message, missing)

    def _message(self, before: int, trained: int, *, stopped: bool, exhausted: bool) -> str:
        done = before + trained
        if stopped:
            return f"stopped after {done} of {self.plan.total} trials; the same command goes on"
        if exhausted:
            return f"complete: {done} trials, fewer than {self.plan.total}, since the space holds no other points"
        if not trained:
            return f"complete already: {done} trials; nothing was trained"
        return f"complete: {done} trials"


@contextmanager
def _interrupts(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C, and a plain `kill`, call `stop` within the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def asked(number: int, frame: FrameType | None) -> None:
        stop()

    before = {number: signal.signal(number, asked) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
