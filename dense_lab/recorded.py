"""What the cells of an ablation have recorded, as the fairness certificate looks at it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from dense_lab.ablation.results import Ablation
from dense_lab.budget_spec import LOOSE
from dense_lab.results import StudyResults, TrialView

TOLERANCE = 0.05
"""Largest relative difference of what is matched, where no budget says another."""
Quantity = Literal["params", "flops_per_token", "state_bytes"]
SIZES: dict[Quantity, tuple[str, str]] = {
    "params": ("parameters", "parameters"),
    "flops_per_token": ("FLOPs", "FLOPs per token"),
    "state_bytes": ("state", "bytes of state"),
}
"""What a budget can be about: the clause's name, and how the amount is called."""


class Budget(NamedTuple):
    """What the sizes of the arms are held against."""

    about: Quantity
    amount: float | None
    """None: that of the baseline."""
    tolerance: float
    counted: str
    """Which parameters: `non_embedding` or `all`."""
    flops_tolerance: float = LOOSE
    """Of FLOPs where something else is matched."""


@dataclass(frozen=True)
class Record:
    """What the cells of an ablation have recorded."""

    results: StudyResults
    ablation: Ablation

    @cached_property
    def cells(self) -> dict[str, dict[int, TrialView]]:
        """Complete cells by arm and seed; every arm is there."""
        found: dict[str, dict[int, TrialView]] = {arm: {} for arm in self.ablation.arms}
        for trial in self.results.having("complete"):
            if trial.role == "cell" and trial.label in found:
                found[trial.label][int(trial.params["seed"])] = trial
        return found

    @property
    def all(self) -> list[TrialView]:
        """Every complete cell."""
        return [trial for cells in self.cells.values() for trial in cells.values()]

    @property
    def one(self) -> dict[str, TrialView]:
        """A complete cell of each arm that has one: what no seed changes can be read from it."""
        return {arm: next(iter(cells.values())) for arm, cells in self.cells.items() if cells}

    def tuning(self, arm: str) -> list[TrialView]:
        """Finished tuning trials of an arm."""
        return [t for t in self.results.having("complete", "failed") if t.role == "tune" and t.label == arm]

    @property
    def budget(self) -> Budget:
        """The baseline's, as the manifest has it: arms with budgets of their own are held against it too."""
        manifest = self.results.manifest
        said = {**manifest.get("fixed", {}), **manifest.get("arms", {}).get(self.ablation.baseline, {})}
        for about in SIZES:
            if said.get(f"budget.{about}") is not None:
                tolerance = float(said.get("budget.tolerance", TOLERANCE))
                loose = float(said.get("budget.flops_tolerance", LOOSE))
                amount, count = float(said[f"budget.{about}"]), said.get("budget.count", "non_embedding")
                return Budget(about, amount, tolerance, count, loose)
        return Budget("params", None, TOLERANCE, "non_embedding")
