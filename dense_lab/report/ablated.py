"""An ablation as its report sees it: cells by arm and seed, the comparison, what there is to be said of single arms."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from dense_lab.results import StudyResults, TrialView

if TYPE_CHECKING:
    from dense_lab.ablation.results import Ablation
    from dense_lab.certificate import Certificate
    from dense_lab.statistics import ArmVerdict, Comparison

OVERHEAD = "overhead.json"
"""In the study's folder: what dense connections cost against the same model without them."""


@dataclass(frozen=True)
class Arm:
    """One architecture and its trained cells."""

    number: int
    """Its place in the study, the baseline's included, from 1; what plots call it."""
    name: str
    cells: dict[int, TrialView]
    """Complete cells by seed."""
    verdict: ArmVerdict | None
    """None when no cell is complete that has the metric."""

    def mean(self, metric: str) -> float | None:
        """Over the seeds; None when it was not measured."""
        values = [cell.metrics[metric] for cell in self.cells.values() if metric in cell.metrics]
        return fmean(values) if values else None


@dataclass(frozen=True)
class Ablated:
    """An ablation and what came of it."""

    results: StudyResults
    ablation: Ablation
    comparison: Comparison | None
    """None while the baseline has no complete cell."""
    arms: tuple[Arm, ...]
    """The baseline first, the others as the study has them."""
    certificate: Certificate | None
    overhead: list[dict[str, Any]]

    @property
    def metric(self) -> str:
        """What the arms are compared by."""
        return self.ablation.analysis.metric

    @property
    def maximize(self) -> bool:
        """Whether more of the metric is better."""
        return self.ablation.analysis.direction == "maximize"

    @property
    def baseline(self) -> Arm:
        """The arm that the others are compared with."""
        return self.arms[0]

    @property
    def judged(self) -> list[tuple[Arm, ArmVerdict]]:
        """Arms that have a verdict, the baseline included."""
        return [(arm, arm.verdict) for arm in self.arms if arm.verdict is not None]

    def planned(self, arm: Arm) -> int:
        """Cells that the arm is to have, seeds added to decide it included."""
        added: list[tuple[str, int]] = self.results.manifest.get("added", [])
        return len(self.ablation.seeds) + sum(name == arm.name for name, _ in added)

    def values(self, arm: Arm) -> dict[int, float]:
        """The metric by seed."""
        return {seed: cell.metrics[self.metric] for seed, cell in arm.cells.items() if self.metric in cell.metrics}

    def differences(self, arm: Arm) -> dict[int, float]:
        """The metric minus the baseline's, by seeds that both have."""
        mine, theirs = self.values(arm), self.values(self.baseline)
        return {seed: mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())}

    def best(self) -> Arm | None:
        """The arm with the best mean, if that is significant: better than the baseline, or, should it be the
        baseline, if every other arm is worse."""
        sign = -1 if self.maximize else 1
        judged = [(arm, verdict) for arm, verdict in self.judged if math.isfinite(verdict.mean)]
        if len(judged) < 2:
            return None
        arm, verdict = min(judged, key=lambda pair: sign * pair[1].mean)
        if verdict.verdict == "better":
            return arm
        rest = {other.verdict for one, other in judged if one is not arm}
        return arm if verdict.verdict == "baseline" and rest == {"worse"} else None

    def failed(self, arm: str) -> dict[int, TrialView]:
        """Cells of an arm that ended without a result, by seed."""
        return {int(t.params["seed"]): t for t in self.results.having("failed", "pruned") if _is_cell(t, arm)}


def _is_cell(trial: TrialView, arm: str) -> bool:
    return trial.role == "cell" and trial.label == arm


def gather(results: StudyResults) -> Ablated | None:
    """What the report needs of an ablation; None for a search."""
    ablation = results.ablation
    if ablation is None:
        return None
    from dense_lab.certificate import certificate

    names = [ablation.baseline, *(name for name in ablation.arms if name != ablation.baseline)]
    cells = {
        name: {int(t.params["seed"]): t for t in results.having("complete") if _is_cell(t, name)} for name in names
    }
    comparison = _compared(ablation, cells)
    verdicts = {verdict.arm: verdict for verdict in comparison.arms} if comparison else {}
    arms = tuple(Arm(i, name, cells[name], verdicts.get(name)) for i, name in enumerate(names, 1))
    return Ablated(results, ablation, comparison, arms, certificate(results), _overhead(results))


def _compared(ablation: Ablation, cells: dict[str, dict[int, TrialView]]) -> Comparison | None:
    """The comparison of the arms that have results; None when the baseline has none."""
    from dense_lab.statistics import compare, compare_at_look

    analysis = ablation.analysis
    values = {
        arm: {seed: cell.metrics[analysis.metric] for seed, cell in mine.items() if analysis.metric in cell.metrics}
        for arm, mine in cells.items()
    }
    known = {arm: mine for arm, mine in values.items() if mine}
    if ablation.baseline not in known:
        return None
    asked: dict[str, Any] = asdict(analysis)
    if ablation.looks is None:
        return compare(known, ablation.baseline, **asked)
    first, maximum = ablation.looks
    return compare_at_look(known, ablation.baseline, first=first, maximum=maximum, **asked)


def _overhead(results: StudyResults) -> list[dict[str, Any]]:
    path = results.folder / OVERHEAD
    found: Any = json.loads(path.read_text()) if path.exists() else []
    rows: list[dict[str, Any]] = found.get("rows", []) if isinstance(found, dict) else found
    return rows
