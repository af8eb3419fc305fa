"""A single run is seen by `status`, and has a report of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from dense_lab.cli import group
from dense_lab.errors import InputError
from dense_lab.files import read_json, write_json

STUDY = """dense_lab: 1
name: one
data: {kind: mqar, seq_len: 16, vocab: 32, pairs: 2}
model: {width: 16, depth: 1}
train: {tokens: 2k, batch_tokens: 128, evaluations: 2, valid_tokens: 64, test_tokens: 64}
"""


def said(*arguments: str) -> str:
    result = CliRunner().invoke(group, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two finished runs, one of them where its user wanted it."""
    monkeypatch.chdir(tmp_path)
    Path("study.yaml").write_text(STUDY)
    said("train", "study.yaml", "--device", "cpu")
    said("train", "study.yaml", "--device", "cpu", "--out", "runs/mine", "--set", "seed=1")
    return tmp_path / "runs"


def test_single_runs_are_listed_beside_studies(runs: Path) -> None:
    lines = said("status").splitlines()
    assert [line.split(": a single run, complete, valid/loss ")[0] for line in lines] == ["mine", "one"]
    listed = json.loads(said("status", "--json"))
    assert [(one["name"], one["kind"], one["complete"]) for one in listed] == [("mine", "run", 1), ("one", "run", 1)]


@pytest.mark.parametrize("named", ["one", "study.yaml", "runs/one", "runs/one/single"])
def test_a_run_is_found_by_name_file_and_folder(runs: Path, named: str) -> None:
    assert said("status", named).startswith("one: a single run, complete, valid/loss ")


def test_a_run_whose_process_is_gone_is_interrupted_and_one_that_lives_runs(runs: Path) -> None:
    folder = runs / "one" / "single"
    (folder / "result.json").unlink()
    # This process has trained it.
    assert ": a single run, running after 1.92k of 2k tokens" in said("status", "one")
    trial = read_json(folder / "trial.json")
    write_json(folder / "trial.json", {**trial, "owner": {**trial["owner"], "started": 0}})
    assert said("status", "one").startswith("one: a single run, interrupted after 1.92k of 2k tokens")
    (folder / "trial.json").unlink()
    assert said("status", "one").startswith("one: a single run, interrupted after 1.92k of 2k tokens")


def test_a_failed_run_says_why(runs: Path) -> None:
    result = runs / "one" / "single" / "result.json"
    write_json(result, {**read_json(result), "status": "failed", "reason": "train/loss is nan at step 3"})
    assert "failed after 1.92k of 2k tokens" in said("status", "one")
    assert said("report", "one").startswith("A single run, failed")
    assert "train/loss is nan at step 3" in (runs / "one" / "single" / "report" / "report.md").read_text()


def test_the_report_of_a_run_has_its_curve_and_its_provenance(runs: Path) -> None:
    said("report", "one")
    folder = runs / "one" / "single" / "report"
    page, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    assert "<svg" in page
    assert "dense-lab run " in page
    result = read_json(runs / "one" / "single" / "result.json")
    for row in (
        "| run | one |",
        f"| code | {result['tags']['code']} |",
        "| model.width | 16 |",
        f"| test/loss | {result['metrics']['test/loss']:.4f} |",
    ):
        assert row in text
    assert {path.name for path in folder.iterdir()} >= {"curve.svg", "curve.pdf", "metrics.csv", "settings.tex"}


def test_runs_stand_beside_each_other_in_one_report(runs: Path) -> None:
    said("report", "one", "mine")
    text = (runs / "report" / "report.md").read_text()
    assert text.count("single run, valid/loss") == 2


@pytest.mark.parametrize("named", ["one", "study.yaml", "runs/one", "mine"])
def test_a_run_is_reproduced_by_name_file_and_folder(runs: Path, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def reproduce(folder: Path, **options: object) -> None:
        asked.append(folder)
        raise InputError("enough")

    monkeypatch.setattr("dense_lab.reproduce.reproduce", reproduce)
    assert isinstance(CliRunner().invoke(group, ["reproduce", named]).exception, InputError)
    assert asked == [Path("runs/mine" if named == "mine" else "runs/one/single")]
