"""Seeds and effects against the noncentral t and published sample sizes."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from dense_lab.errors import InputError
from dense_lab.statistics import detectable, seeds_needed, upper_deviation
from dense_lab.statistics.power import chance_shown


@pytest.mark.parametrize(
    ("noncentrality", "df", "threshold"), [(0.0, 4, 2.8), (4.0, 4, 2.8), (4.0, 1, 12.7), (3, 50, 2)]
)
def test_the_noncentral_t(noncentrality: float, df: int, threshold: float) -> None:
    expected = stats.nct.sf(threshold, df, noncentrality)
    assert chance_shown(noncentrality, df, threshold) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("d", "power", "seeds"), [(0.5, 0.8, 34), (0.8, 0.8, 15), (0.2, 0.8, 199), (0.5, 0.95, 54)])
def test_textbook_sample_sizes(d: float, power: float, seeds: int) -> None:
    """Paired t test, two-sided 5 %: the figures that G*Power prints (Faul et al. 2007)."""
    assert seeds_needed(1.0, d, alpha=0.05, power=power) == seeds


@pytest.mark.parametrize("correction", ["holm", "dunnett", "none"])
@pytest.mark.parametrize("effect", [0.3, 1.0, 4.0])
def test_fewest(correction: str, effect: float) -> None:
    asked = {"alpha": 0.05, "power": 0.9, "comparisons": 9, "correction": correction}
    seeds = seeds_needed(1.0, effect, **asked)
    assert detectable(1.0, seeds, **asked) <= effect
    assert seeds == 2 or detectable(1.0, seeds - 1, **asked) > effect


def test_more_arms_need_more_seeds() -> None:
    counts = [seeds_needed(1.0, 1.0, comparisons=arms) for arms in (1, 4, 16, 64)]
    assert counts == sorted(set(counts))


def test_extremes() -> None:
    assert seeds_needed(0.0, 0.01) == 2
    assert detectable(0.0, 5) == 0.0
    assert math.isnan(detectable(1.0, 1))
    assert math.isnan(detectable(math.nan, 5))
    with pytest.raises(InputError, match="more than 100,000 seeds"):
        seeds_needed(1.0, 1e-6)


@pytest.mark.parametrize(("sd", "effect"), [(1.0, 0.0), (1.0, -0.1), (math.nan, 0.1), (-1.0, 0.1)])
def test_nothing_to_plan(sd: float, effect: float) -> None:
    with pytest.raises(InputError, match="positive effect"):
        seeds_needed(sd, effect)


def test_upper_limit_of_a_deviation() -> None:
    assert upper_deviation(1.0, 4) == pytest.approx(math.sqrt(4 / stats.chi2.ppf(0.2, 4)))
    assert 1 < upper_deviation(1.0, 40) < upper_deviation(1.0, 4) < upper_deviation(1.0, 1)
    assert math.isnan(upper_deviation(1.0, 0))
