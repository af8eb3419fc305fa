"""What is shown of an ablation while it runs and afterwards."""

import io

from rich.console import Console

from dense_lab.cli.live import Display, arms_table, short
from dense_lab.results import read_study
from dense_lab.search.progress import ArmProgress, arms, snapshot
from tests.ablation.studies import ARMS, study, train
from tests.search.helpers import Here


def shown(renderable, width=100):
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()


def test_arms_with_their_cells_and_means(tmp_path):
    here = Here(study(tmp_path, ARMS + "tune: {lr: [1e-4, 1e-3], tokens: 1k}\n"), tmp_path / "s", train)
    for _ in range(6 + 4):
        here.one()
    results = read_study(tmp_path / "s")
    lines = [line.split() for line in shown(arms_table(arms(results), "test/loss")).splitlines()]
    mean = sum(t.metrics["test/loss"] for t in results.trials if t.label == "plain" and t.role == "cell") / 2
    assert lines[0] == ["arm", "cells", "mean", "test/loss", "lr"]
    assert lines[1] == ["plain", "2/2", f"{mean:.4f}", "0.001"]
    assert lines[2][:2] == ["span-1", "1/2"]
    assert short(results.trials[1]) == "plain, tuning, seed=100 lr=0.001" or "tuning" in short(results.trials[1])
    assert short(results.trials[9]) == "plain, seed=1"
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with Display(console, "valid/loss") as display:
        display.update(snapshot(results, 1))
    assert "mean test/loss" in console.file.getvalue()


def test_of_many_arms_those_at_work_are_shown():
    many = [ArmProgress(f"a{n}", 2 if n < 50 else 1, 0, 2, 1.0, {}) for n in range(100)]
    lines = shown(arms_table(many, "test/loss", most=5)).splitlines()
    assert [line.split()[0] for line in lines] == ["arm", "a50", "a51", "a52", "a53", "a54", "and"]
    assert "and 95 others" in lines[-1]
