"""Comparisons of arms: what is computed, and what becomes of data that are ill."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from dense_lab.errors import InputError
from dense_lab.statistics import Comparison, compare

NAN = float("nan")


def table(*rows: list[float]) -> dict[str, dict[int, float]]:
    """Arms "base", "a", "b", ... by seeds 0, 1, ..."""
    return {name: dict(enumerate(row)) for name, row in zip(("base", "a", "b", "c"), rows, strict=False)}


def run(values: dict[str, dict[int, float]], **asked: object) -> Comparison:
    return compare(values, "base", metric="test/loss", **asked)  # type: ignore[arg-type]


BASE = [3.00, 3.10, 2.95, 3.05, 3.02]
LOWER = [2.90, 3.01, 2.84, 2.96, 2.92]
NOISE = [3.05, 3.02, 2.99, 3.01, 3.10]


def test_two_arms_are_a_paired_t_test() -> None:
    found = run(table(BASE, NOISE))["a"]
    oracle = stats.ttest_rel(NOISE, BASE)
    assert found.p == found.p_adjusted == pytest.approx(oracle.pvalue)
    assert found.t_interval == pytest.approx(tuple(oracle.confidence_interval(0.95)))
    differences = np.subtract(NOISE, BASE)
    assert found.effect_size == pytest.approx(differences.mean() / differences.std(ddof=1))
    assert found.mean_interval == pytest.approx(stats.t.interval(0.95, 4, np.mean(NOISE), stats.sem(NOISE)))
    assert (found.seeds, found.verdict) == (5, "no difference shown")


@pytest.mark.parametrize(("direction", "verdict"), [("minimize", "better"), ("maximize", "worse")])
def test_direction(direction: str, verdict: str) -> None:
    found = run(table(BASE, LOWER, NOISE), direction=direction)["a"]
    assert found.verdict == verdict
    assert found.difference == pytest.approx(-0.098)  # arm - baseline, whatever the direction


def test_holm_and_its_bonferroni_intervals() -> None:
    values = table(BASE, LOWER, NOISE)
    found, alone = run(values), run(values, correction="none")
    assert found["a"].p_adjusted == pytest.approx(2 * alone["a"].p)
    assert found["b"].p_adjusted == pytest.approx(alone["b"].p)
    oracle = stats.ttest_rel(NOISE, BASE).confidence_interval(0.975)
    assert found["b"].t_interval == pytest.approx(tuple(oracle))


def test_dunnett_is_the_two_way_model() -> None:
    """Its t is that of a linear model with arms and seeds as factors, solved by least squares."""
    rows = np.array([BASE, LOWER, NOISE])
    design = [[1.0, a == 1, a == 2, *(s == k for k in range(1, 5))] for a in range(3) for s in range(5)]
    x = np.array(design, dtype=float)
    solution, rest, *_ = np.linalg.lstsq(x, rows.ravel(), rcond=None)
    error = np.sqrt(rest[0] / 8 * np.linalg.inv(x.T @ x)[2, 2])
    found = run(table(BASE, LOWER, NOISE), correction="dunnett")["b"]
    assert found.difference == pytest.approx(solution[2])
    assert found.p == pytest.approx(2 * stats.t.sf(abs(solution[2] / error), 8))
    assert found.p < found.p_adjusted < 2 * found.p
    low, high = found.t_interval
    assert (high - low) / 2 / error == pytest.approx(2.673, abs=2e-3)  # Dunnett (1964): 2.67 for 8 df, 2 comparisons


def test_a_shared_seed_effect_drops_out() -> None:
    shift = np.array([0.0, 5.0, -3.0, 2.0, 9.0])
    for correction in ("holm", "dunnett"):
        plain = run(table(BASE, LOWER, NOISE), correction=correction)
        shifted = run(table(*(list(np.add(row, shift)) for row in (BASE, LOWER, NOISE))), correction=correction)
        for one, other in zip(plain.arms[1:], shifted.arms[1:], strict=True):
            assert one.p_adjusted == pytest.approx(other.p_adjusted, rel=1e-9)
            assert one.t_interval == pytest.approx(other.t_interval, rel=1e-9)


def test_bootstrap_is_the_same_every_time() -> None:
    first, second = (run(table(BASE, NOISE))["a"].bca_interval for _ in range(2))
    assert first == second
    assert min(np.subtract(NOISE, BASE)) <= first[0] < first[1] <= max(np.subtract(NOISE, BASE))


def test_underpowered_and_no_difference() -> None:
    values = table(BASE, NOISE)
    smallest = run(values)["a"].detectable
    assert run(values, smallest_effect=smallest * 0.99)["a"].verdict == "underpowered"
    assert run(values, smallest_effect=smallest * 1.01)["a"].verdict == "no difference shown"
    two = {arm: {0: cells[0], 1: cells[1]} for arm, cells in values.items()}
    assert run(two)["a"].verdict == "underpowered"


def test_the_baseline_has_a_row() -> None:
    found = run(table(BASE, NOISE))["base"]
    assert (found.verdict, found.difference, found.seeds) == ("baseline", 0.0, 5)
    assert run(table(BASE)).arms == (run(table(BASE))["base"],)


@pytest.mark.parametrize("correction", ["holm", "dunnett", "none"])
def test_missing_seeds(correction: str) -> None:
    values = table(BASE, LOWER, NOISE)
    del values["b"][0]
    values["b"][4] = NAN
    values["a"][7] = 1.0  # no partner: not part of the comparison
    found = run(values, correction=correction)
    assert found["b"].seeds == 3
    assert found["a"].seeds == (3 if correction == "dunnett" else 5)
    assert found["b"].difference == pytest.approx(np.mean(np.subtract(NOISE, BASE)[1:4]))


@pytest.mark.parametrize("correction", ["holm", "dunnett", "none"])
@pytest.mark.parametrize("cells", [{}, {0: 2.0}, {0: 2.0, 9: 1.0}, {0: NAN, 1: float("inf")}, {0: 2.9, 1: NAN}])
def test_one_pair_or_none(correction: str, cells: dict[int, float]) -> None:
    values = {**table(BASE, LOWER), "b": cells}
    found = run(values, correction=correction)
    assert found["b"].verdict == "underpowered"
    assert all(map(math.isnan, (*found["b"].t_interval, found["b"].p, found["b"].p_adjusted)))
    assert found["a"].verdict == "better"
    assert found["a"].p_adjusted == pytest.approx(found["a"].p)  # an arm that is not tested costs the others nothing


@pytest.mark.parametrize("correction", ["holm", "dunnett", "none"])
def test_equal_arms(correction: str) -> None:
    found = run(table(BASE, BASE, BASE), correction=correction, smallest_effect=1e-9)["a"]
    assert (found.difference, found.p_adjusted, found.detectable) == (0.0, 1.0, 0.0)
    assert found.verdict == "no difference shown"


def test_rounding_is_not_a_difference() -> None:
    thirds = [value / 3 * 3 for value in BASE]
    nearly = [np.nextafter(value, 4) for value in thirds]
    assert run(table(thirds, nearly))["a"].verdict == "no difference shown"


@pytest.mark.parametrize("correction", ["holm", "dunnett", "none"])
def test_a_metric_that_no_seed_changes(correction: str) -> None:
    found = run(table([100.0] * 3, [90.0] * 3, [100.0] * 3, [110.0] * 3), correction=correction)
    assert [found[arm].verdict for arm in "abc"] == ["better", "no difference shown", "worse"]
    assert found["a"].t_interval == found["a"].bca_interval == (-10.0, -10.0)
    assert found["a"].effect_size == -math.inf


def test_equal_differences_of_a_coarse_metric_are_no_proof() -> None:
    found = run(table([0.50, 0.25, 0.75], [0.25, 0.0, 0.5]))["a"]
    assert found.verdict == "underpowered"
    assert math.isnan(found.p_adjusted)


def test_two_equal_values_are_not_yet_a_fact() -> None:
    assert run(table([100.0] * 2, [90.0] * 2))["a"].verdict == "underpowered"


def test_order_of_arms_and_seeds_does_not_matter() -> None:
    values = table(BASE, LOWER, NOISE)
    turned = {arm: dict(reversed(list(values[arm].items()))) for arm in ("b", "base", "a")}
    for correction in ("holm", "dunnett"):
        one, other = (run(v, correction=correction)["a"] for v in (values, turned))
        assert one.p_adjusted == pytest.approx(other.p_adjusted)
        assert one.bca_interval == other.bca_interval


def test_no_baseline() -> None:
    with pytest.raises(InputError, match="no arm named 'base'"):
        run({"bass": {0: 1.0}})


@pytest.mark.parametrize("asked", [{"alpha": 0.0}, {"alpha": 1.0}, {"power": 0.01}])
def test_levels(asked: dict[str, float]) -> None:
    with pytest.raises(InputError, match="alpha and power"):
        run(table(BASE, NOISE), **asked)


def test_json_has_no_nan() -> None:
    told = run({**table([1.0] * 3, [2.0] * 3), "b": {}}).as_json()
    assert "NaN" not in json.dumps(told, allow_nan=False)
    assert told["arms"][2]["t_interval"] == [None, None]


def test_two_pairs_support_no_claim() -> None:
    values = {"plain": {0: 2.0, 1: 2.1}, "arm": {0: 1.9, 1: 2.0001}}
    (arm,) = (
        row for row in compare(values, "plain", metric="test/loss", smallest_effect=1e-4).arms if row.arm == "arm"
    )
    assert arm.p_adjusted < 0.05
    assert arm.verdict == "underpowered"
