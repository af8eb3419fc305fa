"""A study that has begun: what may change about it, and what is said when it may not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dense_lab.errors import InputError
from tests.spec.studies import SPACE, study


@pytest.fixture
def manifest(tmp_path: Path) -> dict[str, Any]:
    frozen: dict[str, Any] = json.loads(json.dumps(study(tmp_path).freeze()))
    return frozen


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [("search.trials", "99"), ("search.sampler", "random"), ("search.seed", "7"), ("search.pruner", "none")],
        [("train.tokens", "2000k")],
        [("train.lr", "{float: [3e-4, 3%], log: true}")],
    ],
)
def test_what_may_change(tmp_path: Path, manifest: dict[str, Any], overrides: list[tuple[str, str]]) -> None:
    study(tmp_path, overrides=overrides).check_frozen(manifest)


def test_order_and_spelling_of_options_may_change(tmp_path: Path, manifest: dict[str, Any]) -> None:
    text = SPACE.replace("[4, 2]", "[2, 4.0]").replace("[add, concat, attention]", "[{kind: attention}, concat, add]")
    assert text != SPACE
    study(tmp_path, text).check_frozen(manifest)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (
            "train.tokens",
            "1M",
            "--set train.tokens: 2000000 when study 'dense-span' began, 1000000 now: go on with "
            "--set 'train.tokens=2000000', or give the study a new name",
        ),
        (
            "model.core",
            "{choice: [gau_retnet, mamba, retnet]}",
            "--set model.core: {choice: [mamba, retnet]} when study 'dense-span' began, {choice: [gau_retnet, mamba, "
            "retnet]} now: go on with --set 'model.core={choice: [mamba, retnet]}', or give the study a new name",
        ),
        (
            "train.lr",
            "{float: [3e-4, 3e-2]}",
            "--set train.lr: {float: [0.0003, 0.03], log: true} when study 'dense-span' began, {float: [0.0003, 0.03]} "
            "now: go on with --set 'train.lr={float: [0.0003, 0.03], log: true}', or give the study a new name",
        ),
        (
            "model.dense",
            "none",
            "--set model.dense: {choice: [densessm, none]} when study 'dense-span' began, none now",
        ),
        ("search.objective", "[{minimize: valid/loss}, {minimize: seconds}]", "--set search.objective: "),
    ],
)
def test_what_may_not(tmp_path: Path, manifest: dict[str, Any], path: str, value: str, said: str) -> None:
    if path == "search.objective":
        changed = study(tmp_path, overrides=[(path, value), ("search.pruner", "none")])
    else:
        changed = study(tmp_path, overrides=[(path, value)])
    with pytest.raises(InputError) as caught:
        changed.check_frozen(manifest)
    assert str(caught.value).startswith(said)
    assert len(caught.value.problems) == 1


def test_the_remedy_works(tmp_path: Path, manifest: dict[str, Any]) -> None:
    changed = SPACE.replace("tokens: 2M", "tokens: 1M").replace("3e-2]", "4e-2]")
    with pytest.raises(InputError) as caught:
        study(tmp_path, changed).check_frozen(manifest)
    remedies = [problem.message.split("--set '")[1].split("'")[0].split("=", 1) for problem in caught.value.problems]
    assert len(remedies) == 2
    study(tmp_path, changed, [(path, value) for path, value in remedies]).check_frozen(manifest)


def test_another_version_of_a_plugin_makes_other_trials(tmp_path: Path, manifest: dict[str, Any]) -> None:
    assert set(manifest["plugins"]) == {"builtin"}
    manifest["plugins"]["builtin"] = "0.0.1"
    with pytest.raises(InputError, match=r"plugin builtin: 0\.0\.1 when study 'dense-span' began"):
        study(tmp_path).check_frozen(manifest)


def test_another_grammar_is_another_study(tmp_path: Path, manifest: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="has grammar 0, this is 1: give it a new name"):
        study(tmp_path).check_frozen({**manifest, "grammar": 0})
