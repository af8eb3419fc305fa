"""Exact boundaries of repeated t tests: how much |t| must show at each look so that all looks together keep alpha.

A fixed number of seeds is a bet; adding seeds until something is significant is cheating. A group-sequential test may
look after every seed because it spends its alpha over the looks (Lan and DeMets 1983). Boundaries are usually taken
from Brownian motion, which is wrong for t statistics of three to ten pairs; here they are exact for normal differences
(Jennison and Turnbull 1991 showed that such calculations need one dimension).

Letters: n pairs so far; x_1..x_n their differences, mean zero under the null; R_n^2 = sum of x_i^2; phi_n the angle in

    sum of x_i = sqrt(n) R_n sin(phi_n),    so that    t_n = sqrt(n - 1) tan(phi_n)

1. R_n is independent of the angles so far (spherical symmetry), and so is w = x_{n+1} / R_n, which is t_n / sqrt(n).
2. sin(phi_{n+1}) = (sqrt(n) sin(phi_n) + w) / sqrt((n + 1) (1 + w^2)): the angles are a Markov chain.
3. With w = tan(psi) and A = sqrt(n) sin(phi_n): sin(phi_{n+1}) = sqrt((1 + A^2) / (n + 1)) sin(psi + atan(A)), so the
   chain's distribution function has a closed form, below in `_next_cdf`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

from dense_lab.statistics.corrections import Floats

CELLS = 240
"""Of the grid on |phi| in [0, pi/2]."""
LEVELS: Floats = np.concatenate([np.geomspace(1e-8, 0.2, 90, endpoint=False), np.linspace(0.2, 0.999, 60)])
"""Overall two-sided levels for which boundaries are tabulated."""
EARLINESS = 2.0
"""Exponent of the spending: level x (n / maximum) ^ EARLINESS (Kim and DeMets 1987); less spends earlier."""


@dataclass(frozen=True)
class Boundaries:
    """|t| that is significant at each look, for every level in LEVELS."""

    first: int
    maximum: int
    thresholds: Floats
    """[looks, levels], falling with the level; look i is at first + i pairs."""

    def threshold(self, pairs: int, level: float) -> float:
        """|t| that is significant after `pairs` pairs in a test of overall `level`."""
        row = self.thresholds[pairs - self.first]
        return float(np.exp(np.interp(np.log(level), np.log(LEVELS), np.log(row))))

    def level(self, pairs: int, t: Floats | float) -> Floats:
        """The smallest overall level at which |t| is significant at this look; between 1e-8 and 1."""
        row, size = self.thresholds[pairs - self.first], np.abs(t)
        with np.errstate(divide="ignore"):
            found = np.exp(np.interp(-np.log(size), -np.log(row), np.log(LEVELS)))
        return np.where(size < row[-1], 1.0, found)


@functools.lru_cache(maxsize=32)
def boundaries(first: int, maximum: int, earliness: float = EARLINESS) -> Boundaries:
    """Of looks after every pair from `first` (at least 2) to `maximum`."""
    edges = np.linspace(0.0, np.pi / 2, CELLS + 1)
    above = _first_look(edges, first)
    rows, alive = [], np.empty((0, CELLS))
    spent = np.zeros_like(LEVELS)
    for pairs in range(first, maximum + 1):
        if pairs > first:
            cells = alive @ _transition(edges, pairs - 1)
            above = np.concatenate([np.cumsum(cells[:, ::-1], axis=1)[:, ::-1], np.zeros((len(cells), 1))], axis=1)
        total = LEVELS * (pairs / maximum) ** earliness
        angle = _angle_where(above, edges, total - spent)
        rows.append(np.sqrt(pairs - 1) * np.tan(angle))
        alive = _below(above, angle, edges, total - spent)
        spent = total
    return Boundaries(first, maximum, np.array(rows))


def _first_look(edges: Floats, pairs: int) -> Floats:
    """P(|phi_n| > edge) at the first look, where all levels are alike: [levels, edges]."""
    tail = 2 * stats.t.sf(np.sqrt(pairs - 1) * np.tan(edges[:-1]), pairs - 1)
    return np.broadcast_to(np.append(tail, 0.0), (len(LEVELS), len(edges)))


def _angle_where(above: Floats, edges: Floats, spend: Floats) -> Floats:
    """The angle beyond which `spend` lies; a tail is nearly straight in log tail against log distance from pi/2."""
    with np.errstate(divide="ignore"):
        distance = np.log(np.pi / 2 - edges[:-1])
        tails = np.log(above[:, :-1])
    return np.array(
        [
            np.pi / 2 - np.exp(_extrapolated(np.log(s), row[::-1], distance[::-1]))
            for s, row in zip(spend, tails, strict=True)
        ]
    )


def _extrapolated(x: float, xs: Floats, ys: Floats) -> float:
    if x >= xs[0]:
        return float(np.interp(x, xs, ys))
    slope = (ys[1] - ys[0]) / (xs[1] - xs[0])  # beyond the last cell a tail is a power of the distance
    return float(ys[0] + slope * (x - xs[0]))


def _below(above: Floats, angle: Floats, edges: Floats, spend: Floats) -> Floats:
    """Probability of each cell, without what crossed the boundary."""
    kept = np.where(edges >= angle[:, None], spend[:, None], above)
    return np.asarray(np.maximum(kept[:, :-1] - kept[:, 1:], 0.0), dtype=np.float64)


def _transition(edges: Floats, n: int) -> Floats:
    """[from, to] probabilities of |phi_n| -> |phi_{n+1}| between cells, from each cell's middle."""
    middle = (edges[:-1] + edges[1:]) / 2
    inside = _next_cdf(edges, middle, n) - _next_cdf(-edges, middle, n)
    return np.asarray(np.diff(inside, axis=1), dtype=np.float64)


def _next_cdf(angle: Floats, phi: Floats, n: int) -> Floats:
    """P(phi_{n+1} <= angle | phi_n = phi), [phi, angle]; sin has two branches where psi + atan(A) lies."""
    a = np.sqrt(n) * np.sin(phi)[:, None]
    tilt = np.arctan(a)
    ratio = np.sin(angle)[None, :] * np.sqrt(n + 1) / np.sqrt(1 + a**2)
    branch = np.arcsin(np.clip(ratio, -1, 1))

    def cdf(psi: Floats) -> Floats:
        held = np.clip(psi, -np.pi / 2, np.pi / 2)
        return np.asarray(special.stdtr(n, np.sqrt(n) * np.tan(held)))

    return cdf(branch - tilt) - cdf(-np.pi - branch - tilt) + 1.0 - cdf(np.pi - branch - tilt)
