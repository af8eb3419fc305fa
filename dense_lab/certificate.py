"""Whether an ablation compared like with like: clauses that are checked in what its cells have recorded.

A clause is about the cells that were compared, and a comparison is FAIR when every clause holds. The clauses answer the
usual objections: models called equal that differ by half, arms that saw other data, a rate tuned for one side only,
one seed, a choice made on the test set, kernels of which only one side's was right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dense_lab.clauses import CHECKS, Clause
from dense_lab.recorded import Record
from dense_lab.results import StudyResults


@dataclass(frozen=True)
class Certificate:
    """All clauses of one study."""

    clauses: tuple[Clause, ...]

    @property
    def fair(self) -> bool:
        """Whether every clause holds."""
        return all(clause.passed for clause in self.clauses)

    def as_json(self) -> dict[str, Any]:
        """For JSON."""
        return {"fair": self.fair, "clauses": [clause._asdict() for clause in self.clauses]}

    def line(self) -> str:
        """FAIR and how like the arms were, or NOT FAIR and the clauses that fail; how like in FLOPs in any case."""
        if self.fair:
            measured = [clause.detail for clause in self.clauses if clause.measured]
            same = ", ".join(clause.name for clause in self.clauses if not clause.measured)
            return f"FAIR: {'; '.join(measured)}; held for all arms: {same}"
        wrong = [f"{clause.name}: {clause.detail}" for clause in self.clauses if not clause.passed]
        # Whatever else is wrong: what the arms cost is what a reader of unlike numbers asks first.
        cost = [f"held: {clause.detail}" for clause in self.clauses if clause.passed and clause.name == "FLOPs"]
        return "NOT FAIR: " + "; ".join(wrong + cost)


def certificate(results: StudyResults) -> Certificate:
    """The certificate of a study as far as it has got; a search, which compares no arms by seed, is not FAIR."""
    if results.ablation is None:
        return Certificate((Clause("arms", False, "a search, whose trials share neither seeds nor tuning"),))
    record = Record(results, results.ablation)
    if not record.all:
        return Certificate((Clause("seeds", False, "no cell is complete"),))
    return Certificate(tuple(clause for check in CHECKS for clause in check(record)))
