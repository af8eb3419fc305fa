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

_ROUND = (64, 32, 16, 8, 4, 2, 1)
"""Widths are multiples of the first of these that meets the tolerance: round widths run faster."""
_COARSEST_STEP = 512
"""No core is expected to need a width in larger multiples than this."""
_WIDEST = 2**20


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
    if count == "all":
        return total
    return total - module.embedding.weight.numel() * (1 if model.head == "tied" else 2)


@functools.lru_cache(maxsize=4096)
def _solve_width(model_json: str, budget: BudgetSpec, vocabulary: int) -> int:
    model = ModelSpec.model_validate_json(model_json)

    @functools.cache
    def size(width: int) -> int | None:
        try:
            return parameters(model.model_copy(update={"width": width}), vocabulary, budget.count)
        except (InputError, ValueError):
            return None

    step = next((width for width in range(1, _COARSEST_STEP + 1) if size(width) is not None), None)
    if step is None:
        # The width is not what is wrong: let the component say what is.
        parameters(model.model_copy(update={"width": _COARSEST_STEP}), vocabulary, budget.count)
        raise InputError(f"no width up to {_COARSEST_STEP} fits this architecture")
    below, above = _neighbours(size, step, budget.params)
    for factor in _ROUND:
        multiple = math.lcm(step, factor)
        for width in (below // multiple * multiple, -(-above // multiple) * multiple):
            found = size(width) if width else None
            if found is not None and abs(found - budget.params) <= budget.tolerance * budget.params:
                return width
    near = {width: size(width) or 0 for width in (below, above)}
    sizes = " and ".join(f"{human(found)} at width {width}" for width, found in near.items())
    raise InputError(
        f"no width gives {human(budget.params)} parameters within {budget.tolerance * 100:.3g}%: the nearest are "
        f"{sizes}; change `budget.params`, or raise `budget.tolerance`"
    )


def _neighbours(size: Callable[[int], int | None], step: int, target: int) -> tuple[int, int]:
    """The widths next to `target` among the multiples of `step` that the model accepts (size is not None)."""

    def accepted(width: int) -> int:
        return next((w for w in range(width, 2 * width + 1, step) if size(w) is not None), width)

    def too_large(width: int) -> bool:
        found = size(accepted(width))
        return found is None or found > target

    low, high = step, 2 * step
    while not too_large(high) and high < _WIDEST:
        low, high = high, 2 * high
    while high - low > step:
        middle = (low + high) // 2 // step * step
        low, high = (low, middle) if too_large(middle) else (middle, high)
    return accepted(low), accepted(high)
