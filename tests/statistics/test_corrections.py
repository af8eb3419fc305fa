"""Adjusted p values and critical values against published tables and other implementations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dense_lab.statistics.corrections import adjust, critical, dunnett_critical, dunnett_p, holm

# Two-sided 5 % points of Dunnett (1964), table 3, for 1 to 5 comparisons.
PUBLISHED = {
    5: (2.57, 3.03, 3.29, 3.48, 3.62),
    10: (2.23, 2.57, 2.76, 2.89, 2.99),
    20: (2.09, 2.38, 2.54, 2.65, 2.73),
}


@pytest.mark.parametrize("df", PUBLISHED)
def test_dunnetts_table(df: int) -> None:
    found = [dunnett_critical(df, 0.05, comparisons) for comparisons in range(1, 6)]
    assert found == pytest.approx(PUBLISHED[df], abs=0.006)  # two decimals, and the table's own rounding


@pytest.mark.parametrize("df", [1, 2, 4, 36])
@pytest.mark.parametrize("alpha", [0.2, 0.05, 0.0005])
def test_one_comparison_is_students_t(df: int, alpha: float) -> None:
    assert float(dunnett_p(stats.t.isf(alpha / 2, df), df, 1)) == pytest.approx(alpha, rel=1e-5)


@pytest.mark.parametrize(("df", "c"), [(1, 30.0), (4, 6.0), (36, 2.8)])
def test_the_multivariate_t(df: int, c: float) -> None:
    rng = np.random.default_rng(0)
    scatter = np.sqrt(rng.chisquare(df, 400_000) / df)
    shared = rng.normal(size=400_000)
    largest = np.max([np.abs(rng.normal(size=400_000) - shared) for _ in range(9)], axis=0) / np.sqrt(2) / scatter
    expected = float((largest > c).mean())
    assert float(dunnett_p(c, df, 9)) == pytest.approx(expected, abs=4 * np.sqrt(expected / 400_000))


def test_holm_by_hand() -> None:
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_over_rows_and_missing_arms() -> None:
    p = np.array([[0.01, np.nan, 0.02], [0.9, 0.8, 0.7]])
    np.testing.assert_allclose(holm(p), [[0.02, np.nan, 0.02], [1.0, 1.0, 1.0]])


def test_corrections_are_ordered() -> None:
    """Dunnett is never more cautious than Bonferroni, and never bolder than no correction."""
    for comparisons in (2, 9, 200):
        alone, dunnett, bonferroni = (critical(36, 0.05, comparisons, c) for c in ("none", "dunnett", "holm"))
        assert alone < dunnett < bonferroni
    p, t = np.array([0.01, np.nan, 0.5]), np.array([2.7, np.nan, 0.7])
    adjusted = adjust(p, t, 36, "dunnett")
    assert 0.01 < adjusted[0] < 0.02
    assert np.isnan(adjusted[1])
    assert adjust(p, t, 36, "none") is p
