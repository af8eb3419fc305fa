"""What an ablation has found so far: its arms and their cells, read from a study's folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from dense_lab.results import StudyResults


@dataclass(frozen=True)
class Analysis:
    """How arms are compared, defaults decided."""

    metric: str = "test/loss"
    direction: Literal["minimize", "maximize"] = "minimize"
    alpha: float = 0.05
    correction: Literal["holm", "dunnett", "none"] = "holm"
    smallest_effect: float | None = None
    """In units of the metric."""
    power: float = 0.8


@dataclass(frozen=True)
class Ablation:
    """What a study compares, as stored."""

    baseline: str
    """Name of the arm that the others are compared with."""
    arms: dict[str, dict[str, Any]]
    """What each arm changes, by its name and dotted path."""
    seeds: tuple[int, ...]
    """Of every arm; some may have more, see `looks`."""
    analysis: Analysis
    tune: dict[str, Any] | None
    """The tuning grid that every arm was given: `lr`, `weight_decay`, `tokens`, `seed`."""
    looks: tuple[int, int] | None = None
    """Where seeds were added until arms were decided: pairs at the first look, and at most."""


def read_ablation(study: Mapping[str, Any], manifest: Mapping[str, Any]) -> Ablation | None:
    """The ablation that study.json describes, or None for a search."""
    said = study.get("x-ablation")
    if not said:
        return None
    looks = manifest.get("looks")
    return Ablation(
        baseline=said["baseline"],
        arms=said["arms"],
        seeds=tuple(said["seeds"]),
        analysis=Analysis(**said["analysis"]),
        tune=said["tune"],
        looks=tuple(looks) if looks else None,
    )


def cells(results: StudyResults, metric: str) -> dict[str, dict[int, float]]:
    """Values of `metric` by arm and seed, of complete cells; every arm is there, in the order of the study."""
    found: dict[str, dict[int, float]] = {arm: {} for arm in results.ablation.arms} if results.ablation else {}
    for trial in results.having("complete"):
        if trial.role == "cell" and trial.label in found and metric in trial.metrics:
            found[trial.label][trial.params["seed"]] = trial.metrics[metric]
    return {arm: dict(sorted(values.items())) for arm, values in found.items()}
