"""How many seeds an effect needs, and how small an effect some seeds can show."""

from __future__ import annotations

import numpy as np
from scipy import optimize, special, stats

from dense_lab.errors import InputError
from dense_lab.statistics.corrections import Correction, critical, scatter_nodes

MOST_SEEDS = 100_000
"""More are not looked for."""


def chance_shown(noncentrality: float, df: int, threshold: float) -> float:
    """P(T > threshold) for a noncentral t: how often an effect is found, in the direction that it has.

    `noncentrality` is effect / (deviation of the differences / sqrt(seeds)). With s = chi(df) / sqrt(df) this is
    E_s[Phi(noncentrality - threshold s)] (Johnson, Kotz and Balakrishnan 1995, chapter 31), which unlike the usual
    series is well behaved at one degree of freedom and thresholds in the hundreds.
    """
    s, weights = scatter_nodes(df)
    return float(special.ndtr(noncentrality - threshold * s) @ weights)


def degrees_of_freedom(seeds: int, comparisons: int, correction: Correction) -> int:
    """Of an arm's t statistic: seeds - 1, times the number of arms where Dunnett pools their scatter."""
    return (seeds - 1) * (comparisons if correction == "dunnett" else 1)


def detectable(
    sd_of_differences: float,
    seeds: int,
    *,
    alpha: float = 0.05,
    power: float = 0.8,
    comparisons: int = 1,
    correction: Correction = "holm",
) -> float:
    """The smallest true difference that `seeds` pairs show with probability `power`; not a number for one pair.

    It follows from the scatter and the number of seeds, never from the difference that was observed: "observed
    power" is a function of p and says nothing more (Hoenig and Heisey 2001).
    """
    if seeds < 2 or not np.isfinite(sd_of_differences):
        return float("nan")
    df = degrees_of_freedom(seeds, comparisons, correction)
    shift = noncentrality(critical(df, alpha, comparisons, correction), df, power)
    return float(sd_of_differences / np.sqrt(seeds) * shift)


def noncentrality(threshold: float, df: int, power: float) -> float:
    """The noncentrality at which |t| > `threshold` on its own side has probability `power`."""
    top = 2.0 * threshold + 10.0
    while chance_shown(top, df, threshold) < power:
        top *= 2
    return float(optimize.brentq(lambda delta: chance_shown(delta, df, threshold) - power, 0.0, top))


def seeds_needed(
    sd_of_differences: float,
    smallest_effect: float,
    *,
    alpha: float = 0.05,
    power: float = 0.8,
    comparisons: int = 1,
    correction: Correction = "holm",
) -> int:
    """Fewest seeds with which a true difference of `smallest_effect` is shown with probability `power`, at least 2.

    sd_of_differences: standard deviation of paired differences to the baseline, in the metric's unit, taken as known.
    comparisons: arms beside the baseline. Holm is planned at its first step, alpha / comparisons: the promise then
    holds for an arm that is the only one that differs, and others can only help it.
    Raises InputError for an effect that is not positive, or one that needs more than MOST_SEEDS.
    """
    check_levels(alpha, power)
    if not smallest_effect > 0 or not sd_of_differences >= 0 or comparisons < 1:
        got = f"{smallest_effect=}, {sd_of_differences=}, {comparisons=}"
        raise InputError(f"seeds can be counted for a positive effect, a known scatter and an arm or more, got {got}")

    def shown(seeds: int) -> bool:
        asked = {"alpha": alpha, "power": power, "comparisons": comparisons}
        return detectable(sd_of_differences, seeds, **asked, correction=correction) <= smallest_effect  # type: ignore[arg-type]

    enough = 2
    while not shown(enough):
        enough *= 2
        if enough > MOST_SEEDS:
            raise InputError(
                f"more than {MOST_SEEDS:,} seeds to show {smallest_effect:g} with a scatter of {sd_of_differences:g}: "
                "choose a larger effect, or a metric that scatters less"
            )
    candidates = range(max(2, enough // 2), enough + 1)
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if shown(candidates[middle]) else (middle + 1, high)
    return candidates[low]


def upper_deviation(sd: float, df: float, confidence: float = 0.8) -> float:
    """One-sided upper confidence limit of a standard deviation estimated with `df` degrees of freedom.

    A pilot of few seeds underestimates scatter more often than not; planning with this limit gives at least the
    promised power with about this confidence (Browne 1995).
    """
    return float(sd * np.sqrt(df / stats.chi2.ppf(1 - confidence, df))) if df > 0 else float("nan")


def check_levels(alpha: float, power: float) -> None:
    """Raise InputError unless both lie strictly between 0 and 1 and power is more than alpha."""
    if not 0 < alpha < 1 or not alpha < power < 1:
        raise InputError(f"alpha and power must lie between 0 and 1, alpha below power: got {alpha=} and {power=}")
