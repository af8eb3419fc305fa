"""The parent of a search: starts workers, notices when one dies, sees to it that its trial is run again."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from dense_lab.errors import DenseLabError, MachineError
from dense_lab.files import FileLock
from dense_lab.results import TRIALS
from dense_lab.search import ending
from dense_lab.search import ledger as book
from dense_lab.search.ledger import Ledger
from dense_lab.search.process import main
from dense_lab.search.worker import LEDGER_LOCK, Job

TICK = 0.25
"""Seconds between two looks at the workers."""
_PATIENCE = 60.0
"""Seconds that a worker has to stop in before it is killed."""
_STILLBORN = 3
"""Workers in a row that die without ever having claimed a trial before the search is given up."""
_HEARTBEATS = 30.0
"""Seconds between two looks for trials of other machines that have fallen silent."""


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection


class Supervisor:
    """Runs workers until nothing is left to be started, or until `stop` was called."""

    def __init__(self, job: Job, workers: int, ledger: Ledger) -> None:
        self.job, self.ledger = job, ledger
        self.size = workers
        self.stopping = False
        self.lock = FileLock(job.folder / LEDGER_LOCK)
        self._workers: dict[int, _Worker] = {}
        self._deaths: dict[int, str] = {}
        """How each process of this search that died came to it, by process id."""
        self._stillborn = 0
        self._idle = False
        """Whether a worker found nothing to start, and nothing was queued or has finished since."""
        self._finished = 0
        """Trials that had finished when the ledger was last looked at."""
        self._stop_by = float("inf")
        self._listen_at = time.monotonic() + _HEARTBEATS

    def settle(self) -> list[int]:
        """Fail what dead processes left running and queue it again; returns the trials concerned."""
        with self.lock:
            reaped = self.ledger.reap(self._why, self._give_up)
            self._idle &= not self.ledger.requeue()
        return reaped

    def may_start(self) -> bool:
        """Whether there is a trial left to be started."""
        with self.lock:
            self._idle = not self.job.plan.may_start(self.ledger)
        return not self._idle

    def run(self, look: Callable[[], None]) -> None:
        """Until all is done; `look` is called four times a second. Raises MachineError when no worker survives."""
        try:
            while self._workers or (not self.stopping and self.may_start()):
                self._fill()
                wait([worker.process.sentinel for worker in self._workers.values()], TICK)
                self._bury()
                self._hear()
                look()
        finally:
            self.kill()
            self.settle()

    def stop(self) -> None:
        """Ask every worker to leave its trial where it is; the second call kills them."""
        if self.stopping:
            self.kill()
            return
        self.stopping = True
        self._stop_by = time.monotonic() + _PATIENCE
        for worker in self._workers.values():
            _tell(worker.pipe, "stop")

    def kill(self) -> None:
        """End the workers at once; what they were at is queued again by `settle`."""
        for worker in self._workers.values():
            worker.process.kill()
        for worker in self._workers.values():
            worker.process.join()

    def _fill(self) -> None:
        """A worker for every free place, while there is work that nobody is about to take."""
        free = [index for index in range(self.size) if index not in self._workers]
        if not free or self.stopping:
            return
        finished = book.finished(self.ledger.trials())
        # What has finished may have been what a cell was waiting for.
        news, self._finished = finished != self._finished, finished
        if self._idle and not (news and self.may_start()):
            return
        for index in free[: max(0, self.job.plan.total - finished - len(self._workers))]:
            self._workers[index] = _start(replace(self.job, index=index))
            if self._told_to_stop():
                # The signal came while this one was being started, and so was passed on to the others only.
                _tell(self._workers[index].pipe, "stop")
                return

    def _told_to_stop(self) -> bool:
        # A signal sets it at any moment, also between two lines.
        return self.stopping

    def _bury(self) -> None:
        if time.monotonic() > self._stop_by:
            self.kill()
        for index, worker in list(self._workers.items()):
            if worker.process.is_alive():
                continue
            worker.process.join()
            del self._workers[index]
            if worker.process.exitcode == 0:
                self._idle = True
            else:
                self._mourn(worker)
            worker.pipe.close()

    def _mourn(self, worker: _Worker) -> None:
        pid, code = worker.process.pid or 0, worker.process.exitcode or 0
        problem = _last_words(worker.pipe)
        if problem is not None:
            raise problem
        self._deaths[pid] = _epitaph(pid, code)
        self.settle()
        # One that dies between two trials, such as while it waits for the lock, has lived.
        lived = any(book.claim(trial).get("owner", {}).get("pid") == pid for trial in self.ledger.trials())
        self._stillborn = 0 if lived else self._stillborn + 1
        if self._stillborn >= _STILLBORN:
            log = self.job.folder / "logs"
            raise MachineError(f"{_STILLBORN} workers in a row died before they claimed a trial; see {log}")

    def _hear(self) -> None:
        if self.job.shared and time.monotonic() > self._listen_at:
            self._listen_at = time.monotonic() + _HEARTBEATS
            with self.lock:
                self.ledger.fail_silent()
                self._idle &= not self.ledger.requeue()

    def _why(self, owner: dict[str, Any]) -> dict[str, Any]:
        """Attributes of an interrupted trial. Only deaths that were seen to be the trial's own count against it."""
        reason = self._deaths.get(owner.get("pid", 0)) or self._died_since(owner.get("pid", 0))
        if not owner and self._deaths:
            # A worker died between claiming the trial and signing it: which one is not known, how is.
            return {"interrupted": list(self._deaths.values())[-1], "stopped": True}
        if reason is None:
            return {"interrupted": "stopped by the user" if self.stopping else "the search was gone", "stopped": True}
        return {"interrupted": reason}

    def _died_since(self, pid: int) -> str | None:
        """How a worker ended that has died since the workers were last looked at; several can die at once."""
        for worker in self._workers.values():
            if worker.process.pid == pid:
                worker.process.join()
                return _epitaph(pid, worker.process.exitcode or 0)
        return None

    def _give_up(self, root: int, reason: str) -> None:
        ending.fail(self.job.folder / TRIALS / f"{root:04d}", reason)


def _epitaph(pid: int, code: int) -> str:
    return f"its worker (process {pid}) {_said(code)}"


def _start(job: Job) -> _Worker:
    # Forked from a server that has imported torch once, so that a worker is there at once, a successor included.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dense_lab.search.preload"])
    pipe, theirs = context.Pipe()
    process = context.Process(target=main, args=(job, theirs), name=f"worker-{job.index}")
    process.start()
    theirs.close()
    return _Worker(process, pipe)


def _tell(pipe: Connection, word: str) -> None:
    # It may have ended by itself.
    with suppress(OSError):
        pipe.send(word)


def _last_words(pipe: Connection) -> DenseLabError | None:
    """The error that a worker met which is not its trial's, if it could tell."""
    try:
        problem: DenseLabError | None = pipe.recv() if pipe.poll() else None
    # It was killed.
    except (EOFError, OSError):
        return None
    return problem


def _said(code: int) -> str:
    if code < 0:
        return f"was killed by signal {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
