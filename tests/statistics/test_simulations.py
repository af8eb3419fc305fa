"""Error rates and power by simulation; larger runs: `python -m tests.statistics.simulate`."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dense_lab.statistics import compare, seeds_needed
from tests.statistics import simulate

REPS = 4000
ALPHA = 0.05


def at_most(expected: float, reps: int = REPS) -> float:
    """What a rate of `expected` exceeds once in about 30,000 simulations."""
    return expected + 4 * math.sqrt(expected * (1 - expected) / reps)


def test_fifty_studies_of_ten_equal_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through `compare`, as a study would: any "better" in at most alpha of them, and the arrays say the same."""
    monkeypatch.setattr("dense_lab.statistics.paired.RESAMPLES", 99)  # no verdict rests on the bootstrap
    values = simulate.WORLDS["shared seed effect, 5 times the noise"](np.random.default_rng(0), 50, 10, 5)
    for correction in ("holm", "dunnett"):
        better, worse = simulate.claims(values, correction)
        for study, ups, downs in zip(values, better, worse, strict=True):
            arms = {str(arm): dict(enumerate(cells)) for arm, cells in enumerate(study)}
            found = compare(arms, "0", metric="valid/loss", correction=correction)
            assert [arm.verdict == "better" for arm in found.arms[1:]] == list(ups)
            assert [arm.verdict == "worse" for arm in found.arms[1:]] == list(downs)
        assert better.any(axis=1).mean() <= ALPHA


@pytest.mark.parametrize("world", [w for w in simulate.WORLDS if "quiet baseline" not in w])
def test_holm_keeps_alpha(world: str) -> None:
    better, either = simulate.family_wise(world, "holm", REPS)
    # Scatter of one arm over another makes the differences more alike, never the rate more than Bonferroni's bound.
    assert either <= at_most(ALPHA)
    assert better <= at_most(ALPHA / 2)


@pytest.mark.parametrize("world", ["normal", "shared seed effect, 5 times the noise"])
def test_dunnett_is_exact(world: str) -> None:
    either = simulate.family_wise(world, "dunnett", REPS)[1]
    assert at_most(ALPHA) >= either >= 2 * ALPHA - at_most(ALPHA)


def test_without_a_correction_alpha_is_broken() -> None:
    """The check above can fail."""
    assert simulate.family_wise("normal", "none", REPS)[1] > 3 * ALPHA


def test_where_the_promises_end() -> None:
    """What docs/STATISTICS.md warns of: Dunnett under unequal scatter, every t test under one-sided skew."""
    assert simulate.family_wise("one arm scatters 5 times as much", "dunnett", REPS)[1] > 2 * ALPHA
    assert simulate.family_wise("skewed arms, quiet baseline", "holm", REPS)[0] > 2 * ALPHA


@pytest.mark.parametrize("correction", ["holm", "dunnett", "none"])
def test_a_planted_effect_is_found_at_the_promised_power(correction: str) -> None:
    effect = 2.0
    seeds = seeds_needed(math.sqrt(2), effect, power=0.8, comparisons=9, correction=correction)
    found, others = simulate.planted(correction, seeds, effect, REPS)
    assert found >= 1 - at_most(0.2)
    assert correction == "none" or others <= at_most(ALPHA)
    # One seed fewer would break the promise, but for what Holm gains when another arm is claimed too.
    fewer = simulate.planted(correction, seeds - 1, effect, REPS)[0]
    assert fewer < found
    assert fewer <= at_most(0.8)


@pytest.mark.parametrize("world", ["normal", "shared seed effect, 5 times the noise", "heavy tails (t, 3 df)"])
def test_looking_after_every_seed_keeps_alpha(world: str) -> None:
    better, either = simulate.sequential_family_wise(world, REPS, 3, 10)
    assert either <= at_most(ALPHA)
    assert better <= at_most(ALPHA / 2)


def test_until_decided() -> None:
    """The whole procedure: the effect worth claiming is found, or given up less often than 1 - power."""
    reps = 60
    none = simulate.procedure(0.0, 3.0, reps)
    assert none["found"] + none["others claimed"] <= at_most(ALPHA, reps)
    there = simulate.procedure(3.0, 3.0, reps)
    assert there["given up"] <= at_most(0.2, reps)
    assert there["found"] >= 0.6
    assert there["seeds per arm"] < 8


def test_intervals_cover() -> None:
    t, bca = simulate.coverage("normal", REPS, 5, bootstrap_reps=100)
    assert 1 - at_most(0.05) <= t <= 1 - (0.1 - at_most(0.05))
    assert bca < 0.92  # why no verdict rests on it
