"""Which learning rate and weight decay an arm's cells use: the best of its tuning trials by the validation loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dense_lab.search import ledger as book

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

METRIC = "valid/loss"
"""What is selected by; tuning trials are not tested at all."""
Tried = tuple[dict[str, float], int, "FrozenTrial"]
"""A point of the grid, and the number and last attempt of its trial, which has finished."""


def choose(tried: Sequence[Tried]) -> dict[str, Any]:
    """What is added to the `cell` of an arm's cells once every point of the grid was tried.

    That is `values`, the best point, and `tuned`, how it was found; or `failed`, why there is none. Of equal losses
    the first of the grid is taken. A trial that failed loses to any that did not.
    """
    losses = [_loss(trial) for _, _, trial in tried]
    if all(math.isinf(loss) for loss in losses):
        reason = book.end(tried[0][2]).get("reason") or "no reason given"
        return {"failed": f"all {len(tried)} tuning trials of this arm failed; the first, {tried[0][1]}: {reason}"}
    best = min(range(len(tried)), key=losses.__getitem__)
    point, number, _ = tried[best]
    told = {
        "values": point,
        "trial": number,
        "loss": losses[best],
        "trials": [number for _, number, _ in tried],
        "failed": sum(map(math.isinf, losses)),
        "edge": edges(point, [other for other, _, _ in tried]),
    }
    return {"values": point, "tuned": told}


def _loss(trial: FrozenTrial) -> float:
    end = book.end(trial)
    value = end.get("metrics", {}).get(METRIC, math.inf) if end.get("state") == "complete" else math.inf
    return value if math.isfinite(value) else math.inf


def edges(point: dict[str, float], grid: Sequence[dict[str, float]]) -> list[str]:
    """The paths whose value is the smallest or the largest of those tried: a wider grid might do better."""
    found = []
    for path, value in point.items():
        tried = sorted({other[path] for other in grid})
        if len(tried) > 1 and value in (tried[0], tried[-1]):
            found.append(path)
    return found
