"""`--set path=value`: what it may address, what it does to open values, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dense_lab.errors import InputError
from dense_lab.space import Choice, Float, Study
from dense_lab.space_set import split_override
from tests.spec.studies import SPACE, complaint, of, study

Overrides = list[tuple[str, str]]


def paths(study: Study) -> list[str]:
    return [parameter.path for parameter in study.space]


def test_it_wins_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    text = of("train: {tokens: 1M, batch_tokens: 1k}")
    run = study(tmp_path, text, [("train.tokens", "500k"), ("train.tokens", "600k"), ("seed", "3")]).point({})
    assert (run.train.tokens, run.train.batch_tokens, run.train.evaluations, run.seed) == (600_000, 1000, 8, 3)


@pytest.mark.parametrize(
    "overrides",
    [
        [("train.lr", "0.01"), ("model.dense", "none"), ("model.core", "mamba"), ("model.core.mamba.state", "8")],
        [("model.core.mamba.state", "8"), ("model.core", "mamba"), ("model.dense", "none"), ("train.lr", "0.01")],
        [("train.lr", "0.01"), ("model.dense", "none"), ("model.core", "{kind: mamba, state: 8}")],
    ],
)
def test_the_parameters_of_a_trial_make_its_run(tmp_path: Path, overrides: Overrides) -> None:
    point = {"train.lr": 0.01, "model.dense": "none", "model.core": "mamba", "model.core.mamba.state": "8"}
    closed = study(tmp_path, overrides=overrides)
    assert closed.space == []
    assert closed.point({}) == study(tmp_path).point(point)


def test_a_label_picks_its_option_as_it_is_and_its_paths_stay(tmp_path: Path) -> None:
    picked = study(tmp_path, overrides=[("model.core", "retnet")])
    assert picked.space[0] == Choice("model.core.retnet.heads", ("2", "4"))
    text = SPACE.replace(
        "- {kind: mamba, state: {choice: [8, 16]}}", "- {kind: retnet, value_factor: {choice: [1, 2]}}"
    )
    label = "retnet{value_factor=choice=[1,2]}"
    assert paths(study(tmp_path, text, [("model.core", f"'{label}'")]))[0] == f"model.core.{label}.value_factor"


def test_an_option_keeps_its_label_whatever_is_set_below_it() -> None:
    two = "{choice: [{kind: retnet, heads: 2}, {kind: retnet, heads: 4}]}"
    below = "model.core.retnet{heads=2}"
    overrides = [("model.core", two), (f"{below}.norm_eps", "1e-5"), (f"{below}.value_factor", "1.5")]
    loaded = Study.load(None, overrides)
    assert loaded.space == [Choice("model.core", ("retnet{heads=2}", "retnet{heads=4}"))]
    core = loaded.point({"model.core": "retnet{heads=2}"}).model.core.model_dump()
    assert core == {"kind": "retnet", "heads": 2, "norm_eps": 1e-5, "value_factor": 1.5}


def test_what_is_no_label_replaces_open_or_not(tmp_path: Path) -> None:
    assert paths(study(tmp_path, overrides=[("model.core", "gau_retnet")]))[0] == "model.dense"
    opened = study(tmp_path, overrides=[("train.lr", "{float: [1e-3, 1e-2]}"), ("train.tokens", "{choice: [1k, 2k]}")])
    assert Float("train.lr", 1e-3, 1e-2) in opened.space
    assert Choice("train.tokens", ("1000", "2000")) in opened.space


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([("model.core.heads", "8")], {"heads": 8, "kind": "retnet"}),
        ([("model.core.retnet.heads", "8")], {"heads": 8, "kind": "retnet"}),
        ([("model.core", "mamba"), ("model.core.state", "4")], {"state": 4, "kind": "mamba"}),
        ([("model.core", "mamba"), ("model.core.mamba.state", "4")], {"state": 4, "kind": "mamba"}),
    ],
)
def test_below_a_bare_name_or_a_default(overrides: Overrides, expected: dict[str, object]) -> None:
    core = Study.load(None, overrides).point({}).model.core.model_dump()
    assert expected.items() <= core.items()


def test_below_defaults_lists_and_free_keys() -> None:
    overrides = [
        ("model.dense.span", "2"),
        ("model.dense.transition.gate.mlp.reduction", "4"),
        ("model.dense.site_transitions.k.gated.gate", "none"),
        ("kernels.decay_attention", "reference"),
        ("search.objective", "[{minimize: valid/loss}, {maximize: tokens_per_second}]"),
        ("search.objective.1", "{minimize: seconds}"),
    ]
    loaded = Study.load(None, overrides)
    run = loaded.point({})
    assert (run.model.dense.span, run.model.dense.transition.gate.reduction) == (2, 4)
    assert run.model.dense.site_transitions["k"].gate.kind == "none"
    assert run.kernels == {"decay_attention": "reference"}
    assert [objective.metric for objective in loaded.search.objective] == ["valid/loss", "seconds"]


def test_a_preset_may_be_named_in_any_order() -> None:
    run = Study.load(None, [("model.depth", "2"), ("model.preset", "denseretnet-350m")]).point({})
    assert (run.model.depth, run.model.width) == (2, 1536)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (
            "modl.core",
            "retnet",
            "--set modl.core: no key 'modl' in a study. Did you mean 'model'? Keys: ablate, analysis, arms,",
        ),
        ("model.cor", "retnet", "--set model.cor: no key 'cor' in model. Did you mean 'core'?"),
        ("lr", "1e-3", "--set lr: no key 'lr' in a study. Did you mean 'train.lr'?"),
        ("workers", "2", "--set workers: 'workers' is no part of a study: give it on the command line, --workers"),
        ("model.core", "retnt", "--set model.core: no core named 'retnt'. Did you mean 'retnet'? Installed:"),
        (
            "model.core.retnet.hads",
            "2",
            "--set model.core.retnet.hads: no key 'hads' in core retnet. Did you mean 'heads'?",
        ),
        (
            "model.core.heads",
            "2",
            "--set model.core.heads: model.core is a choice: name one of its options, such as "
            "model.core.retnet.heads or model.core.mamba.heads",
        ),
        ("model.dense.densessm.sites.0", "k", "--set model.dense.densessm.sites.0"),
        ("train.tokens.x", "1", "--set train.tokens.x: a single value stands here; nothing is below it, not even 'x'"),
        ("train.tokens", "500Q", "--set train.tokens: expected a whole number, got '500Q'. Units are k, M, G, T and %"),
        ("train.tokens", "[", "--set train.tokens: not YAML"),
        ("train.tokens", "", "--set train.tokens: expected a whole number, got null"),
        ("dense_lab", "2", "--set dense_lab: this release reads grammar 1, got 2: write `dense_lab: 1`"),
        ("", "1", "--set : no key '' in a study."),
    ],
)
def test_what_it_refuses_is_said_of_the_override(tmp_path: Path, path: str, value: str, said: str) -> None:
    assert complaint(tmp_path, SPACE, [(path, value)]).startswith(said)


def test_every_wrong_override_is_reported(tmp_path: Path) -> None:
    said = complaint(tmp_path, SPACE, [("modl", "1"), ("train.tokns", "1")])
    assert [line.split(":")[0] for line in said.splitlines()] == ["--set modl", "--set train.tokns"]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [("model.core", "retnet"), ("train.lr", "1e-3")],
        [
            ("model.core", "{choice: [{kind: retnet, heads: 2}, {kind: retnet, heads: {choice: [4, 8]}}]}"),
            ("model.core", "'retnet{heads=choice=[4,8]}'"),
        ],
        [("model", "{choice: {a: {preset: gau-retnet-350m}, b: {depth: {int: [1, 2]}}}}")],
    ],
)
def test_the_tree_that_is_left_is_the_same_study(tmp_path: Path, overrides: Overrides) -> None:
    first = study(tmp_path, overrides=overrides)
    second = study(tmp_path, json.dumps(first.tree))
    assert second.space == first.space
    assert second.digest() == first.digest()
    assert [second.point(p) for p in first.covering()] == [first.point(p) for p in first.covering()]


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("train.lr=1e-3", ("train.lr", "1e-3")),
        ("model.core={kind: retnet, x-a: b=c}", ("model.core", "{kind: retnet, x-a: b=c}")),
        (
            "model.core.retnet{heads=2,norm_eps=1e-5}.value_factor=2",
            ("model.core.retnet{heads=2,norm_eps=1e-5}.value_factor", "2"),
        ),
        ("name=", ("name", "")),
    ],
)
def test_an_override_is_split_at_its_own_equals_sign(text: str, pair: tuple[str, str]) -> None:
    assert split_override(text) == pair


@pytest.mark.parametrize("text", ["train.lr", "=3", "model.core.retnet{heads=2}"])
def test_what_is_no_override_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected PATH=VALUE"):
        split_override(text)
