"""Searches with real worker processes: kill -9, Ctrl-C, two at once. The trainer costs nothing."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from dense_lab.errors import MachineError
from dense_lab.files import read_json, read_lines
from dense_lab.results import read_study
from dense_lab.search import ledger as book
from dense_lab.search import search
from dense_lab.search.storage import default_url, load_study
from dense_lab.search.supervise import _Worker
from dense_lab.tracking import sync
from dense_lab.tracking.place import default_uri, open_client
from tests.search import fakes
from tests.search.helpers import CONTINUOUS, Here, study

ROOT = Path(__file__).parents[2]


def trials_of(folder):
    return load_study(default_url(folder), "s")[0].get_trials(deepcopy=False)


def workers_of(pid):
    """They are forked from a server, which is the child of the search."""
    servers = [child for child in psutil.Process(pid).children() if "forkserver" in " ".join(child.cmdline())]
    return [worker for server in servers for worker in server.children()]


def assert_settled(folder, count):
    """Every trial has finished, none was lost or trained without need, ledger and files agree."""
    results, trials = read_study(folder), trials_of(folder)
    assert results.complete
    assert len(results.trials) == count
    assert not [trial for trial in trials if trial.state.name in ("RUNNING", "WAITING")]
    told = book.latest(trials)
    for trial in results.trials:
        lines = list(read_lines(trial.folder / "metrics.jsonl"))
        assert [line["step"] for line in lines] == list(range(1, fakes.STEPS + 1))
        assert told[trial.number].value == lines[-1]["valid/loss"] == trial.metrics["valid/loss"]
        assert told[trial.number].params == trial.params
    points = [book.point(trial.params) for trial in results.trials]
    assert len(points) == len(set(points))
    # A trial is trained once for each of its attempts, and only an attempt that was interrupted has a successor.
    attempts = Counter(f"{book.root(trial):04d}" for trial in trials)
    assert all(calls <= attempts[name] for name, calls in Counter(fakes.calls(folder)).items())
    return results


def test_six_workers_on_a_fresh_folder_three_of_them_killed(tmp_path, monkeypatch):
    # On a busy machine MLflow may need longer than a user would wait.
    monkeypatch.setattr("dense_lab.search.engine.MLFLOW_PATIENCE", 300)
    folder, rng = tmp_path / "s", random.Random(0)
    killed, due = [], [rng.uniform(0.1, 1.0) for _ in range(3)]
    first = []

    def look(progress):
        if not progress.running or len(killed) == 3:
            return
        first.append(time.monotonic())
        if time.monotonic() - first[0] > sum(due[: len(killed) + 1]):
            victim = rng.choice(workers_of(os.getpid()))
            victim.send_signal(signal.SIGKILL)
            killed.append(victim.pid)

    space = study(tmp_path, CONTINUOUS, "trials: 24, sampler: random")
    outcome = search(space, folder, workers=6, train=fakes.slow, on_progress=look)
    assert len(killed) == 3
    assert (outcome.message, outcome.mlflow) == ("complete: 24 trials", "")
    results = assert_settled(folder, 24)
    lost = [t for t in trials_of(folder) if book.standing(t) == "lost"]
    assert all(trial.user_attrs["interrupted"].endswith("was killed by signal SIGKILL") for trial in lost)
    assert not sum(sync(folder).values())
    assert_mlflow_agrees(results)


def assert_mlflow_agrees(results):
    client = open_client(default_uri(results.folder))
    experiment = client.get_experiment_by_name(results.name)
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    children = {int(run.data.tags["trial"]): run for run in runs if "mlflow.parentRunId" in run.data.tags}
    assert len(runs) == 1 + len(children)
    assert sorted(children) == [trial.number for trial in results.trials]
    for trial in results.trials:
        run = children[trial.number]
        assert run.info.status == "FINISHED"
        assert run.data.params.items() >= {name: str(value) for name, value in trial.params.items()}.items()
        assert {k: v for k, v in run.data.metrics.items() if k in trial.metrics} == trial.metrics
        history = client.get_metric_history(run.info.run_id, "valid/loss")
        assert [(m.step, m.value) for m in history] == [(line["step"], line["valid/loss"]) for line in trial.curve]


SCRIPT = """
import sys
from pathlib import Path
from dense_lab.search import search
from dense_lab.space import Study
from tests.search import fakes
if __name__ == "__main__":
    outcome = search(Study.load(Path(sys.argv[1])), Path(sys.argv[2]), workers=2, train=fakes.slow, mlflow_uri="none")
    print(outcome.message, flush=True)
"""


def start(tmp_path):
    """A search in a process of its own, as soon as two trials are running."""
    script, folder = tmp_path / "go.py", tmp_path / "s"
    script.write_text(SCRIPT)
    study(tmp_path, CONTINUOUS, "trials: 8, sampler: random")
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "s.yaml"), str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: len(list(folder.glob("trials/*/metrics.jsonl"))) >= 3)
    return process, folder


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_parent_killed_its_workers_stop_and_the_next_search_goes_on(tmp_path):
    process, folder = start(tmp_path)
    workers = workers_of(process.pid)
    process.kill()
    process.wait()
    psutil.wait_procs(workers, timeout=60)
    assert not any(worker.is_running() for worker in workers)
    before = len(read_study(folder).having("complete"))
    space = study(tmp_path, CONTINUOUS, "trials: 8, sampler: random")
    outcome = search(space, folder, workers=2, train=fakes.train, mlflow_uri="none")
    assert outcome.trained >= 8 - before - len(workers)
    assert_settled(folder, 8)


def test_ctrl_c_leaves_running_trials_to_be_run_again(tmp_path):
    process, folder = start(tmp_path)
    # As a terminal does: to every process of the group.
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert "the same command goes on" in said
    assert process.returncode == 0
    trials = trials_of(folder)
    assert not [trial for trial in trials if trial.state.name == "RUNNING"]
    waiting = [trial for trial in trials if trial.state.name == "WAITING"]
    assert 1 <= len(waiting) <= 2
    assert all(trial.user_attrs["deaths"] == 0 for trial in waiting)
    assert {t.reason for t in read_study(folder).having("interrupted")} == {"stopped by the user"}
    search(study(tmp_path, CONTINUOUS, "trials: 8"), folder, workers=1, train=fakes.train, mlflow_uri="none")
    assert_settled(folder, 8)


def test_ctrl_c_twice_ends_at_once(tmp_path):
    process, folder = start(tmp_path)
    workers = workers_of(process.pid)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert not any(worker.is_running() for worker in workers)
    assert not [trial for trial in trials_of(folder) if trial.state.name == "RUNNING"]


def test_a_trial_that_kills_every_worker_is_given_up(tmp_path):
    space = study(tmp_path, CONTINUOUS, "trials: 1")
    outcome = search(space, tmp_path / "s", train=fakes.hopeless, mlflow_uri="none")
    (trial,) = outcome.results.trials
    assert trial.state == "failed"
    assert "was killed by signal SIGKILL; given up after 3 attempts" in trial.reason
    assert outcome.exit_code == 1
    assert outcome.results.complete


def test_workers_killed_between_two_trials_are_not_stillborn(tmp_path):
    here = Here(study(tmp_path, CONTINUOUS, "trials: 9"), tmp_path / "s", fakes.train)
    here.one()
    supervisor = here.search.supervisor

    def dies(pid):
        pipe, other = multiprocessing.Pipe()
        other.close()
        supervisor._mourn(_Worker(SimpleNamespace(pid=pid, exitcode=-9), pipe))

    for _ in range(5):
        dies(os.getpid())
    dies(2**22 + 1)
    dies(2**22 + 2)
    with pytest.raises(MachineError, match="3 workers in a row died before they claimed a trial"):
        dies(2**22 + 3)


def test_what_the_machine_lacks_is_no_failed_trial(tmp_path):
    space = study(tmp_path, CONTINUOUS, "trials: 2")
    with pytest.raises(MachineError, match="no GPU here"):
        search(space, tmp_path / "s", train=fakes.lacking, mlflow_uri="none")
    assert {t.state for t in read_study(tmp_path / "s").trials} == {"interrupted"}
    assert read_json(tmp_path / "s" / "trials" / "0000" / "trial.json")["interrupted"] == "no GPU here"


def test_a_second_search_of_the_same_folder_is_refused(tmp_path):
    space = study(tmp_path, CONTINUOUS, "trials: 1")
    asked = []

    def look(progress):
        if not asked:
            asked.append(progress)
            with pytest.raises(MachineError, match="another search is running this study"):
                search(space, tmp_path / "s", train=fakes.train, mlflow_uri="none")

    search(space, tmp_path / "s", train=fakes.train, mlflow_uri="none", on_progress=look)
    assert asked
