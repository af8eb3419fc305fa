"""The full kill test, with the real trainer: `python -m tests.search.chaos [FOLDER] [--trials N] [--workers N]`.

On a fresh folder, six workers train small models of both cores while MLflow's database is locked for a time. Three of
them are killed with -9 at random moments, then the parent; the same search is resumed, a worker is killed again, and
Ctrl-C stops it once more before the last resumption ends it. Then every trial has to be complete, none trained twice,
and Optuna's storage and MLflow have to agree with metrics.jsonl to the last digit. Prints what it saw; exit code 1 if
something is wrong. Takes a few minutes on two cores.
"""

import argparse
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import psutil

from dense_lab.files import read_lines
from dense_lab.results import read_study
from dense_lab.search import ledger as book
from dense_lab.search.storage import default_url, load_study
from dense_lab.tracking import sync
from dense_lab.tracking.place import default_uri, open_client

ROOT = Path(__file__).parents[2]
STUDY = """
dense_lab: 1
name: chaos
data: {kind: python_source, seq_len: 32, tokenizer: byte}
model:
  width: 32
  depth: 2
  core: {choice: [retnet, mamba]}
  dense: {choice: [none, {kind: densessm, span: {int: [1, 2]}}]}
train: {tokens: 48k, batch_tokens: 512, lr: {float: [1e-3, 1e-2], log: true}, evaluations: 4, valid_tokens: 2k,
        test_tokens: 2k, checkpoints: 4}
"""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path, default=Path("chaos-runs"))
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    (options.folder / "chaos.yaml").write_text(STUDY)
    rng, folder = random.Random(options.seed), options.folder / "chaos"
    locker = threading.Thread(target=lock_mlflow, args=(folder,), daemon=True)
    locker.start()
    first = start(options, folder)
    for _ in range(3):
        kill_a_worker(first, rng)
    time.sleep(rng.uniform(1, 4))
    workers = workers_of(first.pid)
    say(f"killing the parent {first.pid} with -9; it had {len(workers)} workers")
    first.kill()
    first.wait()
    psutil.wait_procs(workers, timeout=60)
    say(f"orphans left: {sum(worker.is_running() for worker in workers)}")
    second = start(options, folder)
    kill_a_worker(second, rng)
    time.sleep(rng.uniform(1, 3))
    say("Ctrl-C")
    second.send_signal(signal.SIGINT)
    say(f"it ended with exit code {second.wait(timeout=120)}")
    last = start(options, folder)
    say(f"the last resumption ended with exit code {last.wait()}")
    locker.join()
    return verdict(folder, options.trials)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def start(options: argparse.Namespace, folder: Path) -> subprocess.Popen[bytes]:
    """The command a user types, once something is being trained."""
    command = [str(Path(sys.executable).with_name("dense-lab")), "search", str(options.folder / "chaos.yaml")]
    command += ["--runs", str(options.folder), "--workers", str(options.workers), "--trials", str(options.trials)]
    say(" ".join(["dense-lab", *command[1:]]))
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None and not any(trial.state == "running" for trial in trials_of(folder)):
        time.sleep(0.2)
    return process


def trials_of(folder: Path) -> list:
    return read_study(folder).trials if (folder / "manifest.json").exists() else []


def workers_of(pid: int) -> list[psutil.Process]:
    """They are forked from a server, which is the child of the search."""
    try:
        servers = [child for child in psutil.Process(pid).children() if "forkserver" in " ".join(child.cmdline())]
        return [worker for server in servers for worker in server.children()]
    except psutil.NoSuchProcess:
        return []


def kill_a_worker(process: subprocess.Popen[bytes], rng: random.Random) -> None:
    time.sleep(rng.uniform(0.2, 3))
    workers = workers_of(process.pid)
    if workers:
        victim = rng.choice(workers)
        say(f"killing worker {victim.pid} with -9")
        os.kill(victim.pid, signal.SIGKILL)


def lock_mlflow(folder: Path, seconds: float = 20) -> None:
    """Hold MLflow's database so that nobody else can write, from soon after it is there."""
    while not (folder / "mlflow.db").exists():
        time.sleep(0.2)
    time.sleep(3)
    with closing(sqlite3.connect(folder / "mlflow.db", timeout=60, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        say(f"MLflow's database is locked for {seconds:.0f} s")
        time.sleep(seconds)
        connection.execute("ROLLBACK")


def verdict(folder: Path, count: int) -> int:
    """Print every check and whether it holds."""
    results = read_study(folder)
    ledger = load_study(default_url(folder), results.name)[0].get_trials(deepcopy=False)
    told = book.latest(ledger)
    checks = {
        f"{count} trials, all complete": [t.state for t in results.trials] == ["complete"] * count,
        "no attempt is left running or waiting": not [t for t in ledger if t.state.name in ("RUNNING", "WAITING")],
        "no point twice": len({trial.digest for trial in results.trials}) == len(results.trials),
        "one finished attempt each": set(
            Counter(book.root(t) for t in ledger if book.standing(t) == "finished").values()
        )
        == {1},
        "Optuna agrees with metrics.jsonl": all(
            told[trial.number].value == list(read_lines(trial.folder / "metrics.jsonl"))[-1]["valid/loss"]
            for trial in results.trials
        ),
    }
    say(sync(folder).__str__())
    checks["a second sync sends nothing"] = not sum(sync(folder).values())
    checks["MLflow agrees with metrics.jsonl"] = mlflow_agrees(results)
    for text, holds in checks.items():
        say(f"{'yes' if holds else 'NO '} {text}")
    interrupted = Counter(trial.user_attrs["interrupted"] for trial in ledger if "interrupted" in trial.user_attrs)
    say(f"{len(ledger)} attempts at {len(results.trials)} trials; interrupted: {dict(interrupted)}")
    return int(not all(checks.values()))


def mlflow_agrees(results) -> bool:
    client = open_client(default_uri(results.folder))
    experiment = client.get_experiment_by_name(results.name)
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    children = {int(run.data.tags["trial"]): run for run in runs if "mlflow.parentRunId" in run.data.tags}
    if len(runs) != 1 + len(results.trials) or sorted(children) != [trial.number for trial in results.trials]:
        return False
    for trial in results.trials:
        run = children[trial.number]
        if run.info.status != "FINISHED":
            return False
        for name in ("train/loss", "valid/loss"):
            history = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
            if history != [(line["step"], line[name]) for line in trial.curve if name in line]:
                return False
    return True


if __name__ == "__main__":
    sys.exit(main())
