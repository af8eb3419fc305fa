"""Comparing many arms with one baseline: adjusted p values and critical values.

All tests are two-sided, and alpha is the chance of *any* wrong claim, "better" or "worse", over all arms of a study; a
wrong "better" alone has half of it by symmetry.

Holm (1979) holds for any dependence between the arms and lets each arm have a variance of its own. Dunnett (1955) is
exact, and stronger, where all arms scatter alike: see `dense_lab.statistics.paired.blocks_test`.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import optimize, special, stats

Correction = Literal["holm", "dunnett", "none"]
Floats = npt.NDArray[np.float64]


def adjust(p: Floats, statistic: Floats, df: int, correction: Correction) -> Floats:
    """p values adjusted over the last axis; not-a-number stands for an arm that was not tested and does not count."""
    if correction == "none":
        return p
    if correction == "holm":
        return holm(p)
    comparisons = np.isfinite(p).sum(axis=-1)
    return np.asarray(dunnett_p(np.abs(statistic), df, int(np.max(comparisons, initial=1))))


def holm(p: Floats) -> Floats:
    """Step-down Bonferroni: the smallest p times m, the next times m - 1, ..., never decreasing, at most 1."""
    order = np.argsort(p, axis=-1)  # not-a-number goes last
    ranked = np.take_along_axis(p, order, axis=-1)
    tested = np.isfinite(p).sum(axis=-1, keepdims=True)
    factors = tested - np.arange(p.shape[-1])
    # fmax: what was not tested must not spoil the running maximum.
    raised = np.minimum(np.fmax.accumulate(ranked * np.maximum(factors, 1), axis=-1), 1.0)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, raised, axis=-1)
    return np.where(np.isfinite(p), adjusted, np.nan)


def critical(df: int, alpha: float, comparisons: int, correction: Correction) -> float:
    """Smallest |t| that is significant for an arm which is the only one that differs, and of simultaneous intervals.

    Holm: Bonferroni's value, with which its first step begins. `df`: degrees of freedom of the statistic.
    """
    if correction == "dunnett" and comparisons > 1:
        return dunnett_critical(df, alpha, comparisons)
    level = alpha / comparisons if correction == "holm" else alpha
    return float(stats.t.isf(level / 2, df))


def dunnett_p(statistic: Floats | float, df: int, comparisons: int) -> Floats:
    """P(max |T_i| > statistic) over `comparisons` t statistics with correlation 1/2, which a shared baseline makes.

    Given the baseline's own deviation z and the residual deviation s the arms are independent, so that

        P(max |T_i| <= c) = E_s E_z [ Phi(z + sqrt(2) c s) - Phi(z - sqrt(2) c s) ] ^ comparisons

    (Dunnett 1955, the two-sided case); both expectations are Gaussian quadratures, good to 2e-6 of p.
    """
    c = np.asarray(statistic, dtype=np.float64)[..., None, None]
    s, s_weight = scatter_nodes(df)
    z, z_weight = _normal_nodes()
    width = np.sqrt(2.0) * c * s[:, None]
    inside = special.ndtr(z + width) - special.ndtr(z - width)
    p: Any = 1.0 - (inside**comparisons @ z_weight) @ s_weight
    return np.asarray(np.where(np.isnan(statistic), np.nan, np.clip(p, 0.0, 1.0)), dtype=np.float64)


@functools.lru_cache(maxsize=1024)
def dunnett_critical(df: int, alpha: float, comparisons: int) -> float:
    """The |t| that the largest of `comparisons` exceeds with probability `alpha`."""
    low = float(stats.t.isf(alpha / 2, df))
    high = float(stats.t.isf(alpha / 2 / comparisons, df)) + 1e-6
    return float(optimize.brentq(lambda c: float(dunnett_p(c, df, comparisons)) - alpha, low * 0.999, high * 1.001))


@functools.lru_cache(maxsize=256)
def scatter_nodes(df: int) -> tuple[Floats, Floats]:
    """Nodes and weights of an expectation over s = chi(df) / sqrt(df), the ratio of estimated to true deviation."""
    nodes, weights = np.polynomial.legendre.leggauss(256)
    v = (nodes + 1) / 2
    # Probability v^6 instead of v: a large statistic comes of a small s, so nodes crowd there.
    return np.sqrt(stats.chi2.ppf(v**6, df) / df), 3 * weights * v**5


@functools.lru_cache(maxsize=1)
def _normal_nodes() -> tuple[Floats, Floats]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(96)
    return nodes, weights / weights.sum()
