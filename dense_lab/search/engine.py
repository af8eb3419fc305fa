"""A search or an ablation from beginning to end, or from where it was left."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from dense_lab.ablation.cells import CellPlan
from dense_lab.errors import InputError, MachineError
from dense_lab.files import FileLock, read_json
from dense_lab.results import TRIALS, StudyResults, TrialView, read_study
from dense_lab.search import data, looking, manifest, process, storage
from dense_lab.search import ledger as book
from dense_lab.search import reuse as shelves
from dense_lab.search.ledger import Ledger
from dense_lab.search.plan import Plan
from dense_lab.search.progress import Progress, snapshot
from dense_lab.search.project import Projector
from dense_lab.search.supervise import Supervisor
from dense_lab.search.worker import Job, Train
from dense_lab.tracking.place import NONE, default_uri, pending
from dense_lab.units import counted
from dense_lab.urls import masked

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
        """130 when it was stopped; 1 when every trial that finished has failed, or any cell of an ablation; else 0."""
        finished = self.results.having("complete", "pruned", "failed")
        failed = [trial for trial in finished if trial.state == "failed"]
        if self.stopped:
            return 130
        return int(bool(failed) and (len(failed) == len(finished) or any(trial.role == "cell" for trial in failed)))


@dataclass(frozen=True)
class Options:
    """What a call of `search` says besides the study and its folder."""

    workers: int = 1
    """Processes, which share the machine's cores and GPUs."""
    storage: str | None = None
    """URL of a database that other machines share; by default SQLite in the folder."""
    device: str = "auto"
    trials: int | None = None
    """In all, resumed ones included; by default what the study says."""
    mlflow_uri: str | None = None
    """Tracking URI, `none`, or by default a database in the folder."""
    train: Train | None = None
    """Instead of `dense_lab.training.train`; it has to be importable."""
    reuse: tuple[Path, ...] = ()
    """Folders of other studies: a finished trial of theirs is taken over where this study has the very same spec in
    the same role, and the data is still the same."""
    max_seeds: int | None = None
    """Arms that are undecided after the study's seeds get more, up to so many; see `dense_lab.search.looking`."""


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
    reuse: Sequence[Path] = (),
    max_seeds: int | None = None,
) -> Outcome:
    """Run `study` in `folder`, or go on with it, until it has all its trials; a complete study trains nothing.

    See `Options` for what may be said besides; `on_progress` is called about four times a second.

    Ctrl-C once leaves the running trials to be run again; twice does so at once. Raises InputError when the folder
    holds another study or the data cannot be prepared, MachineError when the machine, the storage or another search of
    this folder is in the way.
    """
    if workers < 1:
        raise InputError(f"--workers {workers}: expected at least 1")
    shelves.check(reuse, folder)
    options = Options(workers, storage, device, trials, mlflow_uri, train, tuple(p.resolve() for p in reuse), max_seeds)
    folder = folder.resolve()
    if train is None and not (folder / manifest.MANIFEST).exists():
        # Before anything is written: what the user then corrects would be another study.
        data.prepare(study)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "search.lock")
    if not lock.acquire(wait=False):
        raise MachineError(f"{folder}: another search is running this study. Wait for it, or stop it with Ctrl-C")
    try:
        return _Search(study, folder, options).run(on_progress)
    finally:
        lock.release()


def _check_known(folder: Path, ledger: Ledger, url: str) -> None:
    """Raise InputError when `folder` holds trials that the ledger never heard of: it would number others like them."""
    # Folders first: what a worker begins meanwhile, on this machine or another, is in the ledger before its folder is.
    there = [int(trial.name) for trial in (folder / TRIALS).glob("[0-9]*") if trial.name.isdecimal()]
    known = len(ledger.trials())
    unknown = [number for number in there if number >= known]
    if unknown:
        raise InputError(
            f"{folder}: {masked(url)} knows of {counted(known, 'trial')}, {TRIALS}/ holds {len(unknown)} more: the "
            f"database was lost or replaced. Put it back; or move {folder.name} away, and let a new study take over "
            "what is finished: --reuse WHERE-IT-IS-NOW"
        )


class _Search:
    def __init__(self, study: Study, folder: Path, options: Options) -> None:
        self.space, self.folder, self.options = study, folder, options
        self.uri = options.mlflow_uri or default_uri(folder)
        self._resumed = (folder / manifest.MANIFEST).exists()
        self.plan = manifest.plan(study, folder, options.trials)
        self.looks = looking.Looks.of(study, folder, options.max_seeds)
        manifest.write(study, folder, self.plan, storage=options.storage, mlflow=options.mlflow_uri)
        if self.looks:
            # Before the first look, which may decide everything: reports are to know that it was one of several.
            manifest.update(folder, looks=[self.looks.first, self.looks.maximum])
        digest = read_json(folder / manifest.MANIFEST)["digest"]
        url, shared = options.storage or storage.default_url(folder), options.storage is not None
        self.ledger = Ledger(*storage.create_study(url, study.name, study.search.objective, digest), shared=shared)
        _check_known(folder, self.ledger, url)
        gpus = process.visible_gpus(os.environ) if options.train is None else ()
        self.job = Job(
            index=0,
            folder=folder,
            plan=self.plan,
            url=url,
            shared=shared,
            device=options.device,
            gpus=gpus,
            sharing=-(-options.workers // max(1, len(gpus))),
            threads=process.threads(os.environ, options.workers),
            plugin_files=study.registry.files,
            directory=Path.cwd(),
            environment=dict(os.environ),
            train=options.train,
            reuse=options.reuse,
        )
        self.supervisor = Supervisor(self.job, options.workers, self.ledger)
        self._asked = False
        """Whether the user wants to stop; supervisors may change just then."""
        self._seen: dict[int, TrialView] = {}

    def run(self, on_progress: Callable[[Progress], None] | None) -> Outcome:
        self.supervisor.settle()
        before = book.finished(self.ledger.trials())
        if not self._extended() and not self.supervisor.may_start():
            return self._outcome(before, self._project_rest())
        if self.options.train is None and self._resumed:
            data.prepare(self.space)
        projector = self._projector()
        with _interrupts(self._stop):
            try:
                self._train(on_progress)
            finally:
                missing = projector.finish(MLFLOW_PATIENCE) if projector else ""
        return self._outcome(before, missing)

    def _train(self, on_progress: Callable[[Progress], None] | None) -> None:
        """Until the plan is done, and what is added to it while arms are undecided."""
        while True:
            self.supervisor.run(lambda: on_progress(self._snapshot()) if on_progress else None)
            if self.supervisor.stopping or not self._extended():
                return

    def _extended(self) -> bool:
        """Whether cells were added, because all there were have been trained and arms are undecided still."""
        if self.looks is None or not isinstance(self.plan, CellPlan) or self.supervisor.may_start():
            return False
        plan = self.looks.extended(self.plan, read_study(self.folder, storage=self.job.url))
        if plan is None:
            return False
        self.plan = plan
        asked = len(self.space.arms()) * self.looks.first
        added = [[cell.arm, cell.seed] for cell in plan.cells if cell.role == "cell"][asked:]
        manifest.update(self.folder, trials=plan.total, added=added)
        self.job = replace(self.job, plan=plan)
        self.supervisor = Supervisor(self.job, self.options.workers, self.ledger)
        if self._asked:
            self.supervisor.stop()
        return True

    def _stop(self) -> None:
        self._asked = True
        self.supervisor.stop()

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
        # A stop that came when all was trained changed nothing; more cells may follow as long as arms are looked at.
        stopped = self.supervisor.stopping and (before + trained < self.plan.total or self.looks is not None)
        exhausted = not stopped and isinstance(self.plan, Plan) and before + trained < self.plan.total
        if exhausted:
            manifest.update(self.folder, trials=before + trained)
        if isinstance(self.plan, CellPlan) and self.plan.tuning():
            manifest.update(self.folder, tuned=self.plan.choices(self.ledger))
        message = self._message(before, trained, stopped=stopped, exhausted=exhausted)
        results = read_study(self.folder, storage=self.job.url)
        if failed := len(results.having("failed")):
            message += f"; {failed} of them failed"
        return Outcome(results, trained, stopped, message, missing)

    def _message(self, before: int, trained: int, *, stopped: bool, exhausted: bool) -> str:
        done, trials = before + trained, counted(before + trained, "trial")
        if stopped:
            return f"stopped after {done} of {self.plan.total} trials; the same command goes on"
        if exhausted:
            return f"complete: {trials}, fewer than {self.plan.total}, since the space holds no other points"
        if not trained:
            return f"complete already: {trials}; nothing was trained"
        return f"complete: {trials}"


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
