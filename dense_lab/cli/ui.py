"""`dense-lab ui`."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

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
    import os

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
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    code = subprocess.run([sys.executable, "-m", "mlflow", "ui", *arguments], check=False, env=environment).returncode
    if code not in (0, 130, -2):
        raise MachineError(f"MLflow's server ended with code {code}")
