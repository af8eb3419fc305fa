"""Looks after every seed: boundaries, sequential p values, which arms go on."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest
from scipy import stats

from dense_lab.errors import InputError
from dense_lab.statistics import compare, compare_at_look, undecided
from dense_lab.statistics.boundaries import boundaries
from dense_lab.statistics.paired import t_test

ASKED = {"first": 3, "maximum": 8}


def values(effect: float, seeds: int, noise: float = 0.1, arms: int = 2) -> dict[str, dict[int, float]]:
    rng = np.random.default_rng(0)
    rows = 3 + noise * rng.normal(size=(arms + 1, 8))
    rows[1] -= effect
    return {name: dict(enumerate(row[:seeds])) for name, row in zip(("base", "a", "b"), rows, strict=False)}


def test_one_look_is_the_ordinary_test() -> None:
    found = boundaries(5, 5)
    for level in (0.5, 0.05, 0.001):
        assert found.threshold(5, level) == pytest.approx(stats.t.isf(level / 2, 4), rel=1e-3)
    at_once = compare_at_look(values(0.1, 5), "base", first=5, maximum=5)
    plain = compare(values(0.1, 5), "base", metric="")
    for one, other in zip(at_once.arms, plain.arms, strict=True):
        filled = asdict(one)
        assert filled.pop("verdict") == other.verdict
        for name, value in filled.items():
            wanted = getattr(other, name)
            assert value == (wanted if name == "arm" else pytest.approx(wanted, rel=1e-2, nan_ok=True)), name


@pytest.mark.parametrize(("first", "maximum"), [(2, 5), (3, 10)])
def test_what_is_spent(first: int, maximum: int) -> None:
    """Simulated: the share that has crossed by each look is level x (n / maximum)^2."""
    reps = 60_000
    sample = np.random.default_rng(0).normal(size=(reps, maximum))
    table = boundaries(first, maximum)
    for level in (0.4, 0.05, 0.01):
        crossed = np.zeros(reps, dtype=bool)
        for n in range(first, maximum + 1):
            crossed |= np.abs(t_test(sample[:, :n]).t) >= table.threshold(n, level)
            expected = level * (n / maximum) ** 2
            slack = 4 * math.sqrt(expected / reps) + 0.01 * expected  # of the simulation, and of the grid
            assert crossed.mean() == pytest.approx(expected, abs=slack)


def test_levels_and_thresholds_are_inverse_and_ordered() -> None:
    """Holm over sequential p values is valid only where a smaller level is nowhere easier to reach."""
    table = boundaries(3, 10)
    assert (np.diff(table.thresholds, axis=1) < 0).all()
    for level in (1e-5, 0.05 / 9, 0.05, 0.5):
        assert float(table.level(6, table.threshold(6, level))) == pytest.approx(level, rel=1e-6)
    assert float(table.level(6, 0.0)) == 1.0
    assert float(table.level(6, math.inf)) == pytest.approx(1e-8)


def test_the_grid_is_fine_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    coarse = boundaries(3, 6)
    monkeypatch.setattr("dense_lab.statistics.boundaries.CELLS", 480)
    fine = boundaries.__wrapped__(3, 6)
    for n in (3, 4, 5, 6):
        nominal = [stats.t.sf(table.threshold(n, 0.05 / 9), n - 1) for table in (coarse, fine)]
        assert nominal[0] == pytest.approx(nominal[1], rel=0.02)


def test_a_large_effect_is_decided_early_and_a_small_one_goes_on() -> None:
    assert undecided(values(5.0, 4), "base", **ASKED, smallest_effect=0.05) == ["b"]
    assert undecided(values(0.05, 4), "base", **ASKED, smallest_effect=0.05) == ["a", "b"]
    assert undecided(values(5.0, 4), "base", **ASKED, smallest_effect=10.0) == []  # b: as large an effect is ruled out


def test_everything_is_undecided_before_the_first_look() -> None:
    assert undecided(values(5.0, 2), "base", **ASKED) == ["a", "b"]
    assert undecided({"base": {}, "a": {}}, "base", **ASKED) == ["a"]


def test_the_maximum_ends_it() -> None:
    assert undecided(values(0.0, 8), "base", **ASKED, smallest_effect=1e-6) == []
    beyond = {arm: {**cells, 9: 100.0} for arm, cells in values(0.0, 8).items()}
    assert compare_at_look(beyond, "base", **ASKED)["a"].seeds == 8


def test_without_a_smallest_effect_only_what_is_shown_is_decided() -> None:
    assert undecided(values(5.0, 5), "base", **ASKED) == ["b"]
    assert compare_at_look(values(5.0, 5), "base", **ASKED)["b"].verdict == "no difference shown"


def test_once_decided_always_decided() -> None:
    """More seeds, as an arm may get that others wait for, take no claim back."""
    seen = [compare_at_look(values(2.0, n), "base", **ASKED)["a"] for n in range(3, 9)]
    p = [arm.p for arm in seen]
    assert p == sorted(p, reverse=True)
    assert seen[-1].verdict == "better"


def test_looking_costs() -> None:
    looks, plain = (
        compare_at_look(values(0.1, 8), "base", **ASKED)["a"],
        compare(values(0.1, 8), "base", metric="")["a"],
    )
    assert looks.p > plain.p
    assert looks.t_interval[0] < plain.t_interval[0] < plain.t_interval[1] < looks.t_interval[1]
    assert looks.detectable > plain.detectable


def test_ill_data() -> None:
    coarse = {"base": {0: 0.5, 1: 0.25, 2: 0.75}, "a": {0: 0.25, 1: 0.0, 2: 0.5}}
    found = compare_at_look(coarse, "base", **ASKED)["a"]
    assert (found.verdict, found.p) == ("no difference shown", 1.0)
    assert math.isnan(found.t_interval[0])
    fixed = {"base": dict.fromkeys(range(3), 100.0), "a": dict.fromkeys(range(3), 90.0)}
    assert compare_at_look(fixed, "base", **ASKED)["a"].verdict == "better"
    same = {"base": dict.fromkeys(range(3), 100.0), "a": dict.fromkeys(range(3), 100.0)}
    assert compare_at_look(same, "base", **ASKED, smallest_effect=0.1)["a"].verdict == "no difference shown"
    holes = values(5.0, 5)
    holes["a"][1] = float("nan")
    assert compare_at_look(holes, "base", **ASKED)["a"].seeds == 4


@pytest.mark.parametrize("asked", [{"first": 1, "maximum": 5}, {"first": 5, "maximum": 4}])
def test_looks_that_are_none(asked: dict[str, int]) -> None:
    with pytest.raises(InputError, match="2 seeds or more to a maximum"):
        undecided(values(0.0, 3), "base", **asked)


def test_no_dunnett() -> None:
    with pytest.raises(InputError, match="dunnett"):
        undecided(values(0.0, 3), "base", **ASKED, correction="dunnett")
