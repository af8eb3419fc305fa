"""`dense-lab ui`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

import click

from dense_lab.cli import options

TRIALS = "searchFilter=tags.role%20%3D%20%22trial%22&orderByKey=metrics.%60valid%2Floss%60&orderByAsc=true"
"""MLflow's pages hide nested runs until they are searched for; each study's own store has it as experiment 1."""


@click.command("ui")
@click.argument("study", type=click.Path(path_type=Path))
@options.runs
@click.option("--port", default=5000, show_default=True)
@click.option("--host", default="127.0.0.1", show_default=True)
def command(study: Path, runs: Path, port: int, host: str) -> None:
    """Browse STUDY's runs in MLflow's web pages; Ctrl-C ends it."""
    from dense_lab.errors import InputError, MachineError

    folder = options.study_folder(study, runs)
    store = folder / "mlflow.db"
    if not store.exists():
        raise InputError(f"{store} does not exist: `dense-lab sync {study}` makes it from the study's files")
    with socket.socket() as probe:
        if probe.connect_ex((host, port)) == 0:
            raise MachineError(f"port {port} on {host} is in use: give another with --port")
    url = f"sqlite:///{store.resolve()}"
    trials = f"http://{host}:{port}/#/experiments/1/runs?{TRIALS}"
    options.console().print(f"MLflow answers in about ten seconds; the trials, best first: {trials}", soft_wrap=True)
    arguments = ["--backend-store-uri", url, "--host", host, "--port", str(port), "--workers", "1"]
    if code := _serve([sys.executable, "-m", "mlflow", "ui", *arguments]):
        raise MachineError(f"MLflow's server ended with code {code}")


def _serve(command: Sequence[str]) -> int:
    """Run the server until it ends, or with all its processes until this one is told to; its code, 0 when told to."""
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    # A group of its own, so that a signal to this process alone can be passed on to workers that the server started.
    server = subprocess.Popen(command, env=environment, start_new_session=True)
    asked = []

    def stop(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    code = server.wait()
    return 0 if asked else code
