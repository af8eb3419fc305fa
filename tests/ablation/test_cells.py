"""Cells as queued trials: their order, what is new and what is not, tuning, reuse, more seeds until decided."""

from collections import Counter

import pytest

from dense_lab.ablation import tuning
from dense_lab.ablation.results import cells
from dense_lab.errors import InputError
from dense_lab.files import read_json, write_json
from dense_lab.results import read_study
from dense_lab.search.progress import arms
from tests.ablation.studies import ARMS, study, train
from tests.search.fakes import calls
from tests.search.helpers import Here

TUNED = ARMS + "tune: {lr: [1e-5, 1e-3, 1e-2], weight_decay: [0, 0.1], tokens: 1k}\n"
SMALL = ARMS + "tune: {lr: [1e-5, 1e-3], tokens: 1k}\n"


def said(results):
    return [(t.role, t.label, t.params["seed"]) for t in results.trials]


def run(tmp_path, *changes, text=ARMS, folder="s", **options):
    return Here(study(tmp_path, text, *changes), tmp_path / folder, train, **options).run()


def test_every_arm_of_a_seed_comes_before_the_next_seed(tmp_path):
    outcome = run(tmp_path)
    assert outcome.message == "complete: 6 trials"
    assert said(outcome.results) == [("cell", arm, seed) for seed in (0, 1) for arm in ("plain", "span-1", "mamba")]
    trial = outcome.results.trials[5]
    assert trial.params == {"arm": "mamba", "seed": 1}
    assert {k: trial.tags[k] for k in ("arm", "seed", "role")} == {"arm": "mamba", "seed": "1", "role": "cell"}
    assert (trial.spec["seed"], trial.values["model.core.state"], trial.values["train.tokens"]) == (1, 8, 4000)
    stored = read_json(tmp_path / "s" / "study.json")["x-ablation"]
    assert (stored["baseline"], stored["seeds"], stored["tune"]) == ("plain", [0, 1], None)
    found = cells(outcome.results, "test/loss")
    assert {arm: sorted(values) for arm, values in found.items()} == {
        "plain": [0, 1],
        "span-1": [0, 1],
        "mamba": [0, 1],
    }
    assert found["plain"][1] == read_json(tmp_path / "s" / "trials" / "0003" / "result.json")["metrics"]["test/loss"]


def test_only_what_is_new_is_trained(tmp_path):
    run(tmp_path)
    assert run(tmp_path).results.complete
    assert len(calls(tmp_path / "s")) == 6
    run(tmp_path, ("seeds: 2", "seeds: 3"))
    assert len(calls(tmp_path / "s")) == 9
    deep = ("baseline:", "  deep: {model.core: retnet, model.depth: 4}\nbaseline:")
    results = run(tmp_path, ("seeds: 2", "seeds: 3"), deep).results
    assert len(calls(tmp_path / "s")) == 12
    assert [(arm.name, arm.done, arm.cells) for arm in arms(results)][-1] == ("deep", 3, 3)
    # What the first arms mean stays fixed, and what the new one means is fixed from now on.
    for change in (("span: 1", "span: 2"), ("model.depth: 4", "model.depth: 5")):
        with pytest.raises(InputError, match="when study 's' began"):
            run(tmp_path, ("seeds: 2", "seeds: 3"), deep, change) if change[0] != "model.depth: 4" else run(
                tmp_path, ("seeds: 2", "seeds: 3"), (deep[0], deep[1].replace(*change))
            )
    assert results.total == 12


def test_an_arm_that_was_left_out_keeps_its_trials(tmp_path):
    run(tmp_path)
    results = run(
        tmp_path, ("  mamba: {model.core: mamba, model.core.state: 8}\n", ""), ("seeds: 2", "seeds: 3")
    ).results
    assert len(results.trials) == 8
    assert set(cells(results, "test/loss")) == {"plain", "span-1"}


def test_a_cell_whose_worker_died_is_run_again_under_its_number(tmp_path):
    here = Here(study(tmp_path), tmp_path / "s", train)
    here.one()
    here.search.plan.may_start(here.ledger)
    lost = here.ledger.study.ask()
    lost.set_user_attr("claim", {"owner": {"machine": "gone", "pid": 2**22 + 1, "started": 0.0}})
    here.ledger.study.tell(lost, state=lost_state())
    results = here.run().results
    assert said(results) == [("cell", arm, seed) for seed in (0, 1) for arm in ("plain", "span-1", "mamba")]
    again = [t for t in here.ledger.trials() if t.user_attrs.get("retry_of") == 1]
    assert [t.user_attrs["cell"]["arm"] for t in again] == ["span-1"]
    assert calls(here.folder) == ["0000", "0001", "0003", "0004", "0005", "0006"]


def lost_state():
    from optuna.trial import TrialState

    return TrialState.FAIL


def test_a_cell_that_fails_stops_nothing(tmp_path):
    results = run(tmp_path, ("seeds: 2", "seeds: [12, 13]")).results
    assert [t.state for t in results.trials] == ["complete"] * 3 + ["failed"] * 3
    assert [(arm.done, arm.failed, arm.cells) for arm in arms(results)] == [(1, 1, 2)] * 3


def test_trials_are_not_for_ablations(tmp_path):
    with pytest.raises(InputError, match="--trials 3: an ablation trains every cell"):
        run(tmp_path, trials=3)


def test_every_arm_is_tuned_on_the_same_grid_before_its_cells(tmp_path):
    results = run(tmp_path, text=TUNED).results
    roles = Counter((t.role, t.label) for t in results.trials)
    assert {(role, arm): n for (role, arm), n in roles.items() if role == "tune"} == {
        ("tune", arm): 6 for arm in ("plain", "span-1", "mamba")
    }
    assert [t.role for t in results.trials] == ["tune"] * 18 + ["cell"] * 6
    tuning_run = results.trials[0]
    assert tuning_run.params == {"arm": "plain", "seed": 100, "train.lr": 1e-5, "train.weight_decay": 0}
    assert (tuning_run.spec["train"]["tokens"], tuning_run.spec["train"]["test_tokens"]) == (1000, 0)
    for cell in results.trials[18:]:
        # Of equal losses the first of the grid: the loss of this trainer knows no weight decay.
        assert (cell.spec["train"]["lr"], cell.spec["train"]["weight_decay"]) == (1e-3, 0)
        assert cell.spec["train"]["tokens"] == 4000
        assert cell.tuned == {"train.lr": 1e-3, "train.weight_decay": 0}
        assert cell.tags["tune.edge"] == "train.weight_decay"
    told = read_json(tmp_path / "s" / "manifest.json")["tuned"]
    assert told["span-1"]["trials"] == [6, 7, 8, 9, 10, 11]
    assert told["span-1"]["trial"] == 8
    assert results.best.role == "cell"


def test_cells_of_an_arm_that_could_not_be_tuned_fail_with_the_reason(tmp_path):
    text = TUNED.replace("tokens: 1k", "tokens: 1k, seed: 13")
    results = run(tmp_path, text=text).results
    assert {t.state for t in results.trials} == {"failed"}
    assert results.trials[-1].reason.startswith(
        "all 6 tuning trials of this arm failed; the first, 12: valid/loss is nan"
    )
    assert len(calls(tmp_path / "s")) == 18


def test_the_edges_of_a_grid():
    grid = [{"train.lr": lr, "train.weight_decay": 0.1} for lr in (1, 2, 3)]
    assert [tuning.edges(point, grid) for point in grid] == [["train.lr"], [], ["train.lr"]]


def test_what_another_study_has_trained_is_taken_over(tmp_path):
    first = run(tmp_path, text=SMALL, folder="first", workers=2).results
    assert {t.tags["sharing"] for t in first.trials} == {"2"}
    deep = ("  mamba: {model.core: mamba, model.core.state: 8}", "  deep: {model.core: retnet, model.depth: 3}")
    results = run(tmp_path, deep, text=SMALL, folder="second", reuse=(tmp_path / "first",)).results
    assert results.complete
    taken = [t for t in results.trials if "reused_from" in t.tags]
    assert Counter((t.role, t.label) for t in taken) == {
        ("tune", "plain"): 2, ("tune", "span-1"): 2, ("cell", "plain"): 2, ("cell", "span-1"): 2
    }  # fmt: skip
    assert len(calls(tmp_path / "second")) == 2 + 2
    for trial in taken:
        origin = (trial.folder.parent.parent / trial.tags["reused_from"]).resolve()
        source = next(t for t in first.trials if t.folder.resolve() == origin)
        assert (source.metrics, source.curve, source.digest) == (trial.metrics, trial.curve, trial.digest)
        assert (source.started, source.ended) == (trial.started, trial.ended)
        assert trial.tags["sharing"] == "2"
    other = run(tmp_path, ("tokens: 4k", "tokens: 5k"), text=SMALL, folder="third", reuse=(tmp_path / "first",)).results
    assert {t.role for t in other.trials if "reused_from" in t.tags} == {"tune"}


def test_what_was_mixed_with_another_trial_is_a_failure_and_not_taken_over(tmp_path):
    """As when what two machines wrote is copied into one folder."""
    run(tmp_path, folder="first")
    mixed = tmp_path / "first/trials/0000/result.json"
    said = read_json(mixed)
    write_json(mixed, {**said, "tags": {**said["tags"], "spec": "0" * 12}})
    trial = read_study(tmp_path / "first").trials[0]
    assert trial.state == "failed"
    assert trial.reason.startswith(f"result.json is of the spec {'0' * 12}, trial.json of {trial.digest}: ")
    results = run(tmp_path, folder="second", reuse=(tmp_path / "first",)).results
    assert ["reused_from" in t.tags for t in results.trials] == [False] + [True] * 5


def test_reuse_of_what_is_no_study(tmp_path):
    from dense_lab.search import search

    with pytest.raises(InputError, match=r"--reuse .*nothing: no study here"):
        search(study(tmp_path), tmp_path / "s", reuse=[tmp_path / "nothing"], train=train)
    with pytest.raises(InputError, match="the study's own folder"):
        search(study(tmp_path), tmp_path / "s", reuse=[tmp_path / "s"], train=train)


def test_seeds_are_added_to_undecided_arms_only(tmp_path):
    """Depth 4 is worse by 0.2 at a noise of 0.01; span-1 is the baseline's twin but for its noise."""
    from dense_lab.search import search

    text = ARMS.replace("model.core: mamba, model.core.state: 8", "model.core: retnet, model.depth: 4").replace(
        "seeds: 2", "seeds: 4"
    )
    space = study(tmp_path, text)
    outcome = search(space, tmp_path / "s", train=train, mlflow_uri="none", max_seeds=5)
    found = {arm: sorted(values) for arm, values in cells(outcome.results, "test/loss").items()}
    assert found["mamba"] == [0, 1, 2, 3]
    assert found["plain"] == found["span-1"] == [0, 1, 2, 3, 4]
    assert outcome.results.ablation.looks == (4, 5)
    assert outcome.results.complete
    again = search(space, tmp_path / "s", train=train, mlflow_uri="none", max_seeds=5)
    assert again.message == "complete already: 14 trials; nothing was trained"
    with pytest.raises(InputError, match="looked at after 4 to 5 seeds"):
        search(space, tmp_path / "s", train=train, mlflow_uri="none", max_seeds=6)
    assert read_study(tmp_path / "s").total == 14


def test_looks_are_known_before_the_first_one(tmp_path):
    """It may decide every arm: nothing is added then, and yet the report has to count it as one look of several."""
    here = Here(study(tmp_path), tmp_path / "s", train, max_seeds=5)
    assert read_study(here.folder).ablation.looks == (2, 5)
    assert here.run().results.ablation.looks == (2, 5)
