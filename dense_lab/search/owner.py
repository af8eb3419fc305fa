"""Who runs a trial: the record by which a trial whose process is gone is told from one that is still at work."""

from __future__ import annotations

import functools
import os
import socket
from pathlib import Path
from typing import Any, Literal

Liveness = Literal["alive", "dead", "elsewhere"]
_CLOCK_SLACK = 5.0
"""Seconds by which two readings of one process's start time may differ (the system clock is being set)."""


@functools.cache
def machine() -> str:
    """This host, since it was last started: host name and the kernel's boot id where it tells one."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname() + (f" {boot.read_text().strip()}" if boot.is_file() else "")


def this_process() -> dict[str, Any]:
    """The record of the calling process: machine, process id, and when the process started (seconds since 1970)."""
    import psutil

    return {"machine": machine(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def liveness(owner: dict[str, Any] | None) -> Liveness:
    """Whether the process of a record still runs; `elsewhere` when it ran on another machine or before a reboot."""
    import psutil

    if not owner or owner.get("machine") != machine():
        return "elsewhere"
    try:
        process = psutil.Process(owner["pid"])
        # A killed child stays in the process table until its parent has taken notice of it.
        same = abs(process.create_time() - owner["started"]) < _CLOCK_SLACK and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return "dead"
    return "alive" if same else "dead"
