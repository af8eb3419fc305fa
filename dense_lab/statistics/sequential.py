"""When to stop adding seeds."""

from __future__ import annotations

from dense_lab.statistics.comparison import Comparison, Direction, Values, compare
from dense_lab.statistics.corrections import Correction


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
    """Arms that need another seed, given what is there; empty when all are decided or have `maximum` pairs."""
    look = compare_at_look(
        values, baseline, first=first, maximum=maximum, alpha=alpha, correction=correction, direction=direction,
        smallest_effect=smallest_effect, power=power,
    )  # fmt: skip
    waiting = {"underpowered", "no difference shown"} if smallest_effect is None else {"underpowered"}
    return [arm.arm for arm in look.arms if arm.seeds < maximum and arm.verdict in waiting]


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
    """The comparison that keeps alpha although the study was looked at after every seed from `first` to `maximum`."""
    return compare(
        values, baseline, metric=metric, direction=direction, alpha=alpha / (maximum - first + 1), correction=correction,
        smallest_effect=smallest_effect, power=power,
    )  # fmt: skip
