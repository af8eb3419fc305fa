"""Open values: what they are called, which points they span, and what a point means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dense_lab.errors import InputError
from dense_lab.space import Choice, Float, Int, Parameter, Study
from dense_lab.study import RunSpec
from tests.spec.studies import FINITE, complaint, of, study


def test_open_values_become_parameters_by_dotted_path(tmp_path: Path) -> None:
    dense = "model.dense.densessm"
    assert study(tmp_path).space == [
        Choice("model.core", ("mamba", "retnet")),
        Choice("model.core.mamba.state", ("8", "16")),
        Choice("model.core.retnet.heads", ("2", "4")),
        Choice("model.dense", ("densessm", "none")),
        Int(f"{dense}.span", 1, 4),
        Choice(f"{dense}.transition.projection", ("identity", "linear")),
        Choice(f"{dense}.transition.gate", ("linear", "mlp")),
        Choice(f"{dense}.fusion", ("add", "attention", "concat")),
        Float("train.lr", 3e-4, 3e-2, log=True),
    ]


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        ("[mamba, retnet]", ("mamba", "retnet")),
        (
            "[{kind: retnet, heads: 8}, {heads: 2, kind: retnet}, mamba]",
            ("mamba", "retnet{heads=2}", "retnet{heads=8}"),
        ),
        ("[retnet, {kind: retnet, heads: {choice: [2, 4]}}]", ("retnet", "retnet{heads=choice=[2,4]}")),
        ("{wide: {kind: retnet, heads: 8}, other: mamba}", ("other", "wide")),
        ("installed", ("gau_retnet", "mamba", "retnet")),
    ],
)
def test_labels_of_components(tmp_path: Path, options: str, labels: tuple[str, ...]) -> None:
    found = study(tmp_path, of(f"model: {{core: {{choice: {options}}}}}")).space[0]
    assert isinstance(found, Choice)
    # Other distributions may be installed beside the built-ins.
    assert found.labels == labels or (options == "installed" and set(labels) <= set(found.labels))


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("model: {depth: {choice: [16, 4, 1k]}}", ("4", "16", "1000")),
        ("train: {lr: {choice: [1e-2, 3e-4, .5]}}", ("0.0003", "0.01", "0.5")),
        ("train: {clip: {choice: [none, 1, 0.5]}}", ("0.5", "1", "none")),
        ("model: {dense: {sites: {choice: [all, [k], [k, v]]}}}", ("[k,v]", "[k]", "all")),
        ("model: {dense: {choice: [{span: 1}, {span: 2}, none]}}", ("densessm{span=1}", "densessm{span=2}", "none")),
        (
            "model: {dense: {transition: {choice: [{gate: mlp}, {gate: none}]}}}",
            ("gated{gate=mlp}", "gated{gate=none}"),
        ),
        ("train: {choice: [{lr: 1e-2}, {lr: 1e-3, tokens: 1M}]}", ("{lr=0.001,tokens=1000000}", "{lr=0.01}")),
    ],
)
def test_labels_of_values(tmp_path: Path, text: str, labels: tuple[str, ...]) -> None:
    assert [parameter.describe()["labels"] for parameter in study(tmp_path, of(text)).space] == [list(labels)]


@pytest.mark.parametrize(
    ("value", "parameter"),
    [
        ("{int: [1, 4]}", Int("train.tokens", 1, 4)),
        ("{int: [1k, 4k], log: true}", Int("train.tokens", 1000, 4000, log=True)),
        ("{int: [2, 8], step: 2, x-why: even}", Int("train.tokens", 2, 8, step=2)),
        ("{int: [1e3, 2e3]}", Int("train.tokens", 1000, 2000)),
    ],
)
def test_ranges(tmp_path: Path, value: str, parameter: Parameter) -> None:
    assert study(tmp_path, of(f"train: {{tokens: {value}}}")).space == [parameter]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("{choice: []}", "x.yaml:2:22 train.lr: expected a list of options, such as {choice: [a, b]}, got []"),
        ("{choice: 3}", "x.yaml:2:22 train.lr: expected a list of options, such as {choice: [a, b]}, got 3"),
        ("{choice: [1, 2, 1.0]}", "x.yaml:2:29 train.lr: the option '1' is here twice; first at x.yaml:2:23"),
        ("{choice: [1k, 1000]}", "x.yaml:2:27 train.lr: the option '1000' is here twice; first at x.yaml:2:23"),
        ("{choice: [{int: [1, 2]}]}", "x.yaml:2:22 train.lr: an option cannot itself be open"),
        ("{choice: installed}", "x.yaml:2:22 train.lr: `choice: installed` lists components, and none goes here"),
        ("{choice: [1], lgo: true}", "x.yaml:2:27 train.lr: an open value with 'choice' has no key 'lgo'."),
        (
            "{float: [1e-3, 1e-2], lgo: true}",
            "x.yaml:2:35 train.lr: an open value with 'float' has no key 'lgo'. Did you",
        ),
        ("{float: [1e-3]}", "x.yaml:2:21 train.lr: expected two ends, such as {float: [1, 4]}, got [0.001]"),
        ("{float: [1e-2, 1e-3]}", "x.yaml:2:21 train.lr: the first end is the smaller one: write [0.001, 0.01]"),
        ("{float: [a, 1]}", "x.yaml:2:21 train.lr: expected numbers as ends, got 'a'"),
        ("{float: [0, .inf]}", "x.yaml:2:21 train.lr: expected numbers as ends, got Infinity"),
        ("{float: [0, 1], log: true}", "x.yaml:2:21 train.lr: a logarithmic range starts above zero, got 0"),
        ("{float: [1, 2], log: 3}", "x.yaml:2:21 train.lr: log: expected true or false, got 3"),
        (
            "{int: [1, 2.5]}",
            "x.yaml:2:19 train.lr: expected whole numbers as ends, got 2.5; {float: [...]} takes others",
        ),
        ("{int: [1, 4], step: 2}", "x.yaml:2:19 train.lr: steps of 2 from 1 do not reach 4: write 3 or 5"),
        ("{int: [1, 4], step: 0}", "x.yaml:2:19 train.lr: step: expected a whole number above 0, got 0"),
        ("{int: [1, 4], step: 3, log: true}", "x.yaml:2:19 train.lr: a logarithmic range has no step"),
    ],
)
def test_malformed_open_values_are_refused_where_they_stand(tmp_path: Path, value: str, said: str) -> None:
    assert complaint(tmp_path, of(f"train: {{lr: {value}}}")).startswith(said)


@pytest.mark.parametrize(
    "text",
    ["search: {trials: {int: [1, 2]}}", "name: {choice: [a, b]}", "model: {core: {kind: {choice: [retnet, mamba]}}}"],
)
def test_what_says_how_to_search_cannot_be_open(tmp_path: Path, text: str) -> None:
    assert "open value" in complaint(tmp_path, of(text))


def test_every_option_and_both_ends_are_checked_at_load(tmp_path: Path) -> None:
    text = """\
model:
  core:
    choice:
      - {kind: retnet, heads: {choice: [2, 0, x]}}
      - {kind: mamba, stat: 8}
  dropout: {float: [0.5, 1.5]}
  depth: {int: [0, 2]}
"""
    assert complaint(tmp_path, of(text)).splitlines() == [
        "x.yaml:5:44 model.core.retnet.heads: expected a number above 0, got 0",
        "x.yaml:5:47 model.core.retnet.heads: expected a whole number, got 'x'. Units are k, M, G, T and %",
        "x.yaml:6:23 model.core.mamba.stat: no key 'stat' in core mamba. Did you mean 'state'? Keys: "
        "conv_bias, conv_width, dt_max, dt_min, dt_rank, expand, kind, linear_bias, state",
        "x.yaml:7:12 model.dropout: expected a number of 1 or less, got 1.5",
        "x.yaml:8:10 model.depth: expected a number above 0, got 0",
    ]


def test_size_and_grid_follow_the_conditions(tmp_path: Path) -> None:
    finite = study(tmp_path, overrides=FINITE)
    points = finite.grid()
    assert finite.size() == len(points) == 4 * 3
    assert len({json.dumps(point, sort_keys=True) for point in points}) == 12
    assert all(("model.core.mamba.state" in point) == (point["model.core"] == "mamba") for point in points)
    assert len({finite.point(point).digest() for point in points}) == 12
    assert study(tmp_path).size() is None
    assert study(tmp_path, of("seed: {int: [0, 9], step: 3}")).size() == 4


def test_a_grid_needs_values_that_can_be_listed(tmp_path: Path) -> None:
    said = complaint(tmp_path, of("train: {lr: {float: [1e-3, 1e-2]}}\nsearch: {sampler: grid}"))
    assert said.startswith("x.yaml:3:19 search.sampler: a grid needs open values that can be listed: write train.lr as")
    with pytest.raises(InputError, match="too large to list"):
        study(tmp_path, of("seed: {int: [0, 1G]}")).grid()


def test_covering_points_meet_every_option_and_both_ends(tmp_path: Path) -> None:
    open_study = study(tmp_path)
    points = open_study.covering()
    for parameter in open_study.space:
        met = {point[parameter.path] for point in points if parameter.path in point}
        wanted = set(parameter.labels) if isinstance(parameter, Choice) else {parameter.low, parameter.high}
        assert met == wanted, parameter.path
    assert len(points) <= 8


def test_closing_asks_for_what_is_reached_and_point_agrees(tmp_path: Path) -> None:
    asked: dict[str, object] = {}

    def suggest(parameter: Parameter) -> object:
        asked[parameter.path] = parameter.labels[-1] if isinstance(parameter, Choice) else parameter.high
        return asked[parameter.path]

    open_study = study(tmp_path)
    run = open_study.close(suggest)
    assert asked == {"model.core": "retnet", "model.core.retnet.heads": "4", "model.dense": "none", "train.lr": 3e-2}
    assert run == open_study.point(asked)
    assert (run.model.core.kind, run.model.core.heads, run.model.dense.span, run.train.lr) == ("retnet", 4, 0, 3e-2)
    assert RunSpec.model_validate_json(run.canonical()) == run


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({}, "the open value seed is not given"),
        ({"seed": 5}, "seed: expected a number from 0 to 4, got 5"),
        ({"seed": 1}, r"seed: expected 0 \+ n x 2, got 1"),
        ({"seed": "2"}, "seed: expected a number from 0 to 4, got '2'"),
        ({"seed": 2, "sed": 1}, "study 'x' has no open value sed at this point"),
    ],
)
def test_a_point_that_is_none_is_refused(tmp_path: Path, params: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        study(tmp_path, of("seed: {int: [0, 4], step: 2}")).point(params)


def test_fixed_values_are_named_by_the_paths_that_reach_them(tmp_path: Path) -> None:
    fixed = study(tmp_path, overrides=FINITE).resolved()["fixed"]
    assert fixed["model.core.mamba.expand"] == 2.0
    assert fixed["model.dense.densessm.fusion"] == "add"
    assert fixed["train.tokens"] == 2_000_000
    assert not [path for path in fixed if path.startswith("model.dense.none")]
    assert not {"model.core", "model.core.mamba.state", "model.dense"} & fixed.keys()
    for path, value in fixed.items():
        if value is not None:
            Study.load(tmp_path / "x.yaml", [*FINITE, (path, json.dumps(value))])


def test_a_study_without_open_values_is_a_single_run(tmp_path: Path) -> None:
    single = study(tmp_path, of("train: {tokens: 1k}"))
    assert (single.name, single.space, single.size(), single.grid()) == ("x", [], 1, [{}])
    assert single.point({}).train.tokens == 1000
    assert Study.load(None).point({}) == RunSpec()


def test_notes_are_kept_and_mean_nothing(tmp_path: Path) -> None:
    noted = study(tmp_path, of("x-a: {choice: 3}\nmodel: {x-b: [1], core: {kind: retnet, x-c: 1}}"))
    assert noted.digest() == study(tmp_path, of("model: {core: retnet}")).digest()
    assert noted.tree["x-a"] == {"choice": 3}


def test_the_digest_is_of_what_is_meant(tmp_path: Path) -> None:
    plain = study(tmp_path, of("train: {tokens: 2M}\nmodel: {core: {choice: [retnet, mamba]}}")).digest()
    same = of("name: other\nmodel:\n  core:\n    choice: [mamba, {kind: retnet}]\ntrain: {tokens: 2000000}")
    assert study(tmp_path, same).digest() == plain
    for text in ("train: {tokens: 1M}", "model: {core: {choice: [retnet]}}", "search: {trials: 5}"):
        assert study(tmp_path, of(text)).digest() != plain


def test_presets_lie_below_what_the_study_says(tmp_path: Path) -> None:
    text = of("model:\n  preset: denseretnet-350m\n  depth: 2\n  dense: {span: {int: [1, 2]}}")
    expanded = study(tmp_path, text)
    run = expanded.point({"model.dense.span": 2})
    assert (run.model.depth, run.model.dense.span, run.model.core.kind) == (2, 2, "gau_retnet")
    assert complaint(tmp_path, text.replace("350m", "350")).startswith(
        "x.yaml:3:11 model.preset: no preset named 'denseretnet-350'. Did you mean 'denseretnet-350m'?"
    )
    assert complaint(tmp_path, text.replace("depth: 2", "depth: x")).startswith("x.yaml:4:10 model.depth: expected")


def test_sizes_that_clash_are_found_on_the_meta_device(tmp_path: Path) -> None:
    text = of("model:\n  width: 60\n  core: {choice: [{kind: retnet, heads: {choice: [2, 4, 6]}}, mamba]}")
    with pytest.raises(InputError, match=r"x.yaml:3:3 model: core retnet: .*model.core.retnet.heads=4"):
        study(tmp_path, text).check_sizes()
    study(tmp_path, text.replace("60", "48")).check_sizes()
    with pytest.raises(InputError, match="at most 1000 blocks"):
        study(tmp_path, of("model: {depth: 1G}")).check_sizes()
    with pytest.raises(InputError, match="no dense-able stream 'u'"):
        study(tmp_path, of("model: {dense: {sites: [u]}}")).check_sizes()


def test_notes_beside_named_options_are_no_options(tmp_path: Path) -> None:
    noted = study(tmp_path, of("model: {core: {choice: {x-why: speed, a: retnet, b: mamba}}}"))
    assert noted.space == [Choice("model.core", ("a", "b"))]
