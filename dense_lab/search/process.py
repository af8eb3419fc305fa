"""The process of a worker: its log, its environment, its GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

from dense_lab.errors import DenseLabError
from dense_lab.search.worker import Job, Worker

VISIBLE = "CUDA_VISIBLE_DEVICES"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(frozen=True)
class Share:
    """What a worker gets of the machine."""

    device: str
    """As the trainer understands it."""
    visible: str | None
    """The GPU that it sees, as `CUDA_VISIBLE_DEVICES` names it; None to leave that as it is."""


def main(job: Job, parent: Connection) -> None:
    """Entry point of the process."""
    from dense_lab.search.stopping import Stop

    stop = Stop(parent)
    _redirect(job.folder / "logs" / f"worker-{job.index}.log")
    # The server that this process was forked from keeps the folder and the environment it was once started in.
    os.chdir(job.directory)
    os.environ.clear()
    given = share(job.device, job.index, job.gpus)
    os.environ.update(environment(job.environment, job.threads, given))
    try:
        Worker(replace(job, device=given.device), stop).run()
    # Not a trial's fault: the study or a plugin cannot be loaded, the machine lacks something. The parent says so.
    except DenseLabError as error:
        parent.send(error)
        sys.exit(error.exit_code)


def share(device: str, index: int, gpus: Sequence[str]) -> Share:
    """The share of worker `index`: one of `gpus` in turn, and nothing else, so that it is device 0 to every kernel.

    A GPU asked for by number is given to every worker; `cpu`, and a machine without GPUs, to none.
    """
    if device == "cpu" or not gpus:
        return Share(device, None)
    number = device.removeprefix("cuda:")
    if number.isdecimal():
        # One that is not there is for the trainer to complain of.
        return Share("cuda", gpus[int(number)]) if int(number) < len(gpus) else Share(device, None)
    return Share("cuda" if device == "auto" else device, gpus[index % len(gpus)])


def environment(given: Mapping[str, str], threads: int, share: Share) -> dict[str, str]:
    """The environment of a worker: the user's, with as many threads as it has cores where the user says nothing."""
    visible = {} if share.visible is None else {VISIBLE: share.visible}
    return dict.fromkeys(THREADS, str(threads)) | dict(given) | visible


def threads(given: Mapping[str, str], workers: int) -> int:
    """Threads of each worker: what the user's OMP_NUM_THREADS says, or an equal share of the cores."""
    asked = given.get(THREADS[0], "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(asked) if asked.isdecimal() and int(asked) else max(1, cores // workers)


def visible_gpus(given: Mapping[str, str]) -> tuple[str, ...]:
    """The GPUs that may be used, as `CUDA_VISIBLE_DEVICES` names them; none of them is touched."""
    import torch

    # Counting makes no context: no memory is taken, and workers are forked from another process.
    count = torch.cuda.device_count()
    named = [name.strip() for name in given.get(VISIBLE, "").split(",") if name.strip()]
    return tuple(named[:count] if named else map(str, range(count)))


def _redirect(log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
