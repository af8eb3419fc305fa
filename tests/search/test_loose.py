"""A study that was begun with a loose plugin file, and goes on without it: the user is told which file is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from dense_lab import registry as registries
from dense_lab.cli import group
from dense_lab.errors import InputError
from dense_lab.files import read_json, write_json
from dense_lab.registry import Registry
from dense_lab.reproduce.recorded import stored_spec
from dense_lab.results import TrialView
from dense_lab.runs import SINGLE
from dense_lab.search import manifest
from dense_lab.space import Study
from tests.spec.studies import of

PLUGIN = """
from typing import Literal
from dense_lab.hookspecs import hookimpl
from dense_lab_plugins.fusions.add import Add

class Own(Add):
    kind: Literal["own"] = "own"

@hookimpl
def register_components(register):
    register(Own)
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    file = tmp_path / "own.py"
    file.write_text(PLUGIN)
    return file


def begin(tmp_path: Path, plugin: Path, fusion: str) -> tuple[Path, Study]:
    """The file of a study and the study, begun in `tmp_path / runs` with the plugin."""
    file = tmp_path / "s.yaml"
    file.write_text(of(f"name: begun\nmodel: {{depth: 2, dense: {{span: 1, fusion: {fusion}}}}}"))
    study = Study.load(file, registry=registries.load((plugin,)))
    folder = tmp_path / "runs" / study.name
    manifest.write(study, folder, manifest.plan(study, folder, None), storage=None, mlflow=None)
    return file, study


def said(*words: str | Path) -> str:
    result = CliRunner().invoke(group, [str(word) for word in words])
    assert isinstance(result.exception, InputError)
    return str(result.exception)


@pytest.mark.parametrize("command", ["search", "plan", "show"])
def test_the_missing_file_is_named_with_its_place(tmp_path: Path, plugin: Path, command: str) -> None:
    file, _ = begin(tmp_path, plugin, "{choice: [own, add]}")
    found = said(command, file, "--runs", tmp_path / "runs")
    assert "no fusion named 'own'" in found
    assert f"was begun with --plugin {plugin}, which is not given now" in found
    assert f"dense-lab --plugin {plugin} ..." in found
    assert "--plugin" not in said(command, file, "--runs", tmp_path / "elsewhere")
    file.write_text(file.read_text().replace("name: begun", "name: other"))
    assert "--plugin" not in said(command, file, "--runs", tmp_path / "runs")
    assert f"--plugin {plugin}" in said(command, file, "--runs", tmp_path / "runs", "--set", "name=begun")


def test_other_mistakes_are_not_blamed_on_a_plugin_that_is_there(tmp_path: Path, plugin: Path) -> None:
    file, _ = begin(tmp_path, plugin, "own")
    before = registries.default()
    try:
        found = said("--plugin", plugin, "plan", file, "--runs", tmp_path / "runs", "--set", "model.width=none")
    finally:
        registries.set_default(before)
    assert "was begun with" not in found


def test_a_choice_of_what_is_installed_misses_the_file_too(tmp_path: Path, plugin: Path) -> None:
    file, _ = begin(tmp_path, plugin, "{choice: installed}")
    with pytest.raises(InputError, match=r"plugin own\.py: loose file when .* absent now: give --plugin own\.py"):
        Study.load(file).check_frozen(read_json(tmp_path / "runs" / "begun" / "manifest.json"))


def test_a_study_is_found_by_its_file_without_its_plugins(tmp_path: Path, plugin: Path) -> None:
    file, study = begin(tmp_path, plugin, "own")
    result = CliRunner().invoke(group, ["status", str(file), "--runs", str(tmp_path / "runs"), "--json"])
    assert json.loads(result.stdout)["name"] == study.name


@pytest.mark.parametrize("kind", ["trial", "single"])
def test_a_stored_run_names_the_file(tmp_path: Path, plugin: Path, kind: str) -> None:
    _, study = begin(tmp_path, plugin, "own")
    folder = tmp_path / "runs" / "begun" / ("trials/0000" if kind == "trial" else SINGLE)
    spec = {**study.point({}).model_dump(mode="json"), "plugins": {"builtin": "0.1.0", "own.py": "loose file"}}
    write_json(folder / "spec.json", spec)
    run = TrialView(0, "complete", {}, {}, {}, "", spec, folder)
    place = plugin if kind == "trial" else "own.py"
    with pytest.raises(InputError, match=f"was begun with --plugin {place}, which is not given now"):
        stored_spec(run, Registry())
    with pytest.raises(InputError, match="was begun with"):
        stored_spec(run, registries.default())
    assert stored_spec(run, study.registry).model.dense.fusion.kind_name() == "own"
