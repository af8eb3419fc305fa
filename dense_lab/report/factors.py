"""Arms that form a grid of two factors, such as core x dense: effects within rows, and interactions."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from dense_lab.report.ablated import Ablated

if TYPE_CHECKING:
    from dense_lab.statistics import ArmVerdict

BESIDES: Literal["as written"] = "as written"
"""Level of an arm that says nothing of a factor."""
MOST = 6
"""Grids shown of an ablation with many factors."""


@dataclass(frozen=True)
class Interaction:
    """How the effect of a column differs between a row and the baseline's row."""

    row: str
    column: str
    verdict: ArmVerdict


@dataclass(frozen=True)
class Grid:
    """Values by the levels of two factors, averaged over the levels of all others; the baseline's levels come first."""

    row: str
    column: str
    """Names of the factors."""
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: dict[tuple[str, str], dict[int, float]]
    """(level of the row, level of the column) -> seed -> metric."""
    metric: str
    alpha: float

    def effect(self, row: str, column: str) -> ArmVerdict:
        """Of a column against the first one within a row, paired by seed, not adjusted."""
        from dense_lab.statistics import compare

        pair = {"first": self.values[row, self.columns[0]], "this": self.values[row, column]}
        return compare(pair, "first", metric=self.metric, alpha=self.alpha, correction="none").arms[-1]

    def mean(self, row: str, column: str) -> float:
        """Over seeds; not a number when there are none."""
        values = self.values[row, column].values()
        return fmean(values) if values else math.nan

    def interactions(self) -> list[Interaction]:
        """The effect of each column but the first within each row but the first, minus that within the first row."""
        from dense_lab.statistics import compare

        found = []
        for row, column in itertools.product(self.rows[1:], self.columns[1:]):
            pair = {"first": self._effects(self.rows[0], column), "this": self._effects(row, column)}
            if pair["first"]:
                said = compare(pair, "first", metric=self.metric, alpha=self.alpha, correction="none").arms[-1]
                found.append(Interaction(row, column, said))
        return found

    def _effects(self, row: str, column: str) -> dict[int, float]:
        one, first = self.values[row, column], self.values[row, self.columns[0]]
        return {seed: one[seed] - first[seed] for seed in one.keys() & first.keys()}


def grids(ablated: Ablated) -> list[Grid]:
    """A grid for every pair of factors, if the arms are all combinations of at least two factors' levels."""
    levels = {arm.name: _levels(ablated.ablation.arms[arm.name]) for arm in ablated.arms}
    factors = _factors(list(levels.values()))
    options = [list(dict.fromkeys(said.get(f, BESIDES) for said in levels.values())) for f in factors]
    combined = {tuple(said.get(f, BESIDES) for f in factors): name for name, said in levels.items()}
    complete = len(combined) == len(levels) == math.prod(map(len, options))
    if len(factors) < 2 or not complete or not all(ablated.values(arm) for arm in ablated.arms):
        return []
    found = [
        _grid(ablated, factors, options, combined, i, j) for i, j in itertools.combinations(range(len(factors)), 2)
    ]
    return found[:MOST]


def _levels(overrides: dict[str, Any]) -> dict[str, str]:
    """What an arm changes; a value that belongs to an option of another one is part of that one's level."""
    found: dict[str, str] = {}
    for path, value in sorted(overrides.items(), key=lambda pair: pair[0].count(".")):
        owner = next((known for known in found if path.startswith(f"{known}.")), None)
        if owner is None:
            found[path] = value_text(value)
        else:
            found[owner] += f" {path.rpartition('.')[2]}={value_text(value)}"
    return found


def value_text(value: Any) -> str:
    """A value of a study in short: `densessm(span=2)`."""
    if isinstance(value, dict) and "kind" in value:
        rest = ", ".join(f"{key}={value_text(item)}" for key, item in value.items() if key != "kind")
        return f"{value['kind']}({rest})" if rest else str(value["kind"])
    return value if isinstance(value, str) else json.dumps(value)


def _factors(levels: list[dict[str, str]]) -> list[str]:
    """Paths that differ between arms; paths that change together count as one, the first."""
    paths = dict.fromkeys(path for said in levels for path in said)
    found: dict[tuple[int, ...], str] = {}
    for path in paths:
        seen: dict[str, int] = {}
        pattern = tuple(seen.setdefault(said.get(path, BESIDES), len(seen)) for said in levels)
        if len(seen) > 1:
            found.setdefault(pattern, path)
    return list(found.values())


def _grid(
    ablated: Ablated,
    factors: list[str],
    options: list[list[str]],
    combined: dict[tuple[str, ...], str],
    row: int,
    column: int,
) -> Grid:
    arms = {arm.name: ablated.values(arm) for arm in ablated.arms}
    values = {}
    for pair in itertools.product(options[row], options[column]):
        members = [arms[name] for key, name in combined.items() if (key[row], key[column]) == pair]
        seeds = set.intersection(*(set(member) for member in members))
        values[pair] = {seed: fmean(member[seed] for member in members) for seed in sorted(seeds)}
    names = [factor.removeprefix("model.") for factor in factors]
    analysis = ablated.ablation.analysis
    return Grid(
        names[row], names[column], tuple(options[row]), tuple(options[column]), values, analysis.metric, analysis.alpha
    )
