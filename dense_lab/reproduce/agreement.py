"""Whether new numbers fall where the recorded ones say that new runs fall.

Of n recorded values with mean m and standard deviation s, the mean of k new runs lies within
m -/+ t(n - 1) s sqrt(1/n + 1/k) with the stated probability, if all come from one normal distribution (Hahn and Meeker
1991, chapter 4). Of three seeds that says little: at 99 % within 8 s. But new runs have the recorded seeds, and so the
same batches and initial weights: new minus recorded, seed by seed, is what rounding and order of sums have made, which
is as often above zero as below. Its mean lies within t(k - 1) s_d / sqrt(k) of zero, s_d the standard deviation of the
differences, and more than NEGLIGIBLE s beyond that is a shift. All intervals of a reproduction together hold with the
stated probability (Bonferroni; one half for each kind). And runs that nothing has changed for are the same to the last
bit on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev, variance
from typing import Literal, NamedTuple

from dense_lab.results import TrialView

Outcome = Literal["exact", "inside", "outside", "not exact", "no spread", "failed"]
Expected = Literal["bits", "spread"]
"""Of new runs: the very same numbers; or numbers within the spread of the recorded ones."""
EVERY_ARM = "(every arm)"
NEGLIGIBLE = 0.1
"""Part of the spread between seeds that a mean may move by: it moves the t statistic of n seeds by n ** 0.5 / 10 at
most, so that no verdict hangs on it."""
CLOCKS = ("seconds", "tokens_per_second", "step_seconds", "peak_memory_bytes")
"""Metrics that no two runs share."""
HOLDS: tuple[Outcome, ...] = ("exact", "inside")


@dataclass(frozen=True)
class Agreement:
    """One number, recorded and new."""

    kind: Literal["trial", "arm", "difference", "paired"]
    """Of one run; an arm's mean over seeds; that minus the baseline's, paired by seed; an arm's mean again, expected
    by how far the new runs are from the recorded ones of the same seeds."""
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
    spread: float
    """Standard deviation between the recorded seeds of the arm; not a number for fewer than two."""

    @property
    def deviation(self) -> float:
        """New minus recorded; not a number when there is no new one."""
        return math.nan if self.new is None else self.new - self.recorded

    @property
    def share(self) -> float:
        """The deviation's size, by the spread; not a number when one of them is none."""
        return abs(self.deviation) / self.spread if self.spread else math.nan

    @property
    def reach(self) -> float:
        """How far to each side it is expected, by the spread; not a number when one of them is none."""
        return (self.interval[1] - self.interval[0]) / 2 / self.spread if self.spread else math.nan

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


class Spread(NamedTuple):
    """Standard deviation between seeds, over several arms."""

    size: float
    df: int

    @classmethod
    def of(cls, arms: Iterable[Sequence[float]]) -> Spread:
        """Of the values of each arm; not a number when no arm has two."""
        several = [values for values in arms if len(values) > 1]
        df = sum(len(values) - 1 for values in several)
        squares = sum((len(values) - 1) * variance(values) for values in several)
        return cls(math.sqrt(squares / df) if df else math.nan, df)


def pairwise(
    recorded: Sequence[float], new: Sequence[float], own: Spread, every: Spread, alpha: float
) -> tuple[float, float]:
    """Interval at level 1 - alpha of the mean of new runs with the seeds of the recorded ones, if what differs is
    rounding, see above; not numbers for fewer than two runs.

    own: between the recorded seeds of these arms; every: of all arms.
    """
    k = len(new)
    if k < 2:
        return math.nan, math.nan
    from scipy.stats import t

    differences = [after - before for before, after in zip(recorded, new, strict=True)]
    level = 1 - alpha / 4  # Two-sided, for each of two limits.
    seen = float(t.ppf(level, k - 1)) * stdev(differences) / math.sqrt(k) + NEGLIGIBLE * own.size
    most = float(t.ppf(level, every.df)) * every.size * math.sqrt(2 / k)
    return fmean(recorded) - min(seen, most), fmean(recorded) + min(seen, most)


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
    expected: Expected = "spread"

    def agreements(self) -> list[Agreement]:
        """Of every run, every arm with several in both ways, all arms together, every difference to the baseline."""
        pairs = [(arm, seed) for arm, cells in self.chosen.items() for seed in cells]
        several = [arm for arm, cells in self.chosen.items() if len(cells) > 1]
        rivals = [arm for arm in self.chosen if arm != self.baseline]
        families = [[arm] for arm in several] + ([several] if len(several) > 1 else [])
        alpha = (self.alpha / 2 if families else self.alpha) / (len(pairs) + len(several) + len(rivals))
        found = [self._trial(arm, seed, alpha) for arm, seed in pairs]
        found += [self._mean("arm", arm, alpha) for arm in several]
        found += [self._paired(arms, self.alpha / 2 / len(families)) for arms in families]
        return found + [self._mean("difference", arm, alpha) for arm in rivals]

    def _trial(self, arm: str, seed: int, alpha: float) -> Agreement:
        old, new = self.chosen[arm][seed], self.new.get(arm, {}).get(seed)
        spread = expected([cell.metrics[self.metric] for cell in self.known[arm].values()], 1, alpha)
        before, scatter = old.metrics[self.metric], self._spread([arm])
        if new is None:
            return Agreement("trial", arm, seed, before, None, spread, "failed", scatter.size)
        after = new.metrics[self.metric]
        outcome: Outcome = "exact" if exact(old, new) else _outcome(after, spread)
        if outcome != "exact" and self.expected == "bits":
            outcome = "not exact"
        return Agreement("trial", arm, seed, before, after, spread, outcome, scatter.size)

    def _paired(self, arms: Sequence[str], alpha: float) -> Agreement:
        named = arms[0] if len(arms) == 1 else EVERY_ARM
        pairs = [(old, self.new.get(arm, {}).get(seed)) for arm in arms for seed, old in self.chosen[arm].items()]
        there = [(old, new) for old, new in pairs if new is not None]
        before, scatter = fmean(old.metrics[self.metric] for old, _ in pairs), self._spread(arms)
        if len(there) < len(pairs):
            return Agreement("paired", named, None, before, None, (math.nan, math.nan), "failed", scatter.size)
        old_values = [old.metrics[self.metric] for old, _ in there]
        values = [new.metrics[self.metric] for _, new in there]
        interval = pairwise(old_values, values, scatter, self._spread(self.known), alpha)
        after = fmean(values)
        outcome = "exact" if all(exact(old, new) for old, new in there) else _outcome(after, interval)
        return Agreement("paired", named, None, before, after, interval, outcome, scatter.size)

    def _spread(self, arms: Iterable[str]) -> Spread:
        return Spread.of([cell.metrics[self.metric] for cell in self.known[arm].values()] for arm in arms)

    def _mean(self, kind: Literal["arm", "difference"], arm: str, alpha: float) -> Agreement:
        values = self._values if kind == "arm" else self._differences
        old, all_old, new = values(self.chosen, arm), values(self.known, arm), values(self.new, arm)
        spread = expected(list(all_old.values()), len(old), alpha)
        before, scatter = fmean(old.values()), self._spread([arm])
        if new.keys() != old.keys():
            return Agreement(kind, arm, None, before, None, spread, "failed", scatter.size)
        after = fmean(new.values())
        sides = (arm,) if kind == "arm" else (arm, self.baseline)
        same = all(exact(self.chosen[side][seed], self.new[side][seed]) for side in sides for seed in old)
        return Agreement(
            kind, arm, None, before, after, spread, "exact" if same else _outcome(after, spread), scatter.size
        )

    def _values(self, cells: Cells, arm: str) -> dict[int, float]:
        return {seed: cell.metrics[self.metric] for seed, cell in cells.get(arm, {}).items()}

    def _differences(self, cells: Cells, arm: str) -> dict[int, float]:
        mine, theirs = self._values(cells, arm), self._values(cells, self.baseline)
        return {seed: mine[seed] - theirs[seed] for seed in mine if seed in theirs}


def _outcome(value: float, spread: tuple[float, float]) -> Outcome:
    if not math.isfinite(spread[0]):
        return "no spread"
    return "inside" if spread[0] <= value <= spread[1] else "outside"
