"""Cells, an arm with a seed, as queued trials: which there are, in which order, and when each may begin.

A trial says which cell it is in its user attribute `cell`, a JSON mapping; Optuna itself chooses nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from dense_lab.ablation import tuning
from dense_lab.search import ledger as book

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from dense_lab.ablation.arms import Ablation
    from dense_lab.search.ledger import Ledger

Role = Literal["cell", "tune"]
Key = tuple[str, str, int, frozenset[tuple[str, float]]]
"""What makes two trials the same cell: role, arm, seed and, of tuning trials, the point of the grid."""


@dataclass(frozen=True)
class Cell:
    """A trial of an ablation, to be run."""

    role: Role
    """`tune` for a trial that a learning rate is chosen by."""
    arm: str
    seed: int
    point: dict[str, float] = field(default_factory=dict)
    """Of the tuning grid, by dotted path."""

    @property
    def key(self) -> Key:
        """See `Key`."""
        return self.role, self.arm, self.seed, frozenset(self.point.items())

    def as_json(self) -> dict[str, Any]:
        """As a trial's user attribute."""
        return {"role": self.role, "arm": self.arm, "seed": self.seed, "values": self.point}


def key_of(said: Mapping[str, Any]) -> Key:
    """The key of a trial's user attribute."""
    point = said.get("values", {}) if said["role"] == "tune" else {}
    return said["role"], said["arm"], said["seed"], frozenset(point.items())


def params_of(said: Mapping[str, Any]) -> dict[str, Any]:
    """What a trial is shown by: arm, seed and, of tuning trials, the point of the grid."""
    point = said.get("values", {}) if said["role"] == "tune" else {}
    return {"arm": said["arm"], "seed": said["seed"], **point}


def tags_of(said: Mapping[str, Any]) -> dict[str, str]:
    """What trials are filtered by."""
    tags = {"arm": said["arm"], "seed": str(said["seed"]), "role": said["role"]}
    tuned = said.get("tuned", {})
    if tuned:
        tags["tune.trial"] = str(tuned["trial"])
    if tuned.get("edge"):
        tags["tune.edge"] = ",".join(tuned["edge"])
    return tags


@dataclass(frozen=True)
class CellPlan:
    """How an ablation goes on; the same in every process."""

    cells: tuple[Cell, ...]
    """In the order in which they are started: tuning first, then every arm of one seed before the next seed."""

    @property
    def total(self) -> int:
        """Trials in all."""
        return len(self.cells)

    def may_start(self, ledger: Ledger) -> bool:
        """Whether a trial is left to be started now, having queued the next cell if none was waiting.

        A cell of an arm that is still being tuned has to wait. Called with the folder's lock held.
        """
        trials = ledger.trials()
        if any(book.standing(trial) == "waiting" for trial in trials):
            return True
        known = {key_of(said) for trial in book.latest(trials).values() if (said := book.cell(trial))}
        tuned = self._tuned(trials)
        for cell in self.cells:
            choice = tuned.get(cell.arm, {}) if cell.role == "cell" else {}
            if cell.key not in known and choice is not None:
                ledger.enqueue_cell({**cell.as_json(), **choice})
                return True
        return False

    def _tuned(self, trials: list[FrozenTrial]) -> dict[str, dict[str, Any] | None]:
        """What the cells of each tuned arm are to use; None while its tuning goes on."""
        ended = {
            key_of(said): (number, trial)
            for number, trial in book.latest(trials).items()
            if (said := book.cell(trial)) and book.standing(trial) == "finished"
        }
        found: dict[str, dict[str, Any] | None] = {}
        for arm, grid in self.tuning().items():
            over = all(cell.key in ended for cell in grid)
            found[arm] = tuning.choose([(cell.point, *ended[cell.key]) for cell in grid]) if over else None
        return found

    def tuning(self) -> dict[str, list[Cell]]:
        """The tuning trials of each arm, in the order of the grid."""
        found: dict[str, list[Cell]] = {}
        for cell in self.cells:
            if cell.role == "tune":
                found.setdefault(cell.arm, []).append(cell)
        return found

    def choices(self, ledger: Ledger) -> dict[str, dict[str, Any]]:
        """What has been chosen for each arm so far, or why nothing was, for the manifest."""
        return {arm: choice.get("tuned", choice) for arm, choice in self._tuned(ledger.trials()).items() if choice}


def plan(ablation: Ablation, extra: Iterable[tuple[str, int]] = ()) -> CellPlan:
    """The plan of an ablation; `extra` are cells (arm, seed) beyond its seeds, left out where there is no such arm."""
    grid = ablation.tune.grid() if ablation.tune else []
    first = [Cell("tune", arm.name, ablation.tune.seed, p) for arm in ablation.arms for p in grid if ablation.tune]
    cells = [Cell("cell", arm.name, seed) for seed in ablation.spec.seeds for arm in ablation.arms]
    known = {(cell.arm, cell.seed) for cell in cells}
    more = [Cell("cell", arm, n) for arm, n in extra if arm in ablation.by_name and (arm, n) not in known]
    return CellPlan((*first, *cells, *more))
