"""`dense-lab ui` and the server that it starts, which a stand-in for MLflow plays."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SERVER = """
import os, subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
with open("pids.part", "w") as file:
    file.write(f"{os.getpid()} {worker.pid}")
os.rename("pids.part", "pids")
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_server_and_its_workers_end_with_the_command(number: int, tmp_path: Path) -> None:
    study = tmp_path / "study"
    study.mkdir()
    (study / "manifest.json").write_text("{}")
    (study / "mlflow.db").touch()
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "__init__.py").touch()
    (tmp_path / "mlflow" / "__main__.py").write_text(SERVER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    main = f"from dense_lab.cli import main; main(['ui', 'study', '--port', '{port}'])"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = subprocess.Popen([sys.executable, "-c", main], cwd=tmp_path, env=environment, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pids").exists() and command.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    started = [psutil.Process(int(pid)) for pid in (tmp_path / "pids").read_text().split()]
    command.send_signal(number)
    assert command.wait(30) == 0
    alive = psutil.wait_procs(started, timeout=10)[1]
    for process in alive:
        process.kill()
    assert not alive
