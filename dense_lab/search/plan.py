"""When another trial may start: the total, the points of a finite space, what to do when nothing new is proposed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from dense_lab.search import ledger as book
from dense_lab.search.ledger import Ledger

COPIES = 5
"""Copies in a row after which a point of a finite space that nobody has tried is queued."""
HOPELESS = 100
"""Copies in a row after which an infinite space counts as exhausted."""


@dataclass(frozen=True)
class Plan:
    """How a study goes on; the same in every process."""

    total: int
    """Trials in all."""
    sampler: str
    points: tuple[dict[str, Any], ...] | None
    """Every point of the space; None when there are infinitely many, or too many to list."""

    def may_start(self, ledger: Ledger) -> bool:
        """Whether a trial is left to be started, having queued what the sampler would not come to by itself.

        That is the points of a grid, or one that nobody has tried when the sampler does nothing but repeat itself.
        Called with the folder's lock held.
        """
        trials = ledger.trials()
        if book.started(trials) >= self.total:
            return False
        if any(book.standing(trial) == "waiting" for trial in trials):
            return True
        copies = book.copies_in_a_row(trials)
        if self.points is None:
            return copies < HOPELESS
        known = {book.point(book.wanted(trial)) for trial in trials}
        untried = [params for params in self.points if book.point(params) not in known]
        if untried and self.sampler == "grid":
            ledger.enqueue(untried)
        elif untried and copies >= COPIES:
            ledger.enqueue([random.Random(len(trials)).choice(untried)])
        return bool(untried)
