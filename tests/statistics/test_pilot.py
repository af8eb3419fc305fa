"""`dense-lab power`: seeds and their cost, from the cells that a study has."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from dense_lab.ablation.results import Ablation, Analysis
from dense_lab.cli.power import command
from dense_lab.errors import InputError
from dense_lab.files import write_json
from dense_lab.pilot import plan, together
from dense_lab.results import StudyResults, TrialView
from dense_lab.statistics import seeds_needed, upper_deviation
from dense_lab.statistics.comparison import Pairs

LOSSES = {"plain": [3.00, 3.10, 2.95], "a": [2.98, 3.05, 2.97], "b": [3.02, 3.08, 3.00]}


def cell(arm: str, seed: int, loss: float, seconds: float = 3600.0) -> TrialView:
    metrics = {"test/loss": loss, "seconds": seconds}
    return TrialView(0, "complete", {"arm": arm, "seed": seed}, metrics, {}, "", {}, None, label=arm, role="cell")


def study(losses: dict[str, list[float]], **analysis: object) -> StudyResults:
    trials = [cell(arm, seed, loss) for arm, cells in losses.items() for seed, loss in enumerate(cells)]
    ablation = Ablation("plain", {key: {} for key in losses}, (0, 1, 2), Analysis(**analysis), None)
    return StudyResults("s", Path(), "", (), {}, trials, len(trials), ablation=ablation)


def test_seeds_by_hand() -> None:
    found = plan(study(LOSSES), effect=0.05)
    differences = {arm: np.subtract(LOSSES[arm], LOSSES["plain"]) for arm in "ab"}
    sds = {arm: d.std(ddof=1) for arm, d in differences.items()}
    for arm in found.arms:
        assert arm.needed is not None
        assert arm.needed.sd == pytest.approx(sds[arm.arm])
        assert arm.needed.seeds == seeds_needed(sds[arm.arm], 0.05, comparisons=2)
        assert arm.needed.sd_upper == pytest.approx(upper_deviation(sds[arm.arm], 2))
    pooled = math.sqrt((sds["a"] ** 2 + sds["b"] ** 2) / 2)
    assert found.needed.sd == pytest.approx(pooled)
    assert found.needed.sd_upper == pytest.approx(upper_deviation(pooled, 4 / 1.25))
    assert found.needed.seeds == seeds_needed(pooled, 0.05, comparisons=2)


def test_the_cost_is_what_is_missing() -> None:
    found = plan(study(LOSSES), effect=0.05)
    assert found.cost.trials == 3 * (found.needed.seeds - 3)
    assert found.cost.hours == pytest.approx(found.cost.trials)  # an hour each
    enough = plan(study(LOSSES), effect=10.0)
    assert (enough.needed.seeds, enough.cost.trials, enough.cost.hours) == (3, 0, 0.0)


def test_the_upper_limit_of_the_scatter_of_all_arms_holds() -> None:
    """It covers the truth in at least 80 % of simulated pilots, though the arms share the baseline."""
    rng, held, pilots = np.random.default_rng(0), 0, 1000
    for _ in range(pilots):
        table = rng.normal(size=(10, 3))
        sd, df = together({str(arm): Pairs(row - table[0], False) for arm, row in enumerate(table[1:])})
        held += upper_deviation(sd, df) >= math.sqrt(2)
    # 86 %: what the arms share makes a small estimate rarer than chi square with as many degrees of freedom would.
    assert 0.8 <= held / pilots <= 0.9


def test_what_the_study_says_is_used() -> None:
    found = plan(study(LOSSES, smallest_effect=0.05, power=0.9, alpha=0.01, correction="none"))
    assert (found.effect, found.power, found.alpha) == (0.05, 0.9, 0.01)
    assert found.needed.seeds == seeds_needed(
        found.needed.sd, 0.05, alpha=0.01, power=0.9, comparisons=2, correction="none"
    )
    assert plan(study(LOSSES, smallest_effect=0.05), effect=0.1, power=0.5).needed.seeds < found.needed.seeds


def test_an_arm_without_pairs() -> None:
    found = plan(study({**LOSSES, "c": [3.0]}), effect=0.05)
    assert found.arms[2].needed is None
    assert found.comparisons == 3


@pytest.mark.parametrize(
    ("results", "effect", "message"),
    [
        (study(LOSSES), None, "no effect to plan for"),
        (study({"plain": [3.0, 3.1], "a": [2.9]}), 0.1, "two complete seeds of 'plain' and of another arm"),
        (StudyResults("s", Path(), "", (), {}, [], 0), 0.1, "s has no arms"),
    ],
)
def test_nothing_to_plan_from(results: StudyResults, effect: float | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(results, effect)


def test_the_command(tmp_path: Path) -> None:
    analysis = {"metric": "test/loss", "smallest_effect": 0.05}
    ablation = {"baseline": "plain", "arms": {key: {} for key in LOSSES}, "seeds": [0, 1, 2], "analysis": analysis}
    write_json(tmp_path / "study.json", {"x-name": "s", "x-ablation": {**ablation, "tune": None}})
    write_json(tmp_path / "manifest.json", {"trials": 9})
    for number, (arm, seed) in enumerate((arm, seed) for arm in LOSSES for seed in range(3)):
        folder = tmp_path / "trials" / f"{number:04d}"
        write_json(folder / "trial.json", {"label": arm, "role": "cell", "params": {"arm": arm, "seed": seed}})
        metrics = {"test/loss": LOSSES[arm][seed], "seconds": 3600}
        write_json(folder / "result.json", {"status": "complete", "metrics": metrics})
    text = CliRunner().invoke(command, [str(tmp_path)], catch_exceptions=False).output
    assert (
        "s: seeds to show a difference of 0.05 in test/loss (power 0.8, alpha 0.05, 2 arms against plain by holm)"
        in text
    )
    assert "together" in text
    assert "hours of one worker" in text
    told = json.loads(CliRunner().invoke(command, [str(tmp_path), "--json", "--effect", "10"]).output)
    assert (told["needed"]["seeds"], told["cost"]["trials"]) == (3, 0)
