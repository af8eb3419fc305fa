"""The projection to MLflow: what it holds, that sending twice changes nothing, and what breaks it and mends it."""

import json
import shutil
import socket
import sqlite3
import time
from contextlib import closing

import pytest

from dense_lab.errors import MachineError
from dense_lab.files import read_json, write_json
from dense_lab.results import read_study
from dense_lab.search import project
from dense_lab.tracking import record, sync
from dense_lab.tracking.mlflow_store import Projection
from dense_lab.tracking.place import MEMORY, default_uri, open_client
from tests.search.fakes import train
from tests.search.helpers import CONTINUOUS, Here, study


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A finished study, and MLflow's empty database, which takes seconds to make."""
    folder = tmp_path_factory.mktemp("original")
    text = CONTINUOUS + "model: {core: {choice: [{kind: retnet, heads: {choice: [2, 4]}}, {kind: mamba, state: 8}]}}\n"
    text += "seed: {choice: [0, 13]}\n"
    Here(study(folder, text, "trials: 5, sampler: random"), folder / "s", train).run()
    open_client(default_uri(folder / "s")).search_experiments()
    return folder / "s"


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "s")


def runs_of(folder):
    """The parent run and the trials' runs by number."""
    client = open_client(default_uri(folder))
    experiment = client.get_experiment_by_name("s")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = {
        int(r.data.tags["trial"]): r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    }
    assert len(runs) == 1 + len(children)
    return parent, children


def everything(folder):
    """All rows that MLflow has."""
    with closing(sqlite3.connect(folder / "mlflow.db")) as connection:
        tables = ("runs", "metrics", "latest_metrics", "params", "tags", "experiments")
        return {table: sorted(map(repr, connection.execute(f"SELECT * FROM {table}"))) for table in tables}


def test_a_run_says_what_the_files_say(folder):
    sync(folder)
    parent, runs = runs_of(folder)
    results = read_study(folder)
    assert parent.info.run_name == "s"
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["best/valid/loss"] == results.best.metrics["valid/loss"]
    assert sorted(runs) == [trial.number for trial in results.trials]
    for trial in results.trials:
        run = runs[trial.number]
        assert run.info.status == {"complete": "FINISHED", "failed": "FAILED"}[trial.state]
        assert run.info.start_time == record.milliseconds(trial.started)
        assert run.info.end_time == record.milliseconds(trial.ended)
        assert run.data.tags["spec"] == trial.digest
        assert run.data.tags["study"] == "s"
        assert run.data.tags.get("reason", "") == trial.reason
        # Names and values are those of the study's own dotted paths, so that they may be given to --set.
        assert run.data.params["train.lr"] == str(trial.params["train.lr"])
        assert run.data.params["train.beta2"] == "0.95"
        core = trial.params["model.core"]
        below = {"retnet": ("heads", trial.params.get("model.core.retnet.heads")), "mamba": ("state", 8)}[core]
        assert run.data.params["model.core"] == core
        assert run.data.params[f"model.core.{core}.{below[0]}"] == str(below[1])
        assert run.data.metrics["state_bytes"] == 64
        files = {file.path for file in open_client(default_uri(folder)).list_artifacts(run.info.run_id)}
        assert files >= {"spec.json", "result.json"}


def test_metrics_are_those_of_the_curve_with_the_trials_clock(folder):
    sync(folder)
    client = open_client(default_uri(folder))
    for number, run in runs_of(folder)[1].items():
        trial = read_study(folder).trials[number]
        start = record.milliseconds(trial.started)
        found = [(m.step, m.value, m.timestamp) for m in client.get_metric_history(run.info.run_id, "valid/loss")]
        told = [(line["step"], line["valid/loss"], start + round(1000 * line["seconds"])) for line in trial.curve]
        assert found == told


def test_sending_twice_changes_nothing(folder):
    assert sync(folder)["runs"] == 6
    before = everything(folder)
    assert str(sync(folder)) == "MLflow has everything"
    assert everything(folder) == before


def test_sending_again_with_the_memory_lost_changes_nothing(folder):
    sync(folder)
    before = everything(folder)
    for memory in [folder / MEMORY, *folder.glob(f"trials/*/{MEMORY}")]:
        memory.unlink()
    assert sync(folder)["runs"] == 0
    assert everything(folder) == before


def test_what_mlflow_has_lost_is_sent_again(folder, tmp_path):
    sync(folder)
    # Elsewhere, since MLflow holds on to a database that it has open.
    moved = shutil.copytree(folder, tmp_path / "moved", ignore=shutil.ignore_patterns("mlflow.db"))
    assert sync(moved)["runs"] == 6
    assert len(everything(moved)["metrics"]) == len(everything(folder)["metrics"])
    client, (_, runs) = open_client(default_uri(folder)), runs_of(folder)
    client.delete_run(runs[0].info.run_id)
    assert sync(folder)["runs"] == 1
    assert sorted(runs_of(folder)[1]) == [0, 1, 2, 3, 4]


def test_a_projection_cut_short_is_completed(folder, original, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    real, left = MlflowClient.log_batch, [7]

    def tired(self, *args, **options):
        left[0] -= 1
        if left[0] < 0:
            raise ConnectionError("gone")
        return real(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", tired)
        with pytest.raises(MachineError, match="gone"):
            sync(folder)
    assert sync(folder)["points"] > 0
    whole = shutil.copytree(original, tmp_path / "whole")
    sync(whole)
    assert [len(rows) for rows in everything(folder).values()] == [len(rows) for rows in everything(whole).values()]


def test_a_curve_that_went_back_to_a_checkpoint_replaces_its_run(folder):
    projection = Projection(folder)
    number = read_study(folder).having("complete")[0].number
    trial = folder / "trials" / f"{number:04d}"
    result, lines = read_json(trial / "result.json"), (trial / "metrics.jsonl").read_text().splitlines()
    (trial / "result.json").unlink()
    projection.send(read_study(folder))
    changed = [json.loads(line) for line in lines]
    changed[3]["valid/loss"] = 7.5
    (trial / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    write_json(trial / "result.json", result)
    projection.send(read_study(folder))
    run = runs_of(folder)[1][number]
    history = projection.client.get_metric_history(run.info.run_id, "valid/loss")
    # The last point is the final metric, which result.json has and the curve does not end with.
    assert [m.value for m in history][:4] == [line["valid/loss"] for line in changed]


def test_a_running_trial_is_shown_and_then_ended(folder):
    number = read_study(folder).having("complete")[0].number
    trial = folder / "trials" / f"{number:04d}"
    result = (trial / "result.json").read_text()
    (trial / "result.json").unlink()
    projection = Projection(folder)
    projection.send(read_study(folder))
    run = runs_of(folder)[1][number]
    assert run.info.status == "RUNNING"
    assert "train/loss" in run.data.metrics
    (trial / "result.json").write_text(result)
    projection.send(read_study(folder))
    ended = runs_of(folder)[1][number]
    assert (ended.info.run_id, ended.info.status) == (run.info.run_id, "FINISHED")


@pytest.mark.parametrize("victim", ["locked", "unreachable"])
def test_mlflow_out_of_reach_costs_the_search_nothing_and_is_repaired_later(folder, victim, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    with closing(sqlite3.connect(folder / "mlflow.db", isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        uri = default_uri(folder) if victim == "locked" else nobody
        projector = project.Projector(folder, uri)
        began = time.monotonic()
        projector.start()
        said = projector.finish(20)
        assert time.monotonic() - began < 25
        assert f"`dense-lab sync {folder}` completes it" in said
        if victim == "locked":
            with pytest.raises(MachineError, match="locked"):
                sync(folder)
    sync(folder)
    assert sorted(runs_of(folder)[1]) == [0, 1, 2, 3, 4]
