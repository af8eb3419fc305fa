"""Widths that bring every architecture to one number of parameters, found on the meta device without allocating."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch

from dense_lab.errors import InputError
from dense_lab.model import ModelSpec
from dense_lab.study import BudgetSpec, RunSpec
from dense_lab.units import human

_ROUND = (8, 4, 2, 1)
"""Widths are multiples of the first of these that meets the tolerance: tensor cores want multiples of 8."""
_SCAN = 512
"""No core is expected to need widths that are further apart than this."""
_GUESS = 256
"""The width that the search starts from."""


def solve(spec: RunSpec, budget: BudgetSpec) -> RunSpec:
    """`spec` with the width that meets `budget`; raises InputError naming the nearest sizes when none does."""
    vocabulary = spec.data.vocabulary() if budget.count == "all" else 1
    width = _solve_width(spec.model.model_dump_json(exclude={"width"}), budget, vocabulary)
    return spec.model_copy(update={"model": spec.model.model_copy(update={"width": width})})


def parameters(model: ModelSpec, vocabulary: int, count: str) -> int:
    """Parameters of `model`, all or those outside embedding and head; raises InputError when it cannot be built."""
    with torch.device("meta"):
        module = model.build(vocabulary)
    total = sum(parameter.numel() for parameter in module.parameters())
    outside = module.embedding.weight.numel() * (1 if model.head == "tied" else 2)
    return total if count == "all" else total - outside


@functools.lru_cache(maxsize=4096)
def _solve_width(model_json: str, budget: BudgetSpec, vocabulary: int) -> int:
    model = ModelSpec.model_validate_json(model_json)

    @functools.cache
    def size(width: int) -> int | None:
        try:
            return parameters(model.model_copy(update={"width": width}), vocabulary, budget.count)
        except (InputError, ValueError):
            return None

    found = _neighbours(size, budget.params)
    if found is None:
        # The width is not what is wrong: let the component say what is.
        parameters(model.model_copy(update={"width": _GUESS}), vocabulary, budget.count)
        raise InputError(f"no width from {_GUESS} to {_GUESS + _SCAN} fits this architecture")
    below, above = found
    for factor in _ROUND:
        multiples = (below // factor * factor, -(-above // factor) * factor)
        errors = {w: abs(count - budget.params) for w in multiples if w and (count := size(w))}
        width = min(errors, key=lambda w: errors[w], default=0)
        if width and errors[width] <= budget.tolerance * budget.params:
            return width
    sizes = " and ".join(f"{human(size(width) or 0)} at width {width}" for width in dict.fromkeys(found))
    raise InputError(
        f"no width gives {human(budget.params)} parameters within {budget.tolerance * 100:.3g}%: the nearest are "
        f"{sizes}; change `budget.params`, or raise `budget.tolerance`"
    )


def _neighbours(size: Callable[[int], int | None], target: int) -> tuple[int, int] | None:
    """The widths next to `target` that the model accepts, or None when it accepts none near the first guess."""

    def nearest(widths: range) -> int:
        return next((width for width in widths if size(width) is not None), 0)

    width, seen = nearest(range(_GUESS, _GUESS + _SCAN)), set()
    while width and width not in seen:
        seen.add(width)
        # Parameters grow about as the square of the width; a few steps land beside the target.
        guess = max(1, round(width * math.sqrt(target / (size(width) or 1))))
        width = nearest(range(guess, guess + _SCAN)) or nearest(range(guess, 0, -1))
    if not width:
        return None
    while (size(width) or 0) > target and (smaller := nearest(range(width - 1, max(0, width - _SCAN), -1))):
        width = smaller
    larger = nearest(range(width + 1, width + _SCAN))
    while larger and (size(larger) or 0) <= target:
        width, larger = larger, nearest(range(larger + 1, larger + _SCAN))
    return width, larger or width
