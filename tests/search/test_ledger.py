"""What counts, what is a copy, what is run again: a worker in this process, a trainer that costs nothing."""

import sqlite3
from dataclasses import replace

import optuna
import pytest

from dense_lab.errors import InputError, MachineError
from dense_lab.files import read_json, write_json
from dense_lab.results import read_study
from dense_lab.search import ledger as book
from dense_lab.search.changed import changed
from dense_lab.search.engine import _check_known
from dense_lab.search.owner import this_process
from dense_lab.training import code
from dense_lab.urls import masked
from tests.search.fakes import calls, stored, train
from tests.search.helpers import CONTINUOUS, SIX, Here, study

pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage")
DEAD = {"pid": 2**22 + 1, "started": 0.0}


def test_trials_are_the_total_and_a_complete_study_trains_nothing(tmp_path):
    space = study(tmp_path, CONTINUOUS, "trials: 3")
    assert Here(space, tmp_path / "s", train).run().message == "complete: 3 trials"
    assert Here(space, tmp_path / "s", train).run().results.complete
    assert len(calls(tmp_path / "s")) == 3
    Here(space, tmp_path / "s", train, trials=5).run()
    assert sorted(calls(tmp_path / "s")) == ["0000", "0001", "0002", "0003", "0004"]


def test_trials_that_a_lost_database_knew_are_not_taken_for_others(tmp_path):
    space = study(tmp_path, CONTINUOUS, "trials: 2")
    Here(space, tmp_path / "s", train).run()
    for file in (tmp_path / "s").glob("*.db*"):
        file.unlink()
    with pytest.raises(InputError, match=r"knows of 0 trials, trials/ holds 2 more.*--reuse"):
        Here(space, tmp_path / "s", train)
    (tmp_path / "s").rename(tmp_path / "old")
    again = Here(space, tmp_path / "s", train, reuse=[tmp_path / "old"])
    assert again.run().results.complete
    assert calls(again.folder) == []


def test_a_trial_that_is_begun_meanwhile_is_no_sign_of_a_lost_database(tmp_path):
    class Busy:
        """Whose next trial another machine takes, and makes the folder of, as soon as this one has been told of all."""

        def trials(self):
            (tmp_path / "trials" / "0000").mkdir(parents=True)
            return []

    _check_known(tmp_path, Busy(), "postgresql://host/base")


def test_code_that_changed_since_is_told(tmp_path):
    here = Here(study(tmp_path, CONTINUOUS, "trials: 3"), tmp_path / "s", train)
    here.run()
    now = code.digest("dense_lab")
    for number, was in enumerate((now, "00000000", "00000000")):
        file = here.folder / f"trials/{number:04d}/result.json"
        write_json(file, {**read_json(file), "tags": {**read_json(file)["tags"], "code": f"dense_lab={was},gone=1"}})
    (said,) = changed(here.folder)
    assert said.startswith(f"the source of dense_lab is {now} now; 2 of 3 finished trials were trained with 00000000")


def test_values_told_are_those_of_the_files(tmp_path):
    here = Here(study(tmp_path, CONTINUOUS, "trials: 3"), tmp_path / "s", train)
    outcome = here.run()
    for trial in here.ledger.trials():
        assert trial.value == stored(here.folder, trial.number)["metrics"]["valid/loss"]
        assert trial.params == outcome.results.trials[trial.number].params
    best = min(here.ledger.trials(), key=lambda trial: trial.value)
    assert outcome.results.best.number == best.number


def test_a_resumed_search_goes_on_as_one_that_was_not_interrupted(tmp_path):
    space = study(tmp_path, CONTINUOUS, "trials: 8, sampler: tpe")
    whole = Here(space, tmp_path / "whole", train).run().results
    Here(space, tmp_path / "parts", train, trials=6).run()
    parts = Here(space, tmp_path / "parts", train, trials=8).run().results
    assert [trial.params for trial in whole.trials] == [trial.params for trial in parts.trials]


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2"])
def test_no_point_is_trained_twice_and_a_finite_space_ends(tmp_path, sampler):
    outcome = Here(study(tmp_path, SIX, f"trials: 50, sampler: {sampler}"), tmp_path / "s", train).run()
    points = [tuple(trial.params.values()) for trial in outcome.results.trials]
    assert len(points) == len(set(points)) == 6 == len(calls(tmp_path / "s"))
    assert outcome.results.complete


def test_copies_are_told_the_known_value_and_do_not_count(tmp_path):
    here = Here(study(tmp_path, SIX, "trials: 6, sampler: random"), tmp_path / "s", train)
    here.run()
    trials = here.ledger.trials()
    copies = [trial for trial in trials if "copy_of" in trial.user_attrs]
    assert copies, "the seed has to be one with which the sampler repeats itself"
    assert len(trials) - len(copies) == 6 == len(calls(here.folder))
    for trial in copies:
        assert trial.values == trials[trial.user_attrs["copy_of"]].values


def test_a_grid_is_every_point_once_conditions_included(tmp_path):
    text = CONTINUOUS.replace("{float: [1e-4, 1e-1], log: true}", "{choice: [1e-3, 1e-2]}")
    text += "model: {core: {choice: [{kind: retnet, heads: {choice: [2, 4]}}, mamba]}}\n"
    space = study(tmp_path, text, "sampler: grid")
    outcome = Here(space, tmp_path / "s", train).run()
    found = {book.point(trial.params) for trial in outcome.results.trials}
    assert found == {book.point(point) for point in space.grid()}
    assert len(outcome.results.trials) == 6 == len(calls(tmp_path / "s"))
    Here(space, tmp_path / "s", train).run()
    assert len(calls(tmp_path / "s")) == 6


def test_a_grid_with_fewer_trials_is_a_part_of_it(tmp_path):
    outcome = Here(study(tmp_path, SIX, "sampler: grid, trials: 4"), tmp_path / "s", train).run()
    assert len({book.point(trial.params) for trial in outcome.results.trials}) == 4


def test_failures_do_not_stop_a_study(tmp_path):
    space = study(tmp_path, CONTINUOUS + "seed: {choice: [0, 13, 14]}\n", "trials: 12")
    outcome = Here(space, tmp_path / "s", train).run()
    states = {seed: {t.state for t in outcome.results.trials if t.params["seed"] == str(seed)} for seed in (0, 13, 14)}
    assert states == {0: {"complete"}, 13: {"failed"}, 14: {"failed"}}
    reasons = {t.params["seed"]: t.reason for t in outcome.results.trials}
    assert reasons["13"] == "valid/loss is nan at step 1"
    assert reasons["14"] == "RuntimeError: a component is broken"
    broken = next(t for t in outcome.results.trials if t.params["seed"] == "14")
    assert "a component is broken" in (broken.folder / "traceback.txt").read_text()
    assert outcome.exit_code == 0
    assert outcome.message.endswith(f"; {len(outcome.results.having('failed'))} of them failed")
    assert replace(outcome, stopped=True).exit_code == 130


def test_a_study_in_which_everything_failed_says_so(tmp_path):
    outcome = Here(study(tmp_path, CONTINUOUS + "seed: 13\n", "trials: 3"), tmp_path / "s", train).run()
    assert outcome.exit_code == 1
    assert len(outcome.results.having("failed")) == 3


def test_a_point_whose_parts_do_not_fit_fails_with_the_reason(tmp_path):
    text = (
        CONTINUOUS
        + "model: {core: {choice: [retnet, {kind: mamba, state: 16}]}}\nbudget: {params: 100, tolerance: 0}\n"
    )
    outcome = Here(study(tmp_path, text, "trials: 2"), tmp_path / "s", train).run()
    assert [t.state for t in outcome.results.trials] == ["failed", "failed"]
    assert all("budget" in t.reason for t in outcome.results.trials)
    assert calls(tmp_path / "s") == []


def test_pruned_trials_keep_their_reason_and_last_value(tmp_path):
    here = Here(study(tmp_path, CONTINUOUS, "trials: 14, pruner: median, sampler: random"), tmp_path / "s", train)
    pruned = here.run().results.having("pruned")
    assert pruned
    for trial in pruned:
        assert trial.reason.startswith("median: valid/loss")
        frozen = here.ledger.trials()[trial.number]
        assert frozen.state is optuna.trial.TrialState.PRUNED
        assert frozen.value == trial.metrics["valid/loss"]


def test_several_objectives(tmp_path):
    text = "trials: 8, objective: [{minimize: valid/loss}, {maximize: tokens_per_second}]"
    here = Here(study(tmp_path, CONTINUOUS, text), tmp_path / "s", train)
    results = here.run().results
    assert [d.name for d in here.ledger.study.directions] == ["MINIMIZE", "MAXIMIZE"]
    front = {trial.number for trial in results.pareto()}
    assert front == {trial.number for trial in here.ledger.study.best_trials}


def test_an_objective_that_trials_do_not_end_with(tmp_path):
    here = Here(study(tmp_path, CONTINUOUS, "trials: 1, objective: {maximize: valid/accuracy}"), tmp_path / "s", train)
    trial = here.run().results.trials[0]
    assert trial.state == "failed"
    assert "'valid/accuracy'" in trial.reason
    assert "valid/loss" in trial.reason


def kill_one(here, folder_says=None):
    """Leave a trial behind as a killed worker does."""
    trial = here.ledger.study.ask()
    trial.suggest_float("train.lr", 1e-4, 1e-1, log=True)
    owner = {**this_process(), **DEAD}
    trial.set_user_attr("claim", {"owner": owner})
    if folder_says:
        write_json(here.folder / "trials" / f"{trial.number:04d}" / "trial.json", {"owner": owner, **folder_says})
    return trial


def test_the_trial_of_a_dead_process_is_run_again_under_its_number(tmp_path):
    here = Here(study(tmp_path, CONTINUOUS, "trials: 2"), tmp_path / "s", train)
    lost = kill_one(here)
    outcome = here.run()
    assert [trial.number for trial in outcome.results.trials] == [0, 2]
    again = next(t for t in here.ledger.trials() if t.user_attrs.get("retry_of") == lost.number)
    assert again.params == lost.params == outcome.results.trials[0].params
    assert calls(here.folder) == ["0000", "0002"]
    assert not [t for t in here.ledger.trials() if t.state.name in ("RUNNING", "WAITING")]


def test_a_process_killed_before_it_signed_its_trial(tmp_path):
    here = Here(study(tmp_path, CONTINUOUS, "trials: 2"), tmp_path / "s", train)
    here.ledger.study.ask()
    assert len(here.run().results.having("complete")) == 2


def test_a_process_killed_between_training_and_telling_so(tmp_path):
    here = Here(study(tmp_path, CONTINUOUS, "trials: 1"), tmp_path / "s", train)
    lost = kill_one(here, {"params": {}})
    ended = {"status": "complete", "reason": "", "metrics": {"valid/loss": 0.5}, "tags": {}}
    write_json(here.folder / "trials" / "0000" / "result.json", ended)
    lost.set_user_attr("end", {"state": "complete"})
    here.run()
    assert calls(here.folder) == []
    assert here.ledger.trials()[1].value == 0.5


def test_settling_twice_queues_once(tmp_path):
    here = Here(study(tmp_path, CONTINUOUS, "trials: 3"), tmp_path / "s", train)
    kill_one(here)
    assert here.search.supervisor.settle() == [0]
    assert here.search.supervisor.settle() == []
    assert [book.standing(trial) for trial in here.ledger.trials()] == ["lost", "waiting"]


def test_the_trial_of_a_living_process_is_left_alone(tmp_path):
    here = Here(study(tmp_path, CONTINUOUS, "trials: 2"), tmp_path / "s", train)
    here.ledger.study.ask().set_user_attr("claim", {"owner": this_process()})
    assert here.search.supervisor.settle() == []
    here.run()
    assert calls(here.folder) == ["0001"]


def test_another_study_in_the_folder_is_refused(tmp_path):
    Here(study(tmp_path, CONTINUOUS, "trials: 1"), tmp_path / "s", train).run()
    with pytest.raises(InputError, match="1000 when study 's' began, 2000 now"):
        Here(study(tmp_path, CONTINUOUS.replace("1000", "2000"), "trials: 1"), tmp_path / "s", train)


def test_another_sampler_and_more_trials_go_on(tmp_path):
    Here(study(tmp_path, CONTINUOUS, "trials: 1"), tmp_path / "s", train).run()
    created = read_json(tmp_path / "s" / "manifest.json")["created"]
    results = Here(study(tmp_path, CONTINUOUS, "trials: 2, sampler: random"), tmp_path / "s", train).run().results
    assert len(results.trials) == 2
    assert results.manifest["sampler"]["name"] == "random"
    assert results.manifest["created"] == created


def test_reading_a_hundred_trials_is_quick(tmp_path):
    import time

    here = Here(study(tmp_path, CONTINUOUS, "trials: 1"), tmp_path / "s", train)
    here.run()
    template = here.folder / "trials" / "0000"
    for number in range(1, 100):
        copy = here.folder / "trials" / f"{number:04d}"
        copy.mkdir()
        for file in template.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
    times = []
    for _ in range(5):
        start = time.perf_counter()
        assert len(read_study(here.folder).trials) == 100
        times.append(time.perf_counter() - start)
    assert min(times) < 0.3


def test_two_machines_share_a_storage_and_its_total(tmp_path):
    space, url = study(tmp_path, CONTINUOUS, "trials: 4"), f"sqlite:///{tmp_path}/shared.db"
    one = Here(space, tmp_path / "one", train, trials=2, storage=url)
    one.run()
    other = Here(space, tmp_path / "other", train, storage=url)
    results = other.run().results
    assert [len(calls(here.folder)) for here in (one, other)] == [2, 2]
    assert [trial.folder is None for trial in results.trials] == [True, True, False, False]
    seen = read_study(one.folder).trials
    assert [trial.metrics["valid/loss"] for trial in seen] == [t.metrics["valid/loss"] for t in results.trials]
    assert seen[3].params == results.trials[3].params


def test_a_trial_of_another_machine_is_run_again_when_its_heart_stops(tmp_path):
    here = Here(
        study(tmp_path, CONTINUOUS, "trials: 1"), tmp_path / "s", train, storage=f"sqlite:///{tmp_path}/shared.db"
    )
    ledger, trial = here.ledger, here.ledger.study.ask()
    trial.set_user_attr("claim", {"owner": {"machine": "elsewhere", "pid": 1, "started": 0.0}})
    ledger.storage.record_heartbeat(trial._trial_id)
    ledger.fail_silent()
    ledger.requeue()
    assert [book.standing(t) for t in ledger.trials()] == ["running"]
    with sqlite3.connect(tmp_path / "shared.db") as connection:
        connection.execute("UPDATE trial_heartbeats SET heartbeat = '2020-01-01 00:00:00'")
    ledger.fail_silent()
    ledger.requeue()
    assert [book.standing(t) for t in ledger.trials()] == ["lost", "waiting"]
    here.run()
    assert calls(here.folder) == ["0000"]


def test_a_storage_that_is_none_and_one_that_does_not_answer(tmp_path):
    space = study(tmp_path, CONTINUOUS, "trials: 1")
    with pytest.raises(InputError, match="--storage nonsense"):
        Here(space, tmp_path / "a", train, storage="nonsense")
    with pytest.raises(MachineError, match=r"--storage sqlite:////nowhere/x\.db"):
        Here(space, tmp_path / "b", train, storage="sqlite:////nowhere/x.db")
    assert masked("postgresql://me:secret@host/base") == "postgresql://me@host/base"
