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
        """Whether there is a trial left to be started; called, like what follows, with the folder's lock held."""
        trials = ledger.trials()
        if book.started(trials) >= self.total:
            return False
        if any(book.standing(trial) == "waiting" for trial in trials):
            return True
        if self.sampler == "grid":
            return False
        if self.points is None:
            return book.copies_in_a_row(trials) < HOPELESS
        return bool(self.untried(ledger))

    def untried(self, ledger: Ledger) -> list[dict[str, Any]]:
        """The points of a finite space that no trial has proposed yet."""
        known = {book.point(book.wanted(trial)) for trial in ledger.trials()}
        return [params for params in self.points or () if book.point(params) not in known]

    def prepare(self, ledger: Ledger) -> None:
        """Queue what the sampler would not come to by itself: the grid, or a point nobody has tried."""
        trials = ledger.trials()
        if self.sampler == "grid":
            ledger.enqueue(self.points or ())
        elif self.points is not None and book.copies_in_a_row(trials) >= COPIES:
            untried = self.untried(ledger)
            if untried:
                ledger.enqueue([random.Random(len(trials)).choice(untried)])
