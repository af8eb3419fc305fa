"""Simulated error rates, power and coverage; `python -m tests.statistics.simulate` prints the tables of the docs.

Arrays are [repetitions, arms, seeds]; arm 0 is the baseline and losses are minimised. Claims go through the product's
own functions on arrays; `test_simulations.py` checks that `compare` says the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
from scipy import stats

from dense_lab.statistics import undecided
from dense_lab.statistics.boundaries import boundaries
from dense_lab.statistics.corrections import Correction, critical, dunnett_critical, holm
from dense_lab.statistics.paired import bca_interval, blocks_test, t_test
from dense_lab.statistics.power import noncentrality, seeds_needed

Sampler = Callable[[np.random.Generator, int, int, int], np.ndarray]


def _noise(draw: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]) -> Sampler:
    return lambda rng, reps, arms, seeds: draw(rng, (reps, arms, seeds))


def _shared(rng: np.random.Generator, reps: int, arms: int, seeds: int) -> np.ndarray:
    return rng.normal(size=(reps, arms, seeds)) + 5 * rng.normal(size=(reps, 1, seeds))


def _unequal(rng: np.random.Generator, reps: int, arms: int, seeds: int) -> np.ndarray:
    return rng.normal(size=(reps, arms, seeds)) * np.geomspace(0.2, 5, arms)[:, None]


def _one_wild(rng: np.random.Generator, reps: int, arms: int, seeds: int) -> np.ndarray:
    return rng.normal(size=(reps, arms, seeds)) * np.where(np.arange(arms) == arms - 1, 5.0, 1.0)[:, None]


def _skewed_arms(rng: np.random.Generator, reps: int, arms: int, seeds: int) -> np.ndarray:
    values = rng.exponential(size=(reps, arms, seeds)) - 1
    values[:, 0] = rng.normal(size=(reps, seeds)) * 0.1
    return values


WORLDS: dict[str, Sampler] = {
    "normal": _noise(lambda rng, shape: rng.normal(size=shape)),
    "shared seed effect, 5 times the noise": _shared,
    "heavy tails (t, 3 df)": _noise(lambda rng, shape: rng.standard_t(3, size=shape)),
    "heavy tails (Cauchy)": _noise(lambda rng, shape: rng.standard_cauchy(size=shape)),
    "skewed (exponential), all alike": _noise(lambda rng, shape: rng.exponential(size=shape)),
    "skewed arms, quiet baseline": _skewed_arms,
    "unequal scatter, 0.2 to 5": _unequal,
    "one arm scatters 5 times as much": _one_wild,
    "coarse (multiples of half the noise)": _noise(lambda rng, shape: np.round(2 * rng.normal(size=shape))),
}


def claims(values: np.ndarray, correction: Correction, alpha: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Which arms are called better and worse, [reps, arms - 1] each."""
    arms, baseline = values[:, 1:], values[:, 0]
    if correction == "dunnett":
        test = blocks_test(arms, baseline)
        shown = np.abs(test.t) >= dunnett_critical(test.df, alpha, arms.shape[1])
    else:
        test = t_test(arms - baseline[:, None])
        shown = (holm(test.p) if correction == "holm" else test.p) <= alpha
    return shown & (test.mean < 0), shown & (test.mean > 0)


def family_wise(
    world: str, correction: Correction, reps: int, *, arms: int = 10, seeds: int = 5
) -> tuple[float, float]:
    """Share of repetitions with any "better", and with any claim, among arms that do not differ."""
    better, worse = claims(WORLDS[world](np.random.default_rng(1), reps, arms, seeds), correction)
    return float(better.any(axis=1).mean()), float((better | worse).any(axis=1).mean())


def planted(correction: Correction, seeds: int, effect: float, reps: int, arms: int = 10) -> tuple[float, float]:
    """How often the one arm that is better by `effect` is found, and how often another is claimed to differ."""
    values = _shared(np.random.default_rng(2), reps, arms, seeds)
    values[:, 1] -= effect
    better, worse = claims(values, correction)
    return float(better[:, 0].mean()), float((better | worse)[:, 1:].any(axis=1).mean())


def sequential_levels(differences: np.ndarray, first: int) -> np.ndarray:
    """Sequential p value of each row of [..., maximum] differences after all looks."""
    table = boundaries(first, differences.shape[-1])
    found = np.ones(differences.shape[:-1])
    for n in range(first, differences.shape[-1] + 1):
        found = np.minimum(found, table.level(n, t_test(differences[..., :n]).t))
    return found


def sequential_family_wise(world: str, reps: int, first: int, maximum: int, arms: int = 10) -> tuple[float, float]:
    """Any "better", any claim, if every arm goes on to the maximum: giving arms up can only make claims fewer."""
    values = WORLDS[world](np.random.default_rng(3), reps, arms, maximum)
    differences = values[:, 1:] - values[:, :1]
    shown = holm(sequential_levels(differences, first)) <= 0.05
    down = differences.mean(axis=-1) < 0
    return float((shown & down).any(axis=1).mean()), float(shown.any(axis=1).mean())


def peeking(reps: int, first: int, maximum: int, arms: int = 10) -> float:
    """Any claim by the ordinary test, Holm over arms, at any look: what the sequential rule is there to prevent."""
    values = WORLDS["normal"](np.random.default_rng(6), reps, arms, maximum)
    differences = values[:, 1:] - values[:, :1]
    looks = [holm(t_test(differences[..., :n]).p) <= 0.05 for n in range(first, maximum + 1)]
    return float(np.any(looks, axis=0).any(axis=1).mean())


def diverging(reps: int, seeds: int, lost: float) -> float:
    """How often one equal arm is called better when its worst runs, a share of `lost`, fail and so are missing."""
    rng = np.random.default_rng(7)
    values = rng.normal(size=(reps, 2, seeds))
    claimed = 0
    for baseline, arm in values:
        sample = (arm - baseline)[arm < stats.norm.isf(lost)]
        if len(sample) > 1:
            test = t_test(sample)
            claimed += bool(test.p <= 0.05 and test.mean < 0)
    return claimed / reps


def missed(reps: int, seeds: int, power: float = 0.8) -> float:
    """How often "no difference shown" is said of an arm that differs by the smallest effect; the worst of scatters."""
    threshold = critical(seeds - 1, 0.05, 1, "holm")
    factor = noncentrality(threshold, seeds - 1, power)
    worst = 0.0
    for ratio in np.linspace(0.5, 3, 11):
        sample = np.random.default_rng(8).normal(1, ratio * np.sqrt(seeds) / factor, size=(reps, seeds))
        test = t_test(sample)
        worst = max(worst, float(((np.abs(test.t) < threshold) & (test.error * factor <= 1)).mean()))
    return worst


def procedure(
    effect: float, smallest: float, reps: int, *, first: int = 3, maximum: int = 10, arms: int = 4
) -> dict[str, float]:
    """The whole of `search --until-decided`, seed by seed, with one arm better by `effect`; rates over repetitions."""
    rng = np.random.default_rng(4)
    found = wrong = given_up = 0
    used = 0
    for _ in range(reps):
        table = _shared(rng, 1, arms, maximum)[0]
        table[1] -= effect
        values = {str(arm): dict(enumerate(table[arm, :first])) for arm in range(arms)}
        asked = {"first": first, "maximum": maximum, "smallest_effect": smallest}
        while waiting := undecided(values, "0", **asked):
            for arm in {"0", *waiting}:
                values[arm][len(values[arm])] = table[int(arm), len(values[arm])]
        differences = {a: np.array([values[a][s] - values["0"][s] for s in values[a]]) for a in values if a != "0"}
        table_ = boundaries(first, maximum)
        levels = [
            min(float(table_.level(n, float(t_test(d[:n]).t))) for n in range(first, len(d) + 1))
            for d in differences.values()
        ]
        shown = holm(np.array(levels)) <= 0.05
        found += bool(shown[0])
        given_up += not shown[0] and len(differences["1"]) < maximum
        wrong += bool(shown[1:].any())
        used += sum(map(len, differences.values()))
    return {"found": found / reps, "given up": given_up / reps, "others claimed": wrong / reps,
            "seeds per arm": used / reps / (arms - 1)}  # fmt: skip


def coverage(world: str, reps: int, seeds: int, level: float = 0.95, bootstrap_reps: int = 400) -> tuple[float, float]:
    """Share of t and of BCa intervals of one arm's difference that hold the truth (zero)."""
    values = WORLDS[world](np.random.default_rng(5), reps, 2, seeds)
    sample = values[:, 1] - values[:, 0]
    test = t_test(sample)
    held = np.abs(test.mean) <= test.error * stats.t.isf((1 - level) / 2, seeds - 1)
    intervals = np.array([bca_interval(row, level) for row in sample[:bootstrap_reps]])
    return float(held.mean()), float(((intervals[:, 0] <= 0) & (intervals[:, 1] >= 0)).mean())


def main(reps: int) -> None:
    """Print everything."""
    print_fixed(reps)
    print_sequential(reps)
    print(f"\ncoverage of 95 % intervals of one difference: t (of {reps}), BCa (of 400), in %")
    for world in ("normal", "heavy tails (t, 3 df)", "skewed arms, quiet baseline"):
        for seeds in (3, 5, 10, 20):
            t, bca = coverage(world, reps, seeds)
            print(f"| {world} | {seeds} | {100 * t:.1f} | {100 * bca:.1f} |")


def print_fixed(reps: int) -> None:
    """Error rates and power with a fixed number of seeds."""
    print(f"\n10 identical arms, 5 seeds, alpha 0.05: any 'better' / any claim, in % of {reps} repetitions")
    print("by holm, dunnett, none; last column: holm, 50 repetitions")
    for world in WORLDS:
        rates = [family_wise(world, c, reps) for c in ("holm", "dunnett", "none")]
        few = family_wise(world, "holm", 50)
        print(f"| {world} |", " | ".join(f"{100 * b:.1f} / {100 * a:.1f}" for b, a in (*rates, few)), "|")

    print(f"\nplanted effect, 9 comparisons: seeds_needed(power 0.8), found / with a seed fewer / others, % of {reps}")
    for correction in ("holm", "dunnett", "none"):
        for effect in (1.0, 2.0, 4.0):
            seeds = seeds_needed(np.sqrt(2), effect, comparisons=9, correction=correction)
            hit, other = planted(correction, seeds, effect, reps)
            fewer = planted(correction, seeds - 1, effect, reps)[0]
            print(f"| {correction} | {effect} | {seeds} | {100 * hit:.1f} | {100 * fewer:.1f} | {100 * other:.1f} |")

    lost = {seeds: diverging(reps, seeds, 0.2) for seeds in (5, 10, 20)}
    print("\nan equal arm whose worst fifth of runs fails, called better:", _told(lost))
    blind = {seeds: missed(reps, seeds) for seeds in (3, 5, 8)}
    print("'no difference shown' of an arm that differs by the smallest effect, at most:", _told(blind))


def print_sequential(reps: int) -> None:
    """Error rates and power of looking after every seed."""
    print(f"\nlooks after every seed from 3 to 10, 10 identical arms: any 'better' / any claim, % of {reps}")
    for world in WORLDS:
        better, either = sequential_family_wise(world, reps, 3, 10)
        print(f"| {world} | {100 * better:.1f} / {100 * either:.1f} |")
    print(f"the ordinary test at every one of these looks: {100 * peeking(reps, 3, 10):.1f} % any claim")

    print("\nuntil decided, 4 arms, from 3 seeds, smallest effect in units of the noise of an arm, whole procedure")
    for smallest, maximum, effects in ((3.0, 10, (0.0, 3.0, 6.0)), (1.5, 20, (0.0, 1.5, 3.0))):
        for effect in effects:
            rates = procedure(effect, smallest, min(reps, 2000) // 4, maximum=maximum)
            told = " | ".join(f"{name} {value:.3f}" for name, value in rates.items())
            print(f"| smallest {smallest}, at most {maximum} seeds | true {effect} | {told} |")


def _told(rates: dict[int, float]) -> str:
    return ", ".join(f"{100 * rate:.1f} % with {seeds} seeds" for seeds, rate in rates.items())


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
