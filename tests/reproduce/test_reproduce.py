"""Reproduction: what is chosen, what is compared, and what is said of it."""

import json
import math
import platform

import numpy as np
import pytest
from click.testing import CliRunner

from dense_lab.errors import InputError, MachineError
from dense_lab.files import read_json, write_json
from dense_lab.registry import default
from dense_lab.reproduce import reproduce
from dense_lab.reproduce.agreement import EVERY_ARM, Spread, expected, pairwise
from dense_lab.reproduce.recorded import recorded, stored_spec
from dense_lab.space import Study
from dense_lab.training import train
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
    assert len(made.agreements) == 2 * 3 + 2 * 2 + 1 + 1
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
    assert made.summary().startswith("NOT reproduced: 11 of 12 numbers")


def test_a_shift_that_all_seeds_share_is_seen_though_every_run_is_inside(finished):
    made = reproduce(finished, train=fakes.nudged, **OPTIONS)
    said = outcomes(made)
    assert {outcome for (kind, *_), outcome in said.items() if kind in ("trial", "arm", "difference")} == {"inside"}
    assert {arm: outcome for (kind, arm, _), outcome in said.items() if kind == "paired"} == dict.fromkeys(
        ("plain", "dense", EVERY_ARM), "outside"
    )
    assert not made.reproduced
    assert "all seeds of plain, dense, (every arm) have moved one way" in made.summary()
    assert "each within 0.02 of the recorded one" in made.summary()
    assert reproduce(finished, train=fakes.rounded, into=finished / "b", **OPTIONS).reproduced


@pytest.mark.parametrize("seeds", [2, 3])
def test_two_seeds_are_said_to_say_little(tmp_path, here, seeds):
    made = Here(study(tmp_path, ABLATION.replace("seeds: 3", f"seeds: {seeds}")), tmp_path / "runs" / "s", fakes.steady)
    made.run()
    exact = reproduce(made.folder, into=tmp_path / "exact", train=fakes.steady, **OPTIONS)
    inside = reproduce(made.folder, into=tmp_path / "inside", train=fakes.nudged, **OPTIONS)
    assert "inside" in outcomes(inside).values()
    assert exact.caution() == ""
    # Of a run: t(1) sqrt(1 + 1/2) at alpha / 2 over 4 runs, 2 means and 1 difference, two-sided.
    reach = math.sqrt(1.5) / math.tan(math.pi * 0.05 / 2 / 7 / 2)
    said = f"2 seeds say little: with one degree of freedom, 'inside' is up to {reach:.3g} times the spread"
    assert inside.caution().startswith(said) if seeds == 2 else inside.caution() == ""
    assert inside.as_json()["caution"] == inside.caution()


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
    assert [key[::2] for key in outcomes(first)] == [("trial", 0), ("trial", 2), ("arm", None), ("paired", None)]
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


def test_other_code_is_said_and_not_refused(finished):
    result = finished / "trials" / "0000" / "result.json"
    said = read_json(result)
    write_json(result, {**said, "tags": {**said["tags"], "code": "dense_lab=00000000", "dense_lab": "0.0.1"}})
    found = reproduce(finished, train=fakes.steady, **OPTIONS).environment
    assert {one.what for one in found} == {"data", "host", "code", "dense_lab"}
    assert next(one for one in found if one.what == "code").now.startswith("dense_lab=")


def test_another_processor_on_a_host_of_the_same_name_is_said(finished):
    result = finished / "trials" / "0000" / "result.json"
    said = read_json(result)
    tags = {**said["tags"], "host": platform.node(), "cpu": "VSX", "numba": "0.1"}
    write_json(result, {**said, "tags": tags})
    found = reproduce(finished / "trials" / "0000", train=fakes.rounded, **OPTIONS)
    assert {one.what for one in found.environment} == {"data", "cpu", "numba"}
    assert found.reproduced


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


@pytest.mark.parametrize("grown", [1e-3, 0.1, 1.0], ids="rounding grown to {} of the seeds' own spread".format)
def test_honest_runs_are_paired_as_often_as_it_says_and_shifts_are_found(grown):
    """10 arms of 3 seeds; runs with one seed end `grown` times as far apart as runs with two."""
    chance, misses, found, repeats, alpha = np.random.default_rng(1), 0, 0, 1000, 0.1
    for _ in range(repeats):
        recorded = chance.normal(size=(10, 3))
        # Of one variance with the recorded ones, correlated with them.
        share = 1 - grown**2
        new = share * recorded + math.sqrt(1 - share**2) * chance.normal(size=(10, 3))
        spreads = Spread.of(recorded[:1].tolist()), Spread.of(recorded.tolist())
        low, high = pairwise(recorded[0].tolist(), new[0].tolist(), *spreads, alpha)
        misses += not low <= new[0].mean() <= high
        found += not low <= new[0].mean() + 4 <= high
    # Four standard deviations of a binomial; NEGLIGIBLE and the two limits make it rarer.
    assert misses / repeats < alpha + 4 * math.sqrt(alpha * (1 - alpha) / repeats)
    assert found / repeats > 0.9


def faster(spec, folder, **options):
    """Trains with a rate 1.3 times as high, and records what it should have."""
    train(
        spec.model_copy(update={"train": spec.train.model_copy(update={"lr": 1.3 * spec.train.lr})}), folder, **options
    )
    write_json(folder / "spec.json", {**read_json(folder / "spec.json"), **spec.model_dump(mode="json")})
    result = read_json(folder / "result.json")
    tags = {**result["tags"], "spec": read_json(folder / "trial.json")["digest"]}
    write_json(folder / "result.json", {**result, "tags": tags})


def test_a_planted_change_of_real_runs_is_seen_and_an_honest_rerun_passes(tmp_path, here, monkeypatch):
    """Three seeds on a CPU; nothing that is recorded of the environment has changed."""
    monkeypatch.setattr("dense_lab.reproduce.rerun.differences", lambda *_: [])
    monkeypatch.setattr("dense_lab.reproduce.rerun.CODE", ())
    made = Here(study(tmp_path, ABLATION), tmp_path / "runs" / "s", None)
    made.run()
    honest = reproduce(made.folder, arms=["plain"], into=tmp_path / "honest", device="cpu")
    assert honest.summary() == "reproduced: 3 of 3 runs bit for bit"
    planted = reproduce(made.folder, arms=["plain"], into=tmp_path / "planted", device="cpu", train=faster)
    assert {outcomes(planted)["trial", "plain", seed] for seed in range(3)} == {"not exact"}
    assert not planted.reproduced
    assert "0 of 3 runs bit for bit" in planted.summary()


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
