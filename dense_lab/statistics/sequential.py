"""When to stop adding seeds, so that stopping does not make the verdicts wrong.

Looks are taken after every pair from `first` to `maximum`, both fixed beforehand. Each arm has a sequential p value:
the smallest overall level at which it has crossed the exact boundaries of `dense_lab.statistics.boundaries` at some
look so far (Liu and Anderson 2008). Holm over these keeps alpha over all arms and all looks, whichever arms go on.

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
from dense_lab.statistics.boundaries import Boundaries, boundaries
from dense_lab.statistics.comparison import (
    FEWEST,
    ArmVerdict,
    Comparison,
    Direction,
    Judged,
    Pairs,
    Values,
    Verdict,
    baseline_row,
    finite,
    improvement,
    paired,
    untested_row,
)
from dense_lab.statistics.corrections import Correction, holm
from dense_lab.statistics.paired import Tested, t_interval
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
    look = _Look.at(values, baseline, _Rule(first, maximum, alpha, correction, direction, smallest_effect, power))
    # Without a smallest effect nothing can be ruled out, so only what is shown is decided.
    waits = {"underpowered", "no difference shown"} if smallest_effect is None else {"underpowered"}
    return [
        arm for arm, verdict in look.verdicts.items() if verdict in waits and len(look.pairs[arm].differences) < maximum
    ]


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
    look = _Look.at(values, baseline, _Rule(first, maximum, alpha, correction, direction, smallest_effect, power))
    rows = [
        baseline_row(arm, finite(cells), alpha) if arm == baseline else look.row(arm, finite(cells))
        for arm, cells in values.items()
    ]
    return Comparison(baseline, metric, direction, alpha, correction, tuple(rows))


@dataclass(frozen=True)
class _Rule:
    first: int
    maximum: int
    alpha: float
    correction: Correction
    direction: Direction
    smallest_effect: float | None
    power: float

    def __post_init__(self) -> None:
        check_levels(self.alpha, self.power)
        if self.correction == "dunnett":
            raise InputError("adding seeds until decided has no form with correction dunnett: use holm, or fixed seeds")
        if not 2 <= self.first <= self.maximum:
            raise InputError(f"looks go from 2 seeds or more to a maximum, got {self.first} to {self.maximum}")

    @property
    def boundaries(self) -> Boundaries:
        return boundaries(self.first, self.maximum)

    def looks(self, pairs: Pairs) -> list[tuple[int, Tested]]:
        """Number of pairs and test at every look so far at which there is a scatter to test by."""
        sample, certain = pairs
        ends = range(self.first, len(sample) + 1)
        tests = [(n, Pairs(sample[:n], certain and n >= FEWEST).test()) for n in ends]
        return [(n, test) for n, test in tests if math.isfinite(test.error)]

    def p(self, pairs: Pairs) -> float:
        """Sequential p value; 1 before the first look."""
        return min((float(self.boundaries.level(n, float(test.t))) for n, test in self.looks(pairs)), default=1.0)

    def ruled_out(self, pairs: Pairs) -> bool:
        """Whether an effect of the smallest size was excluded at some look so far."""
        if self.smallest_effect is None:
            return len(pairs.differences) >= FEWEST
        level = min(2 * (1 - self.power), 0.99)
        for n, test in self.looks(pairs):
            low, high = t_interval(float(test.mean), float(test.error), self.boundaries.threshold(n, level))
            if -self.smallest_effect < low and high < self.smallest_effect:
                return True
        return False


@dataclass(frozen=True)
class _Look:
    rule: _Rule
    pairs: dict[str, Pairs]
    p: dict[str, float]
    adjusted: dict[str, float]
    verdicts: dict[str, Verdict]

    @classmethod
    def at(cls, values: Values, baseline: str, rule: _Rule) -> _Look:
        known = {arm: finite(cells) for arm, cells in values.items()}
        pairs = {arm: Pairs(d[: rule.maximum], certain) for arm, (d, certain) in paired(known, baseline).items()}
        p = {arm: rule.p(found) for arm, found in pairs.items()}
        # An arm that waits for its first look counts: it may still be shown to differ later.
        alone = np.array(list(p.values()), dtype=np.float64)
        adjusted = dict(zip(p, (alone if rule.correction == "none" else holm(alone)).tolist(), strict=True))
        verdicts: dict[str, Verdict] = {}
        for arm, found in pairs.items():
            if adjusted[arm] <= rule.alpha:
                verdicts[arm] = improvement(float(found.differences.mean()), rule.direction)
            else:
                verdicts[arm] = "no difference shown" if rule.ruled_out(found) else "underpowered"
        return cls(rule, pairs, p, adjusted, verdicts)

    def row(self, arm: str, cells: Mapping[int, float]) -> ArmVerdict:
        rule, sample = self.rule, self.pairs[arm].differences
        if len(sample) < rule.first:
            return untested_row(arm, cells, sample, rule.alpha)
        n, test = len(sample), self.pairs[arm].test()
        # Of an interval that holds at every look and, by Bonferroni, for every arm.
        level = rule.alpha if rule.correction == "none" else rule.alpha / len(self.pairs)
        threshold = rule.boundaries.threshold(n, level)
        smallest = float(test.error) * noncentrality(threshold, n - 1, rule.power)
        judged = Judged(self.p[arm], self.adjusted[arm], self.verdicts[arm], smallest)
        return judged.row(arm, cells, sample, n, test, threshold, 1 - level, rule.alpha)
