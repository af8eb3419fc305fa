"""All-pairs covering: few combinations in which every pair of choices of two different factors occurs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Factors = Mapping[str, Sequence[Any]]


def full_product(factors: Factors) -> Iterator[dict[str, Any]]:
    """Every combination."""
    for values in product(*factors.values()):
        yield dict(zip(factors, values, strict=True))


def covering(factors: Factors) -> list[dict[str, Any]]:
    """Greedy: each row starts from a pair not yet covered and takes, factor by factor, what covers most new pairs."""
    names = list(factors)
    open_pairs = {
        (a, i, b, j) for a, b in combinations(names, 2) for i in range(len(factors[a])) for j in range(len(factors[b]))
    }
    rows = []
    while open_pairs:
        a, i, b, j = min(open_pairs)
        row = {a: i, b: j}
        for name in names:
            if name not in row:
                row[name] = max(
                    range(len(factors[name])),
                    key=lambda k: sum(p in open_pairs for p in _pairs(names, {**row, name: k})),
                )
        open_pairs -= set(_pairs(names, row))
        rows.append({name: factors[name][row[name]] for name in names})
    return rows


def _pairs(names: Sequence[str], row: Mapping[str, int]) -> list[tuple[str, int, str, int]]:
    chosen = [name for name in names if name in row]
    return [(a, row[a], b, row[b]) for a, b in combinations(chosen, 2)]
