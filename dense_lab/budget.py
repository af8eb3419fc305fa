"""Widths that bring every architecture to one size, which is counted, never estimated. Depth and the rest stay as said.

Sizes are taken to grow with every width; which widths an architecture accepts is found by trying.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from dense_lab import counting
from dense_lab.budget_spec import HIDDEN, BudgetSpec
from dense_lab.components import FFN, Data
from dense_lab.errors import InputError
from dense_lab.model import ModelSpec
from dense_lab.study import RunSpec
from dense_lab.units import human

WIDEST = 8
"""Where the width is solved as well, a feed-forward layer is at most so many times wider than the residual stream."""
_ROUND = (8, 4, 2, 1)
"""Widths are multiples of the first of these that meets the tolerance: tensor cores want multiples of 8."""
_SCAN = 512
"""No core is expected to need widths that are further apart than this."""
_GUESS = 256
"""The width that the search starts from."""
_UNITS = {"params": "parameters", "flops_per_token": "FLOPs per token", "state_bytes": "bytes of state"}

_UNKNOWNS = {"width": "width", "ffn": "feed-forward width"}


class Fit(NamedTuple):
    """Sizes that a model may have."""

    width: int
    hidden: int | None
    """Of the feed-forward layers; None where they stay as they are."""
    size: float
    """Of what the budget counts."""

    def __str__(self) -> str:
        ffn = f" with a feed-forward width of {self.hidden}" if self.hidden else ""
        return f"{human(self.size)} at width {self.width}{ffn}"


def solve(spec: RunSpec, budget: BudgetSpec) -> RunSpec:
    """`spec` with the widths that meet `budget`; raises InputError naming the nearest sizes when none do."""
    fit = _solved(_Model(spec.model), budget, _vocabulary(spec, budget))
    return spec.model_copy(update={"model": _sized(spec.model, fit.width, fit.hidden)})


def _vocabulary(spec: RunSpec, budget: BudgetSpec) -> int:
    matters = budget.target == "flops_per_token" or (budget.target == "params" and budget.count == "all")
    return _vocabulary_of(type(spec.data), spec.data.model_dump_json()) if matters else 1


@functools.lru_cache
def _vocabulary_of(kind: type[Data], text: str) -> int:
    return kind.model_validate_json(text).vocabulary()


def _size(model: ModelSpec, budget: BudgetSpec, vocabulary: int) -> float:
    if budget.target == "state_bytes":
        return counting.state_bytes(model)
    if budget.target == "flops_per_token":
        return counting.flops_per_token(model, vocabulary)
    parts = counting.parameters_by_part(model, vocabulary)
    outside = 0 if budget.count == "all" else parts["embedding"] + parts["head"]
    return sum(parts.values()) - outside


class _Model:
    """A model as a key: specs may hold what cannot be hashed."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec, self._text = spec, spec.model_dump_json()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Model) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


@functools.lru_cache(maxsize=4096)
def _solved(asked: _Model, budget: BudgetSpec, vocabulary: int) -> Fit:
    model = asked.spec

    @functools.cache
    def size(width: int, hidden: int | None) -> float | None:
        try:
            return _size(_sized(model, width, hidden), budget, vocabulary)
        except (InputError, ValueError):
            return None

    tried: list[Fit] = []
    for fit in _candidates(model, budget, size, _guess(model, budget, vocabulary)):
        if abs(fit.size - budget.amount) <= budget.tolerance * budget.amount:
            return fit
        tried.append(fit)
    if not tried:
        # The width is not what is wrong: let the component say what is.
        _size(_sized(model, _GUESS, None), budget, vocabulary)
        raise InputError(f"no width from {_GUESS} to {_GUESS + _SCAN} fits this architecture")
    raise InputError(_refusal(budget, tried))


def _guess(model: ModelSpec, budget: BudgetSpec, vocabulary: int) -> int:
    """A width to start from: without dense connections, where many architectures are alike, it is nearly the same."""
    plain = model.without_dense()
    if plain == model:
        return _GUESS
    try:
        return _solved(_Model(plain), budget, vocabulary).width
    except InputError:
        return _GUESS


def _refusal(budget: BudgetSpec, tried: Iterable[Fit]) -> str:
    below = max((fit for fit in tried if fit.size <= budget.amount), key=lambda fit: fit.size, default=None)
    above = min((fit for fit in tried if fit.size > budget.amount), key=lambda fit: fit.size, default=None)
    near = [str(fit) for fit in (below, above) if fit is not None]
    unknown = "widths give" if len(budget.solve) > 1 else f"{_UNKNOWNS[budget.solve[0]]} gives"
    return (
        f"no {unknown} {human(budget.amount)} {_UNITS[budget.target]} within {budget.tolerance * 100:.3g}%: the "
        f"nearest {'are' if len(near) > 1 else 'is'} {' and '.join(near)}; change `budget.{budget.target}`, or raise "
        f"`budget.tolerance`"
    )


def _candidates(
    model: ModelSpec, budget: BudgetSpec, size: Callable[[int, int | None], float | None], guess: int
) -> Iterator[Fit]:
    """Sizes to be tried, best first; those nearest to the budget are among them."""
    has_hidden = any(_hidden_field(ffn) for ffn in _feed_forwards(model))
    if "width" not in budget.solve:
        if not has_hidden:
            raise InputError("`solve: ffn` needs a feed-forward layer with a width of its own, and the model has none")
        yield from _hidden_fits(model.width, size, budget.amount, None)
        return
    line = _Line(lambda width: size(width, None), budget.amount, guess, 2.0)
    if "ffn" not in budget.solve or not has_hidden:
        yield from (Fit(width, None, line.at(width)) for width in line.nearest())
        return
    widths = []
    for width in line.nearest():
        widths.append(width)
        yield from _hidden_fits(width, size, budget.amount, WIDEST * width)
    for direction in (1, -1):
        width = line.step(sorted(widths[-2:])[min(direction, 0)], direction, 1) if widths else 0
        while width:
            yield from _hidden_fits(width, size, budget.amount, WIDEST * width)
            end = size(width, 1 if direction > 0 else WIDEST * width) or 0
            if direction * (end - budget.amount) > 0:
                break  # Beyond, no feed-forward layer can make up for the width.
            width = line.step(width, direction, 1)


def _hidden_fits(
    width: int, size: Callable[[int, int | None], float | None], amount: int, most: int | None
) -> Iterator[Fit]:
    line = _Line(lambda hidden: size(width, hidden), amount, 2 * width, 0.5, most)
    yield from (Fit(width, hidden, line.at(hidden)) for hidden in line.nearest())


class _Line:
    """Sizes along one unknown, of which some values are not accepted."""

    def __init__(
        self, size: Callable[[int], float | None], target: int, guess: int, power: float, most: int | None = None
    ) -> None:
        """The size grows about as this power of the unknown; guesses save time and change nothing else."""
        self._size, self._target, self._guess, self._power, self._most = size, target, guess, power, most or math.inf

    def at(self, x: int) -> float:
        """The size at a value that is accepted."""
        size = self._size(x)
        assert size is not None
        return size

    def nearest(self) -> Iterator[int]:
        """The values beside the target, the roundest first; the last ones are the nearest that there are."""
        for factor in _ROUND:
            yield from self.beside(factor)

    def step(self, x: int, direction: int, factor: int) -> int:
        """The next accepted multiple of `factor` from x on, x excluded; 0 when there is none near."""
        first = (x // factor + 1) * factor if direction > 0 else (x - 1) // factor * factor
        end = first + direction * _SCAN
        return next((y for y in range(first, end, direction * factor) if self._accepts(y)), 0)

    def _accepts(self, x: int) -> bool:
        return 0 < x <= self._most and self._size(x) is not None

    def beside(self, factor: int) -> list[int]:
        """The accepted multiples of `factor` beside the target, from below and from above, the nearer one first."""
        below, above = self._ends(self._approach(factor))
        while below or above:
            inner = self._between(below, above, factor)
            if not inner:
                break
            below, above = (inner, above) if self.at(inner) <= self._target else (below, inner)
        return sorted(filter(None, (below, above)), key=lambda x: abs(self.at(x) - self._target))

    def _approach(self, factor: int) -> list[int]:
        """A few values that come closer, by the power law through the last two."""
        seen: list[int] = []
        x, power = self._near(self._guess, factor), self._power
        while x and x not in seen and len(seen) < 8:
            seen.append(x)
            if len(seen) > 1 and self.at(seen[-2]) != self.at(x):
                power = math.log(self.at(x) / self.at(seen[-2])) / math.log(x / seen[-2])
            x = self._near(round(x * (self._target / self.at(x)) ** (1 / max(power, 0.2))), factor)
        return seen

    def _near(self, x: float, factor: int) -> int:
        x = int(min(max(x, 1), self._most))
        return self.step(x - 1, 1, factor) or self.step(x + 1, -1, factor)

    def _ends(self, seen: Iterable[int]) -> tuple[int, int]:
        seen = list(seen)
        below = max((x for x in seen if self.at(x) <= self._target), default=0)
        return below, min((x for x in seen if self.at(x) > self._target), default=0)

    def _between(self, below: int, above: int, factor: int) -> int:
        """An accepted value between two, or beyond the only one (0 stands for none); 0 when there is none."""
        if not below or not above:
            return self.step(above, -1, factor) if above else self.step(below, 1, factor)
        if above - below > 8 * factor and (x := self.step((below + above) // 2, 1, factor)) and x < above:
            return x
        closer_to_below = self._target - self.at(below) < self.at(above) - self._target
        x = self.step(below, 1, factor) if closer_to_below else self.step(above, -1, factor)
        return x if below < x < above else 0


def _sized(model: ModelSpec, width: int, hidden: int | None) -> ModelSpec:
    """`model` at these widths."""
    update: dict[str, Any] = {"width": width}
    if hidden is not None:
        update["ffn"] = _widened(model.ffn, hidden)
        if model.blocks is not None:
            own = (block.ffn and _widened(block.ffn, hidden) for block in model.blocks)
            blocks = (b.model_copy(update={"ffn": ffn}) for b, ffn in zip(model.blocks, own, strict=True))
            update["blocks"] = tuple(blocks)
    return model.model_copy(update=update)


def _widened(ffn: FFN, hidden: int) -> FFN:
    field = _hidden_field(ffn)
    return ffn.model_copy(update={field: hidden}) if field else ffn


def _hidden_field(ffn: FFN) -> str | None:
    return next((name for name in HIDDEN if name in type(ffn).model_fields), None)


def _feed_forwards(model: ModelSpec) -> list[FFN]:
    """Of every layer."""
    return [layer.ffn or model.ffn for layer in model.layers()]
