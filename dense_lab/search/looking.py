"""More seeds for the arms that are undecided: after the study's seeds, one at a time, up to a maximum."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dense_lab.ablation import results as found
from dense_lab.ablation.cells import Cell, CellPlan
from dense_lab.errors import InputError
from dense_lab.files import read_json

if TYPE_CHECKING:
    from dense_lab.results import StudyResults
    from dense_lab.space import Study


@dataclass(frozen=True)
class Looks:
    """When arms are looked at; both numbers are fixed before the first look, or the error rate would not hold."""

    first: int
    """Pairs at the first look: the study's seeds."""
    maximum: int
    """Pairs at most."""
    seeds: tuple[int, ...]
    """In the order in which they are used."""

    @classmethod
    def of(cls, study: Study, folder: Path, maximum: int | None) -> Looks | None:
        """Those of a study, or None when no seeds are to be added; raises InputError when they have changed."""
        if maximum is None:
            return None
        if study.ablation is None:
            raise InputError("--until-decided is for ablations: this study has no arms")
        seeds = study.ablation.spec.seeds
        if not 2 <= len(seeds) <= maximum:
            raise InputError(
                f"--max-seeds {maximum}: the study begins with {len(seeds)} seeds; it takes 2 to begin with, and as "
                "many or more in all"
            )
        before = read_json(folder / "manifest.json").get("looks")
        if before and before != [len(seeds), maximum]:
            raise InputError(
                f"this study is looked at after {before[0]} to {before[1]} seeds: that was fixed before the first "
                f"look, and keeps the error rate. Go on with `seeds: {before[0]}` and --max-seeds {before[1]}"
            )
        rest = (seed for seed in range(max(seeds) + 1, max(seeds) + 1 + maximum - len(seeds)))
        return cls(len(seeds), maximum, (*seeds, *rest))

    def extended(self, plan: CellPlan, results: StudyResults) -> CellPlan | None:
        """The plan with another seed for undecided arms and for the baseline; None when there is nothing to add."""
        from dense_lab.statistics.sequential import undecided

        ablation = results.ablation
        assert ablation is not None
        analysis = ablation.analysis
        arms = undecided(
            found.cells(results, analysis.metric),
            ablation.baseline,
            first=self.first,
            maximum=self.maximum,
            alpha=analysis.alpha,
            correction=analysis.correction,
            direction=analysis.direction,
            smallest_effect=analysis.smallest_effect,
            power=analysis.power,
        )
        tried: dict[str, set[int]] = {}
        for cell in plan.cells:
            if cell.role == "cell":
                tried.setdefault(cell.arm, set()).add(cell.seed)
        more: dict[tuple[str, int], None] = {}
        for arm in arms:
            left = [seed for seed in self.seeds if seed not in tried[arm]]
            if left:
                more |= {(ablation.baseline, left[0]): None} if left[0] not in tried[ablation.baseline] else {}
                more[arm, left[0]] = None
        cells = tuple(Cell("cell", arm, seed) for arm, seed in more)
        return replace(plan, cells=(*plan.cells, *cells)) if cells else None
