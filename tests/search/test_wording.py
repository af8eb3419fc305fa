"""What a search says of itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from dense_lab.cli import group
from dense_lab.cli.status import print_leaderboard
from dense_lab.units import counted
from tests.search import fakes
from tests.search.helpers import CONTINUOUS, Here, study


def test_numbers_agree_with_what_they_count() -> None:
    assert [counted(n, "worker") for n in (0, 1, 2)] == ["0 workers", "1 worker", "2 workers"]


def test_a_stop_that_came_too_late_is_none(tmp_path: Path) -> None:
    here = Here(study(tmp_path, CONTINUOUS, "trials: 2"), tmp_path / "s", fakes.train)
    here.one()
    here.search.supervisor.stopping = True
    half = here.search._outcome(0, "")
    assert (half.stopped, half.message) == (True, "stopped after 1 of 2 trials; the same command goes on")
    here.one()
    whole = here.search._outcome(0, "")
    assert (whole.stopped, whole.message) == (False, "complete: 2 trials")


def test_a_leaderboard_says_how_many_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = Here(study(tmp_path, CONTINUOUS, "trials: 3"), tmp_path / "s", fakes.train).run().results
    print_leaderboard(results, 2)
    assert "the best 2 of 3 complete trials" in capsys.readouterr().out
    print_leaderboard(results, 3)
    assert "the best" not in capsys.readouterr().out


def test_show_and_plan_expect_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("dense_lab: 1\nmodel: {depth: 2}\ntrain: {tokens: 8k}\ndata: {kind: mqar, seq_len: 32}\n")
    monkeypatch.setattr("dense_lab.speeds.Speeds._matrix_rate", 1e9)
    monkeypatch.setattr("dense_lab.speeds.measured", lambda folder, place: {})
    said = [CliRunner().invoke(group, [name, str(path), "--device", "cpu"]).output for name in ("show", "plan")]
    times = [re.search(r"tokens(?: in all: roughly|;) ([\d.]+ \w+)", text) for text in said]
    assert None not in times
    assert len({found[1] for found in times if found}) == 1


def test_numbers_of_a_table_are_not_broken_and_spare_columns_go(monkeypatch, capsys):
    from rich.console import Console

    from dense_lab.cli import options

    columns, row = (
        ("arm", "mean", "p", "difference", "verdict"),
        ("plain", "2.6216", "0.782", "[-0.0689, +0.0484]", "none"),
    )
    for width, names in ((80, columns), (46, ("arm", "mean", "difference", "verdict"))):
        monkeypatch.setattr(options, "console", lambda width=width: Console(highlight=False, width=width))
        options.print_table("", columns, [row], right=columns[1:], spare=("p",))
        said = capsys.readouterr().out
        assert said.split()[: len(names)] == list(names)
        assert {"2.6216", "[-0.0689,", "+0.0484]", "none"} <= set(said.split())
        assert ("too narrow for: p" in said) == (width == 46)
