"""Optuna's samplers and pruners as a study names them."""

from __future__ import annotations

import hashlib
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler

    from dense_lab.study import SearchSpec


def sampler(search: SearchSpec, number: int) -> BaseSampler:
    """The sampler that chooses trial `number`.

    It is made anew for each trial, seeded by the study's seed and the trial's number: all it learns from is in the
    storage, so a study that is interrupted and resumed goes on as it would have, and with one worker exactly so.
    """
    import optuna

    seed = int.from_bytes(hashlib.sha256(f"{search.seed}/{number}".encode()).digest()[:4], "big")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if search.sampler == "tpe":
            return optuna.samplers.TPESampler(
                # By group, so that the options below one choice are modelled jointly and apart from another's.
                multivariate=True,
                group=True,
                constant_liar=True,
                n_startup_trials=max(5, min(10, search.trials // 3)),
                seed=seed,
            )
        if search.sampler == "nsga2":
            return optuna.samplers.NSGAIISampler(population_size=max(4, min(50, search.trials // 5)), seed=seed)
        # The points of a grid are queued as trials, see `Study.grid`; nothing is left to be sampled.
        return optuna.samplers.RandomSampler(seed=seed)


def pruner(search: SearchSpec) -> BasePruner:
    """The pruner; a trial's clock counts its evaluations from 1."""
    import optuna

    if search.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1)
    if search.pruner == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    return optuna.pruners.NopPruner()
