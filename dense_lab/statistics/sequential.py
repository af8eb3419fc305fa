"""When to stop adding seeds, so that stopping does not make the verdicts wrong.

Looks are taken after every pair from `first` to `maximum`, both fixed beforehand. Each arm has a sequential p value:
the smallest overall level at which it has crossed the exact boundaries of `dense_lab.statistics.boundaries` at some
look so far (Liu and Anderson 2008). Holm over these keeps alpha over all arms and all looks, whichever arms are gone on with.

An arm is decided once it is shown better or worse, or once an effect of the smallest size worth claiming is ruled out:
its repeated interval of two-sided level 2 (1 - power) lies within -/+ smallest_effect. An arm whose true effect is as
large as that is therefore wrongly given up with probability at most 1 - power, over all looks together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dense_lab.errors import InputError
from dense_lab.statistics import boundaries as bounds
from dense_lab.statistics.comparison import (
    FEWEST,
    ArmVerdict,
    Comparison,
    Direction,
    Values,
    Verdict,
    baseline_row,
    effect_size,
    finite,
    improvement,
    own_interval,
    own_mean,
    paired_differences,
    untested_row,
)
from dense_lab.statistics.corrections import Correction, Floats, holm
from dense_lab.statistics.paired import Tested, bca_interval, deviation, t_interval, t_test
from dense_lab.statistics.power import check_levels, noncentrality


def undecided(
    values: Values,
    baseline: str,
    *,
    first: int,
    maximum: int,
    alpha: float = 0.05,
    correction: Correction = "holm",
    direction: Direction = "minimize",
    smallest_effect: float | None = None,
    power: float = 0.8,
) -> list[str]:
    """Arms that need another seed, given what is there; empty when all are decided or have `maximum` pairs.

    Arms with fewer than `first` pairs are among them. Arguments as of `compare_at_look`.
    """
    look = compare_at_look(
        values, baseline, first=first, maximum=maximum, alpha=alpha, correction=correction, direction=direction,
        smallest_effect=smallest_effect, power=power,
    )  # fmt: skip
    # Without a smallest effect nothing can be ruled out, so only what is shown is decided.
    open_verdicts = {"underpowered", "no difference shown"} if smallest_effect is None else {"underpowered"}
    return [arm.arm for arm in look.arms if arm.verdict in open_verdicts and arm.seeds < maximum]


def compare_at_look(
    values: Values,
    baseline: str,
    *,
    first: int,
    maximum: int,
    metric: str = "",
    direction: Direction = "minimize",
    alpha: float = 0.05,
    correction: Correction = "holm",
    smallest_effect: float | None = None,
    power: float = 0.8,
) -> Comparison:
    """`compare`, for a study that was looked at after every seed from `first` to `maximum`.

    p is the arm's sequential p value (at least 1e-8), p_adjusted Holm's over the arms, t_interval the repeated interval
    at this look. Pairs are taken in the order of their seeds, so seeds are to be added in rising order; pairs beyond
    `maximum` are left out of the test. Raises InputError for Dunnett's correction, which has no sequential form here.
    """
    check_levels(alpha, power)
    if correction == "dunnett":
        raise InputError("adding seeds until decided has no form for correction dunnett: use holm, or a fixed `seeds`")
    if not 2 <= first <= maximum:
        raise InputError(f"looks go from 2 seeds or more up to a maximum, got {first=} and {maximum=}")
    known = {arm: finite(cells) for arm, cells in values.items()}
    pairs = {arm: found[:maximum] for arm, found in paired_differences(known, baseline).items()}
    rule = _Rule(
        bounds.boundaries(first, maximum),
        alpha if correction == "none" else alpha / max(len(pairs), 1),
        smallest_effect,
        power,
    )
    p = {arm: rule.p(sample) for arm, sample in pairs.items()}
    # An arm that waits for its first look counts: it may still be shown to differ later.
    alone = np.array(list(p.values()), dtype=np.float64)
    adjusted = dict(zip(p, (alone if correction == "none" else holm(alone)).tolist(), strict=True))
    rows = []
    for arm, cells in known.items():
        if arm == baseline:
            rows.append(baseline_row(arm, cells, alpha))
        elif len(pairs[arm]) < first:
            rows.append(untested_row(arm, cells, pairs[arm], alpha))
        else:
            shown = improvement(float(pairs[arm].mean()), direction) if adjusted[arm] <= alpha else None
            rows.append(_row(arm, cells, pairs[arm], (p[arm], adjusted[arm]), shown, alpha, rule))
    return Comparison(baseline, metric, direction, alpha, correction, tuple(rows))


@dataclass(frozen=True)
class _Rule:
    boundaries: bounds.Boundaries
    level: float
    """Of one arm's repeated interval."""
    smallest_effect: float | None
    power: float

    def looks(self, sample: Floats) -> list[tuple[int, Tested]]:
        """Number of pairs and test at every look so far."""
        return [(n, t_test(sample[:n])) for n in range(self.boundaries.first, len(sample) + 1)]

    def p(self, sample: Floats) -> float:
        """Sequential p value; 1 before the first look."""
        found = [self.boundaries.level(n, float(test.t)) for n, test in self.looks(sample) if _usable(n, test)]
        return min(found, default=1.0)

    def ruled_out(self, sample: Floats) -> bool:
        """Whether an effect of the smallest size was excluded at some look so far."""
        if self.smallest_effect is None:
            return len(sample) >= FEWEST
        level = min(2 * (1 - self.power), 0.99)
        for n, test in self.looks(sample):
            low, high = t_interval(float(test.mean), float(test.error), self.boundaries.threshold(n, level))
            if _usable(n, test) and -self.smallest_effect < low and high < self.smallest_effect:
                return True
        return False


def _usable(n: int, test: Tested) -> bool:
    # Two equal differences may be the coarseness of a metric; see `compare`.
    return n >= FEWEST or float(test.error) > 0


def _row(
    arm: str,
    cells: Mapping[int, float],
    sample: Floats,
    p: tuple[float, float],
    shown: Verdict | None,
    alpha: float,
    rule: _Rule,
) -> ArmVerdict:
    n, test = len(sample), t_test(sample)
    threshold = rule.boundaries.threshold(n, rule.level)
    mean, error = float(test.mean), float(test.error)
    return ArmVerdict(
        arm=arm,
        seeds=n,
        mean=own_mean(cells),
        mean_interval=own_interval(cells, alpha),
        difference=mean,
        t_interval=t_interval(mean, error, threshold),
        bca_interval=bca_interval(sample, 1 - rule.level),
        effect_size=effect_size(mean, float(deviation(sample))),
        p=p[0],
        p_adjusted=p[1],
        verdict=shown or ("no difference shown" if rule.ruled_out(sample) else "underpowered"),
        detectable=error * noncentrality(threshold, n - 1, rule.power) if math.isfinite(error) else math.nan,
    )
