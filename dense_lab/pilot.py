"""What the cells that an ablation has so far say about the seeds that it needs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dense_lab.ablation.results import Ablation, cells
from dense_lab.errors import InputError
from dense_lab.results import StudyResults
from dense_lab.statistics import detectable, seeds_needed, upper_deviation
from dense_lab.statistics.comparison import FEWEST, Pairs, finite, paired, without_nan
from dense_lab.statistics.paired import deviation

CONFIDENCE = 0.8
"""Of the upper limit of a pilot's scatter (Browne 1995)."""


@dataclass(frozen=True)
class Needed:
    """Seeds by one estimate of the scatter of paired differences to the baseline."""

    sd: float
    """Their standard deviation, in the metric's unit."""
    sd_upper: float
    """Its upper confidence limit: a pilot of few seeds knows it badly."""
    seeds: int
    """Of every arm, to show the effect with the power asked for if `sd` is right."""
    seeds_upper: int
    """The same for `sd_upper`."""


@dataclass(frozen=True)
class ArmPilot:
    """One arm in the pilot."""

    arm: str
    pairs: int
    needed: Needed | None
    """None with fewer than two pairs."""
    detectable: float
    """Smallest difference that its pairs show with the power asked for."""


@dataclass(frozen=True)
class Cost:
    """What is missing until every arm has so many seeds."""

    trials: int
    hours: float
    """Of one worker, by the seconds that cells of the same arm took; nan where none was timed."""


@dataclass(frozen=True)
class PowerPlan:
    """How many seeds an effect needs, and what they cost."""

    metric: str
    baseline: str
    effect: float
    power: float
    alpha: float
    correction: str
    comparisons: int
    arms: tuple[ArmPilot, ...]
    needed: Needed
    """By the scatter of all arms together."""
    cost: Cost
    """Of `needed.seeds`."""
    cost_upper: Cost
    """Of `needed.seeds_upper`."""

    def as_json(self) -> dict[str, Any]:
        """For JSON."""
        told: dict[str, Any] = without_nan(asdict(self))
        return told


def plan(results: StudyResults, effect: float | None = None, power: float | None = None) -> PowerPlan:
    """The seeds that a study's arms need to show `effect`, by default its own smallest effect, in its metric's unit.

    Raises InputError for a study without arms, without an effect, or without two complete seeds of the baseline and
    another arm.
    """
    ablation = _ablation(results)
    analysis = ablation.analysis
    effect, power = effect or analysis.smallest_effect, power or analysis.power
    if effect is None:
        raise InputError("no effect to plan for: say --effect 0.01, or give the study analysis.smallest_effect")
    known = {arm: finite(values) for arm, values in cells(results, analysis.metric).items()}
    pairs = paired(known, ablation.baseline)
    comparisons = max(len(pairs), 1)
    asked = {
        "alpha": analysis.alpha,
        "power": power,
        "comparisons": comparisons,
        "correction": analysis.correction,
    }
    sd, df = together(pairs)
    if not df:
        raise InputError(
            f"{results.name}: two complete seeds of {ablation.baseline!r} and of another arm are needed to see how "
            f"{analysis.metric} scatters: run it with `seeds: {FEWEST}` first"
        )
    needed = _needed(sd, df, effect, asked)
    return PowerPlan(
        metric=analysis.metric,
        baseline=ablation.baseline,
        effect=effect,
        arms=tuple(_arm(arm, found.differences, effect, asked) for arm, found in pairs.items()),
        needed=needed,
        cost=_cost(results, ablation, needed.seeds),
        cost_upper=_cost(results, ablation, needed.seeds_upper),
        power=power,
        alpha=analysis.alpha,
        correction=analysis.correction,
        comparisons=comparisons,
    )


def _ablation(results: StudyResults) -> Ablation:
    if results.ablation is None:
        raise InputError(f"{results.name} has no arms: power is planned for ablations, studies with `arms` and `seeds`")
    return results.ablation


def together(pairs: dict[str, Pairs]) -> tuple[float, float]:
    """Root mean variance of the arms' differences, and its degrees of freedom.

    Differences share the baseline and correlate by 1/2 where arms scatter alike, their variances by 1/4: k arms are
    worth k / (1 + (k - 1) / 4) independent ones.
    """
    samples = [found.differences for found in pairs.values() if len(found.differences) >= 2]
    if not samples:
        return math.nan, 0.0
    each = np.array([len(sample) - 1 for sample in samples])
    variances = np.array([float(deviation(sample)) ** 2 for sample in samples])
    return math.sqrt(float(np.average(variances, weights=each))), float(each.sum() / (1 + (len(each) - 1) / 4))


def _needed(sd: float, df: float, effect: float, asked: dict[str, Any]) -> Needed:
    upper = upper_deviation(sd, df, CONFIDENCE)
    # Fewer seeds than these give no verdict.
    seeds, seeds_upper = (max(FEWEST, seeds_needed(size, effect, **asked)) for size in (sd, upper))
    return Needed(sd, upper, seeds, seeds_upper)


def _arm(arm: str, sample: Any, effect: float, asked: dict[str, Any]) -> ArmPilot:
    if len(sample) < 2:
        return ArmPilot(arm, len(sample), None, math.nan)
    sd = float(deviation(sample))
    return ArmPilot(arm, len(sample), _needed(sd, len(sample) - 1, effect, asked), detectable(sd, len(sample), **asked))


def _cost(results: StudyResults, ablation: Ablation, seeds: int) -> Cost:
    trials, seconds = 0, 0.0
    timed = [t.seconds for t in results.having("complete") if t.role == "cell" and t.seconds is not None]
    usual = float(np.mean(timed)) if timed else math.nan
    for arm in ablation.arms:
        mine = [t for t in results.having("complete") if t.role == "cell" and t.label == arm]
        missing = max(0, seeds - len(mine))
        own = [t.seconds for t in mine if t.seconds is not None]
        trials += missing
        seconds += missing * (float(np.mean(own)) if own else usual) if missing else 0.0
    return Cost(trials, seconds / 3600)
