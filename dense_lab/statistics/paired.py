"""Tests on paired differences, over arrays whose last axis is the seeds, so that simulations run the product's code."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
from scipy import stats

from dense_lab.statistics.corrections import Floats

RESAMPLES = 9_999
"""Of the bootstrap."""
ROUNDING = 8 * float(np.finfo(np.float64).eps)
"""Differences below this fraction of the values are the rounding of a subtraction."""


class Tested(NamedTuple):
    """A t statistic and what it is made of; every array has one entry per arm."""

    mean: Floats
    """Mean difference."""
    error: Floats
    """Its standard error."""
    df: int
    """Degrees of freedom of the error."""
    t: Floats
    """mean / error."""
    p: Floats
    """Two-sided, of this arm alone; not a number where nothing scatters and yet the mean is not zero."""

    def as_fact(self) -> Tested:
        """Of a metric that no seed changes, such as a count of parameters: a difference is certain."""
        mean = float(self.mean)
        t, p = (np.copysign(np.inf, mean), 0.0) if mean else (0.0, 1.0)
        return Tested(self.mean, np.array(0.0), self.df, np.array(t), np.array(p))


def differences(values: Floats, baseline: Floats) -> Floats:
    """values - baseline, with rounding noise set to zero, so that equal runs are exactly equal."""
    with np.errstate(invalid="ignore"):
        raw = values - baseline
    return np.where(np.abs(raw) <= ROUNDING * np.maximum(np.abs(values), np.abs(baseline)), 0.0, raw)


def deviation(sample: Floats) -> Floats:
    """Standard deviation over the last axis (n - 1 below), exactly zero for equal values; nan for fewer than two."""
    if sample.shape[-1] < 2:
        return np.full(sample.shape[:-1], np.nan)
    sd = sample.std(axis=-1, ddof=1)
    return np.where(sd <= ROUNDING * np.abs(sample).max(axis=-1), 0.0, sd)


def t_test(sample: Floats) -> Tested:
    """Student's t test of mean zero over the last axis; two values or more."""
    n = sample.shape[-1]
    return _tested(sample.mean(axis=-1), deviation(sample) / np.sqrt(n), n - 1)


def blocks_test(values: Floats, baseline: Floats) -> Tested:
    """t statistics of [..., arms, seeds] against [..., seeds], their error pooled over arms: randomised blocks.

    Two-way model y = mean + arm + seed + noise. A seed shifts all arms alike and drops out; what is left over, with
    arms x (seeds - 1) degrees of freedom, estimates the noise, which is taken to be equal in all arms and independent
    between them. `scipy.stats.dunnett` is the one-way form for independent groups: it would count the shared shift
    as noise.
    """
    everything = np.concatenate([baseline[..., None, :], values], axis=-2)
    arms, seeds = everything.shape[-2:]
    residual = everything - everything.mean(axis=-1, keepdims=True) - everything.mean(axis=-2, keepdims=True)
    residual = residual + everything.mean(axis=(-1, -2), keepdims=True)
    df = (arms - 1) * (seeds - 1)
    scatter = np.sqrt((residual**2).sum(axis=(-1, -2)) / df)
    scatter = np.where(scatter <= ROUNDING * np.abs(everything).max(axis=(-1, -2)), 0.0, scatter)
    mean = differences(values, baseline[..., None, :]).mean(axis=-1)
    return _tested(mean, np.broadcast_to((scatter * np.sqrt(2 / seeds))[..., None], mean.shape), df)


def _tested(mean: Floats, error: Floats, df: int) -> Tested:
    # Equal differences that are not zero have shown no scatter to measure them by: a coarse metric, by chance.
    error = np.where((error == 0) & (mean != 0), np.nan, error)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where((mean == 0) & (error == 0), 0.0, mean / error)
    return Tested(mean, error, df, t, np.asarray(2 * stats.t.sf(np.abs(t), df)))


def t_interval(mean: float, error: float, threshold: float) -> tuple[float, float]:
    """mean -/+ threshold x error."""
    return mean - threshold * error, mean + threshold * error


def bca_interval(sample: Floats, level: float) -> tuple[float, float]:
    """Bias-corrected and accelerated bootstrap interval of the mean (Efron 1987), the same every time.

    Shown beside the t interval as a check on skew, never used for a verdict: five values have 126 distinct resamples,
    and the interval covers less than it says. Not a number for fewer than three values, or values that are all equal.
    """
    if len(sample) < 3 or deviation(sample) == 0:
        return float("nan"), float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            (sample,),
            np.mean,
            confidence_level=level,
            n_resamples=RESAMPLES,
            method="BCa",
            rng=np.random.default_rng(0),
        )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
