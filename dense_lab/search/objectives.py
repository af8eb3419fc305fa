"""A finished trial's values for the objectives of a search."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from dense_lab.errors import DenseLabError

if TYPE_CHECKING:
    from dense_lab.study import SearchSpec


def values(search: SearchSpec, metrics: Mapping[str, float]) -> list[float]:
    """The objectives' values; raises DenseLabError when one is missing or not finite."""
    found = []
    for goal in search.objective:
        value = metrics.get(goal.metric)
        if value is None:
            known = ", ".join(sorted(metrics))
            raise DenseLabError(f"the trial ended without the objective {goal.metric!r}. It has: {known}")
        if not math.isfinite(value):
            raise DenseLabError(f"{goal.metric} is {value} at the end of the trial")
        found.append(float(value))
    return found
