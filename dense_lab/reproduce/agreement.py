"""Whether new numbers fall where the recorded ones say that new runs fall.

Of n recorded values with mean m and standard deviation s, the mean of k new runs lies within
m -/+ t(n - 1) s sqrt(1/n + 1/k) with the stated probability, if all come from one normal distribution (Hahn and Meeker
1991, chapter 4). New runs have the recorded seeds, and so agree better than that. All intervals of a reproduction
together hold with that probability (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from dense_lab.results import TrialView

Outcome = Literal["exact", "inside", "outside", "no spread", "failed"]
CLOCKS = ("seconds", "tokens_per_second", "step_seconds", "peak_memory_bytes")
"""Metrics that no two runs share."""
HOLDS: tuple[Outcome, ...] = ("exact", "inside")


@dataclass(frozen=True)
class Agreement:
    """One number, recorded and new."""

    kind: Literal["trial", "arm", "difference"]
    """Of one run; an arm's mean over seeds; that minus the baseline's, paired by seed."""
    arm: str
    seed: int | None
    """None unless it is of one run."""
    recorded: float
    """Of the same seeds as the new one."""
    new: float | None
    """None when it could not be computed."""
    interval: tuple[float, float]
    """Where it is expected; not numbers when nothing is known of the spread."""
    outcome: Outcome

    @property
    def deviation(self) -> float:
        """New minus recorded; not a number when there is no new one."""
        return math.nan if self.new is None else self.new - self.recorded

    @property
    def holds(self) -> bool:
        """Whether it was reproduced."""
        return self.outcome in HOLDS


def expected(values: Sequence[float], count: int, alpha: float) -> tuple[float, float]:
    """Interval of the mean of `count` new runs at level 1 - alpha, see above; not numbers for fewer than two values."""
    n = len(values)
    if n < 2:
        return math.nan, math.nan
    from scipy.stats import t

    half = float(t.ppf(1 - alpha / 2, n - 1)) * stdev(values) * math.sqrt(1 / n + 1 / count)
    return fmean(values) - half, fmean(values) + half


def exact(old: TrialView, new: TrialView) -> bool:
    """Whether two runs had the same numbers to the last bit, at every line of their curves, clocks aside."""
    return _numbers(old) == _numbers(new)


def _numbers(trial: TrialView) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in (*trial.curve, trial.metrics)]


Cells = dict[str, dict[int, TrialView]]


@dataclass(frozen=True)
class Held:
    """Recorded and new runs, side by side."""

    metric: str
    alpha: float
    """Chance that all of the intervals together miss a number that was reproduced."""
    baseline: str
    chosen: Cells
    known: Cells
    """All that is recorded of the arms."""
    new: Cells
    """Complete ones."""

    def agreements(self) -> list[Agreement]:
        """Of every run, every arm with several, and every difference to the baseline."""
        pairs = [(arm, seed) for arm, cells in self.chosen.items() for seed in cells]
        several = [arm for arm, cells in self.chosen.items() if len(cells) > 1]
        rivals = [arm for arm in self.chosen if arm != self.baseline]
        alpha = self.alpha / (len(pairs) + len(several) + len(rivals))
        found = [self._trial(arm, seed, alpha) for arm, seed in pairs]
        found += [self._mean("arm", arm, alpha) for arm in several]
        return found + [self._mean("difference", arm, alpha) for arm in rivals]

    def _trial(self, arm: str, seed: int, alpha: float) -> Agreement:
        old, new = self.chosen[arm][seed], self.new.get(arm, {}).get(seed)
        spread = expected([cell.metrics[self.metric] for cell in self.known[arm].values()], 1, alpha)
        before = old.metrics[self.metric]
        if new is None:
            return Agreement("trial", arm, seed, before, None, spread, "failed")
        after = new.metrics[self.metric]
        outcome = "exact" if exact(old, new) else _outcome(after, spread)
        return Agreement("trial", arm, seed, before, after, spread, outcome)

    def _mean(self, kind: Literal["arm", "difference"], arm: str, alpha: float) -> Agreement:
        values = self._values if kind == "arm" else self._differences
        old, all_old, new = values(self.chosen, arm), values(self.known, arm), values(self.new, arm)
        spread = expected(list(all_old.values()), len(old), alpha)
        before = fmean(old.values())
        if new.keys() != old.keys():
            return Agreement(kind, arm, None, before, None, spread, "failed")
        after = fmean(new.values())
        sides = (arm,) if kind == "arm" else (arm, self.baseline)
        same = all(exact(self.chosen[side][seed], self.new[side][seed]) for side in sides for seed in old)
        return Agreement(kind, arm, None, before, after, spread, "exact" if same else _outcome(after, spread))

    def _values(self, cells: Cells, arm: str) -> dict[int, float]:
        return {seed: cell.metrics[self.metric] for seed, cell in cells.get(arm, {}).items()}

    def _differences(self, cells: Cells, arm: str) -> dict[int, float]:
        mine, theirs = self._values(cells, arm), self._values(cells, self.baseline)
        return {seed: mine[seed] - theirs[seed] for seed in mine if seed in theirs}


def _outcome(value: float, spread: tuple[float, float]) -> Outcome:
    if not math.isfinite(spread[0]):
        return "no spread"
    return "inside" if spread[0] <= value <= spread[1] else "outside"
