"""Every arm against the baseline, by seeds that both ran: differences, intervals, p values and a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from dense_lab.errors import InputError, did_you_mean
from dense_lab.statistics.corrections import Correction, Floats, adjust, critical
from dense_lab.statistics.paired import Tested, bca_interval, blocks_test, deviation, differences, t_interval, t_test
from dense_lab.statistics.power import check_levels, detectable

Direction = Literal["minimize", "maximize"]
Verdict = Literal["baseline", "better", "worse", "no difference shown", "underpowered"]
Values = Mapping[str, Mapping[int, float]]
"""Of a metric, by arm and seed."""
NAN = float("nan")
NOWHERE = (NAN, NAN)
FEWEST = 3
"""Pairs below which finding nothing says nothing."""


@dataclass(frozen=True)
class ArmVerdict:
    """One arm against the baseline. Differences are arm - baseline, in the metric's unit."""

    arm: str
    seeds: int
    """Pairs that were compared; of the baseline its own seeds."""
    mean: float
    mean_interval: tuple[float, float]
    """t interval of the arm's own mean, over all its seeds, for this arm alone."""
    difference: float
    t_interval: tuple[float, float]
    """Of the difference; all arms' intervals cover together: exactly under Dunnett, Bonferroni's under Holm."""
    bca_interval: tuple[float, float]
    """The same by bootstrap, at Bonferroni's level under Holm and Dunnett; a check on skew, not part of the verdict."""
    effect_size: float
    """Cohen's d_z: the mean of the paired differences over their standard deviation."""
    p: float
    p_adjusted: float
    verdict: Verdict
    detectable: float
    """The smallest true difference that these seeds show with the stated power, given the scatter that was seen."""


@dataclass(frozen=True)
class Comparison:
    """All arms against one baseline on one metric; the baseline is among the arms."""

    baseline: str
    metric: str
    direction: Direction
    alpha: float
    """Chance of any wrong "better" or "worse" over all arms; with correction none, for each arm."""
    correction: Correction
    arms: tuple[ArmVerdict, ...]

    def __getitem__(self, arm: str) -> ArmVerdict:
        return next(found for found in self.arms if found.arm == arm)

    def as_json(self) -> dict[str, Any]:
        """For JSON, which knows neither nan nor infinity: both become None."""
        cleaned: dict[str, Any] = without_nan(asdict(self))
        return cleaned


def compare(
    values: Values,
    baseline: str,
    *,
    metric: str,
    direction: Direction = "minimize",
    alpha: float = 0.05,
    correction: Correction = "holm",
    smallest_effect: float | None = None,
    power: float = 0.8,
) -> Comparison:
    """Compare every arm with `baseline` by paired differences; see docs/STATISTICS.md.

    values: metric by arm and seed; a value that is not finite counts as missing. Holm and none use, for each arm, the
    seeds that it shares with the baseline; Dunnett uses the seeds that all tested arms share.
    smallest_effect: the smallest difference worth claiming, in the metric's unit, without sign.
    Raises InputError for a baseline without an arm of its name, or levels outside (0, 1).
    """
    check_levels(alpha, power)
    known = {arm: finite(cells) for arm, cells in values.items()}
    pairs = paired(known, baseline)
    tested = [arm for arm, found in pairs.items() if len(found.differences) >= 2]
    asked = _Asked(direction, alpha, correction, smallest_effect, power, max(len(tested), 1))
    tests = _blocks(known, baseline, tested) if correction == "dunnett" else {a: pairs[a].test() for a in tested}
    tests = {arm: test.as_fact() if pairs[arm].certain else test for arm, test in tests.items()}
    adjusted = _adjusted(tests, correction)
    rows = []
    for arm, cells in known.items():
        if arm == baseline:
            rows.append(baseline_row(arm, cells, alpha))
        elif arm in tests:
            rows.append(_row(arm, cells, pairs[arm], tests[arm], adjusted[arm], asked))
        else:
            rows.append(untested_row(arm, cells, pairs[arm].differences, alpha))
    return Comparison(baseline, metric, direction, alpha, correction, tuple(rows))


class Pairs(NamedTuple):
    """One arm beside the baseline, over the seeds that both have, in rising order."""

    differences: Floats
    """arm - baseline."""
    certain: bool
    """Whether no seed changes the metric, in the arm or the baseline: what differs then differs for sure."""

    def test(self) -> Tested:
        """Student's t test of the differences."""
        found = t_test(self.differences)
        return found.as_fact() if self.certain else found


def paired(values: Values, baseline: str) -> dict[str, Pairs]:
    """Every arm but the baseline, beside it; raises InputError when there is no arm of the baseline's name."""
    if baseline not in values:
        raise InputError(f"no arm named {baseline!r} to compare with.{did_you_mean(baseline, values)}")
    own = values[baseline]
    result = {}
    for arm, cells in values.items():
        shared = sorted(cells.keys() & own.keys())
        ours, theirs = (np.array([side[seed] for seed in shared], dtype=np.float64) for side in (cells, own))
        steady = len(shared) >= FEWEST and bool(deviation(ours) == 0 and deviation(theirs) == 0)
        result[arm] = Pairs(differences(ours, theirs), steady)
    result.pop(baseline)
    return result


@dataclass(frozen=True)
class _Asked:
    direction: Direction
    alpha: float
    correction: Correction
    smallest_effect: float | None
    power: float
    comparisons: int

    @property
    def level(self) -> float:
        """Of a bootstrap interval, which has no Dunnett form."""
        return 1 - (self.alpha if self.correction == "none" else self.alpha / self.comparisons)


def _blocks(values: Values, baseline: str, tested: list[str]) -> dict[str, Tested]:
    shared = sorted(set(values[baseline]).intersection(*(values[arm] for arm in tested)))
    if len(shared) < 2 or not tested:
        return {}
    block = np.array([[values[arm][seed] for seed in shared] for arm in tested], dtype=np.float64)
    test = blocks_test(block, np.array([values[baseline][seed] for seed in shared], dtype=np.float64))
    return {arm: Tested(test.mean[i], test.error[i], test.df, test.t[i], test.p[i]) for i, arm in enumerate(tested)}


def _adjusted(tests: dict[str, Tested], correction: Correction) -> dict[str, float]:
    if not tests:
        return {}
    p, t = (np.array([float(getattr(test, name)) for test in tests.values()]) for name in ("p", "t"))
    df = next(iter(tests.values())).df
    return dict(zip(tests, adjust(p, t, df, correction).tolist(), strict=True))


def _row(
    arm: str, cells: Mapping[int, float], pairs: Pairs, test: Tested, adjusted: float, asked: _Asked
) -> ArmVerdict:
    pooled = asked.correction == "dunnett"
    seeds = test.df // asked.comparisons + 1 if pooled else len(pairs.differences)
    mean, error = float(test.mean), float(test.error)
    threshold = critical(test.df, asked.alpha, asked.comparisons, asked.correction)
    smallest = detectable(
        error * math.sqrt(seeds),
        seeds,
        alpha=asked.alpha,
        power=asked.power,
        comparisons=asked.comparisons,
        correction=asked.correction,
    )
    judged = Judged(float(test.p), adjusted, _verdict(mean, adjusted, seeds, smallest, asked), smallest)
    return judged.row(arm, cells, pairs.differences, seeds, test, threshold, asked.level, asked.alpha)


class Judged(NamedTuple):
    """What was decided of an arm, in whichever way it was tested: with fixed seeds, or at a look."""

    p: float
    p_adjusted: float
    verdict: Verdict
    detectable: float

    def row(
        self,
        arm: str,
        cells: Mapping[int, float],
        sample: Floats,
        seeds: int,
        test: Tested,
        threshold: float,
        level: float,
        alpha: float,
    ) -> ArmVerdict:
        """The arm's row; its t interval reaches `threshold` standard errors, its bootstrap interval covers `level`."""
        mean, error = float(test.mean), float(test.error)
        return ArmVerdict(
            arm=arm,
            seeds=seeds,
            mean=own_mean(cells),
            mean_interval=own_interval(cells, alpha),
            difference=mean,
            t_interval=t_interval(mean, error, threshold),
            bca_interval=bca_interval(sample, level) if error else (mean, mean),
            effect_size=effect_size(sample) if math.isfinite(error) else NAN,
            **self._asdict(),
        )


def _verdict(mean: float, adjusted: float, seeds: int, smallest: float, asked: _Asked) -> Verdict:
    # Two pairs can look alike by chance, and nothing tells how far from normal they are.
    if adjusted <= asked.alpha and seeds >= FEWEST:
        return improvement(mean, asked.direction)
    enough = seeds >= FEWEST if asked.smallest_effect is None else smallest <= asked.smallest_effect
    return "no difference shown" if enough and math.isfinite(smallest) else "underpowered"


def improvement(difference: float, direction: Direction) -> Literal["better", "worse"]:
    """Which of the two a difference that was shown means."""
    return "better" if (difference < 0) == (direction == "minimize") else "worse"


def effect_size(sample: Floats) -> float:
    """Cohen's d_z of paired differences; signed infinity where nothing scatters, 0 where nothing differs either."""
    mean, sd = float(sample.mean()), float(deviation(sample))
    if sd == 0:
        return math.copysign(math.inf, mean) if mean else 0.0
    return mean / sd


def baseline_row(arm: str, cells: Mapping[int, float], alpha: float) -> ArmVerdict:
    """The baseline beside itself."""
    interval = own_interval(cells, alpha)
    return ArmVerdict(
        arm, len(cells), own_mean(cells), interval, 0.0, (0.0, 0.0), (0.0, 0.0), 0.0, 1.0, 1.0, "baseline", NAN
    )


def untested_row(arm: str, cells: Mapping[int, float], sample: Floats, alpha: float) -> ArmVerdict:
    """An arm with too few pairs to test."""
    difference = float(sample.mean()) if len(sample) else NAN
    return ArmVerdict(
        arm, len(sample), own_mean(cells), own_interval(cells, alpha), difference, NOWHERE, NOWHERE, NAN, NAN, NAN,
        "underpowered", NAN,
    )  # fmt: skip


def finite(cells: Mapping[int, float]) -> dict[int, float]:
    """Without what is missing."""
    return {seed: float(value) for seed, value in cells.items() if value is not None and math.isfinite(value)}


def own_mean(cells: Mapping[int, float]) -> float:
    """Over all seeds of the arm."""
    return float(np.mean(list(cells.values()))) if cells else NAN


def own_interval(cells: Mapping[int, float], alpha: float) -> tuple[float, float]:
    """t interval of the arm's own mean."""
    if len(cells) < 2:
        return NOWHERE
    sample = np.array(list(cells.values()), dtype=np.float64)
    error = float(deviation(sample)) / math.sqrt(len(sample))
    return t_interval(float(sample.mean()), error, critical(len(sample) - 1, alpha, 1, "none"))


def without_nan(value: Any) -> Any:
    """`value`, which JSON can hold once numbers that are none are null, however deep they stand."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
