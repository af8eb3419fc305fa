"""Reproduction: what is chosen, what is compared, and what is said of it."""

import json
import math

import numpy as np
import pytest
from click.testing import CliRunner

from dense_lab.errors import InputError, MachineError
from dense_lab.files import read_json, write_json
from dense_lab.registry import default
from dense_lab.reproduce import reproduce
from dense_lab.reproduce.agreement import expected
from dense_lab.reproduce.recorded import recorded, stored_spec
from dense_lab.space import Study
from tests.reproduce import fakes
from tests.search.helpers import HEAD, Here, study

ABLATION = (
    HEAD
    + """
data: {kind: mqar, seq_len: 32, vocab: 64, pairs: 2}
train: {tokens: 1k, batch_tokens: 128, evaluations: 2, valid_tokens: 256, test_tokens: 256}
model: {width: 16, depth: 2, core: retnet}
arms:
  plain: {}
  dense: {model.dense: {kind: densessm, span: 1}, model.width: 24}
baseline: plain
seeds: 3
"""
)
OPTIONS = {"device": "cpu", "other_data": "allowed"}


@pytest.fixture
def finished(tmp_path, here):
    made = Here(study(tmp_path, ABLATION), tmp_path / "runs" / "s", fakes.steady)
    made.run()
    return made.folder


@pytest.fixture
def here(monkeypatch):
    """The new runs are trained by this process: none is started."""

    def search(study, folder, *, train=None, **options):
        return Here(study, folder, train).run()

    monkeypatch.setattr("dense_lab.search.search", search)


def outcomes(made):
    return {(one.kind, one.arm, one.seed): one.outcome for one in made.agreements}


def test_the_same_numbers_are_exact(finished):
    made = reproduce(finished, train=fakes.steady, **OPTIONS)
    assert made.reproduced
    assert set(outcomes(made).values()) == {"exact"}
    assert len(made.agreements) == 2 * 3 + 2 + 1
    assert made.summary() == "reproduced: 6 of 6 runs bit for bit"
    assert made.folder == finished / "reproduced" / "all"
    assert read_json(made.folder / "reproduce.json") == json.loads(json.dumps(made.as_json()))


def test_other_rounding_is_inside(finished):
    made = reproduce(finished / "trials" / "0000", train=fakes.rounded, **OPTIONS)
    assert outcomes(made) == {("trial", "plain", 0): "inside"}
    assert made.reproduced
    assert made.folder.name == "trial-0000"


def test_the_last_number_alone_is_not_bit_for_bit(finished):
    made = reproduce(finished / "trials" / "0000", train=fakes.other_way, **OPTIONS)
    assert outcomes(made) == {("trial", "plain", 0): "inside"}


def test_other_numbers_are_outside_but_their_differences_need_not_be(finished):
    made = reproduce(finished, train=fakes.shifted, **OPTIONS)
    assert not made.reproduced
    said = outcomes(made)
    assert {said["trial", "plain", seed] for seed in range(3)} == {"outside"} == {said["arm", "dense", None]}
    assert said["difference", "dense", None] == "inside"
    assert made.summary().startswith("NOT reproduced: 8 of 9 numbers")


def test_a_run_that_fails_is_not_reproduced(finished):
    made = reproduce(finished, train=fakes.failing, **OPTIONS)
    said = outcomes(made)
    assert said["trial", "plain", 1] == said["arm", "plain", None] == said["difference", "dense", None] == "failed"
    assert said["trial", "plain", 0] == "exact"
    assert not made.reproduced
    assert read_json(made.folder / "reproduce.json")["numbers"][1]["new"] is None


def test_arms_and_seeds_are_chosen_and_finished_runs_kept(finished, tmp_path):
    into = tmp_path / "again"
    first = reproduce(finished, train=fakes.steady, arms=["plain"], seeds=[0, 2], into=into, **OPTIONS)
    assert list(outcomes(first)) == [("trial", "plain", 0), ("trial", "plain", 2), ("arm", "plain", None)]
    assert len(fakes.calls(into)) == 2
    whole = reproduce(finished, train=fakes.steady, arms=["plain"], into=into, **OPTIONS)
    assert whole.reproduced
    assert len(fakes.calls(into)) == 3
    assert (finished / "reproduced").exists() is False


def test_an_interrupted_reproduction_goes_on(finished):
    with pytest.raises(MachineError, match="went down"):
        reproduce(finished, train=fakes.fails_once, arms=["plain"], **OPTIONS)
    made = reproduce(finished, train=fakes.fails_once, arms=["plain"], **OPTIONS)
    assert made.reproduced
    assert len(fakes.calls(made.folder)) == 3


def test_runs_of_an_earlier_call_by_other_code_are_not_taken_for_new_ones(finished):
    made = reproduce(finished, train=fakes.steady, **OPTIONS)
    assert made.trained == 6
    for result in made.folder.glob("trials/*/result.json"):
        said = read_json(result)
        write_json(result, {**said, "tags": {**said["tags"], "commit": "a" * 40}})
    recorded_as = finished / "trials" / "0000" / "result.json"
    said = read_json(recorded_as)
    write_json(recorded_as, {**said, "tags": {**said["tags"], "commit": "b" * 40}})
    with pytest.raises(InputError, match="earlier reproduction with commit aaaa"):
        reproduce(finished, train=fakes.shifted, **OPTIONS)


def test_other_data_is_refused_unless_it_is_allowed(finished):
    with pytest.raises(InputError, match="the data is not that of the recorded runs"):
        reproduce(finished, train=fakes.steady, device="cpu")
    assert not (finished / "reproduced").exists()
    found = reproduce(finished, train=fakes.steady, **OPTIONS).environment
    assert {one.what for one in found} == {"data", "host"}
    assert next(one for one in found if one.what == "data").recorded == fakes.DATA


def test_a_single_run_has_no_spread(tmp_path, here):
    spec = study(tmp_path, ABLATION).cell("plain", 0)
    fakes.steady(spec, tmp_path / "runs" / "alone" / "single")
    folder = tmp_path / "runs" / "alone" / "single"
    made = reproduce(folder, train=fakes.rounded, **OPTIONS)
    assert outcomes(made) == {("trial", "run", 0): "no spread"}
    assert not made.reproduced
    assert made.as_json()["numbers"][0]["interval"] == [None, None]
    assert reproduce(folder, train=fakes.steady, into=tmp_path / "b", **OPTIONS).reproduced


def test_trials_of_a_search_are_compared_one_by_one(tmp_path):
    text = HEAD + "train: {tokens: 1000}\nmodel: {width: {choice: [16, 24]}}\n"
    made = Here(study(tmp_path, text, "sampler: grid"), tmp_path / "runs" / "s", fakes.steady)
    made.run()
    found = recorded(made.folder)
    assert sorted(found.chosen) == ["trial 0", "trial 1"]
    assert found.metric == "valid/loss"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arms": ["densr"]}, "no complete cell of an arm 'densr'. Did you mean 'dense'"),
        ({"seeds": [7]}, "Seeds that all of these arms have completed: 0, 1, 2"),
    ],
)
def test_what_is_not_there_cannot_be_chosen(finished, arguments, message):
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        recorded(finished, **arguments)


def test_what_was_never_finished_cannot_be_reproduced(finished, tmp_path):
    (finished / "trials" / "0001" / "result.json").unlink()
    with pytest.raises(InputError, match="this run is running"):
        recorded(finished / "trials" / "0001")
    found = recorded(finished)
    assert list(found.chosen["plain"]) == [1, 2]
    assert found.left_out == ("not trained again, since not every arm has completed them: seeds 0",)
    with pytest.raises(InputError, match="no study and no run here"):
        recorded(tmp_path)


def test_a_spec_of_another_release_is_refused_with_its_plugins(finished):
    path = finished / "trials" / "0000" / "spec.json"
    write_json(path, {**read_json(path), "unheard": 1, "plugins": {"builtin": "9.9"}})
    with pytest.raises(InputError, match=r"unheard: .*builtin 9\.9: install these versions"):
        reproduce(finished / "trials" / "0000", train=fakes.steady, **OPTIONS)


@pytest.mark.parametrize(
    "model",
    [
        "{width: 16, depth: 2, core: mamba, dense: {kind: densessm, span: 2, fusion: concat}, ffn: swiglu}",
        "{width: 16, blocks: [{core: mamba, repeat: 2}, {core: {kind: retnet, heads: 2}, dense: {span: 1}}]}",
        "{preset: denseretnet-350m}",
    ],
)
def test_the_study_that_trains_again_means_the_stored_specs(tmp_path, model):
    spec = study(tmp_path, HEAD + f"model: {model}\ntrain: {{tokens: 1000, clip: none}}\n").point({})
    fakes.steady(spec, tmp_path / "run")
    found = recorded(tmp_path / "run")
    path = tmp_path / "again.yaml"
    path.write_text(json.dumps(found.tree(default())))
    again = Study.load(path).cell("run", spec.seed)
    assert again.canonical() == stored_spec(found.trials[0], default()).canonical() == spec.canonical()


def test_the_interval_covers_new_runs_as_often_as_it_says():
    chance, misses, repeats, alpha = np.random.default_rng(0), 0, 4000, 0.1
    for _ in range(repeats):
        low, high = expected(list(chance.normal(size=4)), 2, alpha)
        misses += not low <= chance.normal(size=2).mean() <= high
    # Four standard deviations of a binomial.
    assert abs(misses / repeats - alpha) < 4 * math.sqrt(alpha * (1 - alpha) / repeats)


def test_the_command_says_what_it_found_and_ends_accordingly(tmp_path):
    """A real ablation, its report, and one of its trials trained again: bit for bit."""
    from dense_lab.cli.report import command as report
    from dense_lab.cli.reproduce import command

    made = Here(study(tmp_path, ABLATION), tmp_path / "runs" / "s", None)
    made.run()
    done = CliRunner().invoke(report, [str(made.folder)], catch_exceptions=False)
    assert "6 of 6 cells complete" in done.output
    assert "FAIR" in done.output
    trial = made.folder / "trials" / "0003"
    done = CliRunner().invoke(command, [str(trial), "--device", "cpu"], catch_exceptions=False)
    assert "reproduced: 1 of 1 runs bit for bit" in done.output
    assert done.exit_code == 0
    for number in (1, 3, 5):
        path = made.folder / "trials" / f"{number:04d}" / "result.json"
        stored = read_json(path)
        stored["metrics"]["test/loss"] += 100
        write_json(path, stored)
    done = CliRunner().invoke(command, [str(trial), "--device", "cpu", "--json"], catch_exceptions=False)
    assert done.exit_code == 1
    assert json.loads(done.output)["reproduced"] is False
