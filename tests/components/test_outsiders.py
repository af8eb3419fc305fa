"""Components that are not built in are tried before anything is trained with them."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dense_lab import outsiders
from dense_lab import registry as registries
from dense_lab.cli import group
from dense_lab.errors import InputError
from dense_lab.files import read_json
from dense_lab.model import ModelSpec
from dense_lab.outsiders import look
from dense_lab.registry import Registry
from dense_lab.study import RunSpec, plugins_used
from dense_lab.training import train

ODD = Path(__file__).with_name("odd.py")
GLA = Path(__file__).parents[2] / "plugins" / "dense-lab-gla" / "dense_lab_gla.py"
PLACE = "non-singleton dimension"
LEAKS = [
    ("core", "next", "later tokens"),
    ("core", "chunk", "later tokens"),
    ("core", "batch", "other rows of the batch"),
    ("core", "row", "other rows of the batch"),
    ("fusion", "next", "later tokens"),
    ("fusion", "batch", "other rows of the batch"),
]


@pytest.fixture(scope="module")
def odd() -> Registry:
    """Built-in components and those of odd.py."""
    return registries.load((ODD, GLA), (registries.BUILTIN,))


def model(registry: Registry, core: object = "retnet", fusion: object = "add", **rest: object) -> ModelSpec:
    tree = {"width": 32, "depth": 3, "core": core, "dense": {"fusion": fusion}, **rest}
    return ModelSpec.model_validate(tree, context={"registry": registry})


@pytest.mark.parametrize(("slot", "how", "seen"), LEAKS)
def test_what_leaks_is_refused_by_name(odd: Registry, slot: str, how: str, seen: str) -> None:
    others = {"core": {"kind": "odd"}, "fusion": {"kind": "odd"}}
    with pytest.raises(InputError) as caught:
        look([model(odd, **{**others, slot: {"kind": "odd", "how": how}})], odd)
    said = str(caught.value)
    assert re.match(rf"{slot} 'odd' of odd\.py, loose file \(defined at {ODD}:\d+\): the output at a token", said)
    assert seen in said


def test_what_mixes_rows_in_training_alone_is_refused(odd: Registry) -> None:
    with pytest.raises(InputError, match=r"ffn 'odd' .* other rows of the batch"):
        look([model(odd, ffn="odd", dropout=0.1)], odd)


def test_what_foresees_in_evaluation_alone_is_refused(odd: Registry) -> None:
    with pytest.raises(InputError, match=r"fusion 'odd' .* later tokens"):
        look([model(odd, fusion={"kind": "odd", "how": "evaluating"})], odd)


def test_a_wrong_shape_is_refused(odd: Registry) -> None:
    with pytest.raises(InputError, match=r"fusion 'odd' .* shape \[2, 32, 31\] of stream k, expected \[2, 32, 32\]"):
        look([model(odd, fusion={"kind": "odd", "how": "shape"})], odd)


@pytest.mark.parametrize(
    "dense",
    [
        {"fusion": {"kind": "odd", "how": "next"}, "pattern": {"kind": "dilated", "dilation": 4}},
        {"site_transitions": {"v": {"gate": "odd"}}},
        {"fusion": "many", "span": 2},
    ],
)
def test_what_connects_few_layers_or_sites_is_tried(odd: Registry, dense: dict[str, object]) -> None:
    fine = {"fusion": "many", "span": 1}
    models = [model(odd, depth=6, dense=said) for said in (fine, dense)]
    with pytest.raises(InputError, match=r"(fusion|gate) '(odd|many)' .* later tokens"):
        look(models, odd)


def test_what_is_right_passes_soon(odd: Registry) -> None:
    models = [model(odd, core, fusion, dropout=0.1) for core in ("odd", "gla", "mamba") for fusion in ("odd", "add")]
    assert look(models, odd) == []
    times = []
    for _ in range(3):
        outsiders._known.clear()
        start = time.perf_counter()
        look(models[:1], odd)
        times.append(time.perf_counter() - start)
    assert min(times) < 1


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("device", "RuntimeError: needs a GPU"),
        ("table", f"RuntimeError: The size of tensor a (144) must match the size of tensor b (64) at {PLACE} 1"),
        ("drifting", "ArithmeticError: its outputs differ from call to call on the same tokens"),
        ("nan", "ArithmeticError: its outputs with random weights are not finite"),
    ],
)
def test_what_cannot_be_tried_is_said_and_not_refused(odd: Registry, how: str, why: str) -> None:
    (said,) = look([model(odd, {"kind": "odd", "how": how})] * 2, odd)
    assert said.startswith("core 'odd' of odd.py")
    assert said.endswith(f"not tried for leaks, since on the CPU it raised {why}")


def test_what_cannot_run_at_all_is_refused(odd: Registry) -> None:
    with pytest.raises(InputError, match=r"core 'odd' of odd.py.*raised RuntimeError: .*Every trial would fail"):
        look([model(odd, {"kind": "odd", "how": "shape"})], odd)


def test_built_in_components_alone_are_not_tried(odd: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dense_lab.outsiders._leaks", None)
    assert look([model(odd)], odd) == []


def test_a_trial_that_no_command_has_looked_at_fails(odd: Registry, tmp_path: Path) -> None:
    tree = {"model": {"width": 16, "depth": 1, "core": {"kind": "odd", "how": "next"}}}
    with pytest.raises(InputError, match="core 'odd'"):
        train(RunSpec.model_validate(tree, context={"registry": odd}), tmp_path, device="cpu", registry=odd)
    assert "later tokens" in read_json(tmp_path / "result.json")["reason"]


@pytest.mark.parametrize("command", ["check", "search", "train"])
def test_commands_look_before_anything_begins(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registries, "_default", None)
    monkeypatch.chdir(tmp_path)
    core = "{kind: odd, how: next}" if command == "train" else "{choice: [retnet, {kind: odd, how: next}]}"
    text = f"model: {{width: 16, depth: 1, core: {core}}}\ntrain: {{tokens: 1k, batch_tokens: 512}}\n"
    Path("s.yaml").write_text(f"dense_lab: 1\n{text}search: {{trials: 2}}\n")
    result: Result = CliRunner().invoke(group, ["--plugin", str(ODD), command, "s.yaml"])
    assert isinstance(result.exception, InputError)
    assert "core 'odd'" in str(result.exception)
    assert not Path("runs").exists()


def test_a_component_of_one_site_counts_among_the_plugins_used(odd: Registry) -> None:
    assert "odd.py" in plugins_used(model(odd, dense={"site_transitions": {"v": {"gate": "odd"}}}), odd)
