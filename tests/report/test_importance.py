"""What a parameter explains, and among which trials."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from dense_lab.report.plots import IMPORTANCE, pictures
from dense_lab.report.tables import importance
from dense_lab.results import Goal, StudyResults, TrialView


def search(params: list[tuple[dict[str, Any], float]]) -> StudyResults:
    """A search whose trials have these parameters and losses."""
    trials = [
        TrialView(number, "complete", said, {"valid/loss": loss}, {}, "", {}, None)
        for number, (said, loss) in enumerate(params)
    ]
    return StudyResults("s", Path(), "", (Goal("valid/loss", "minimize"),), {}, trials, len(trials))


def branches() -> StudyResults:
    """The core decides nearly everything; below mamba the state does, below retnet the heads do nothing."""
    rng, said = random.Random(0), []
    for number in range(40):
        if number % 2:
            heads = rng.choice([2, 4])
            said.append(({"model.core": "retnet", "model.core.retnet.heads": heads}, 1.0 + rng.gauss(0, 0.01)))
        else:
            state = rng.choice([8, 16])
            loss = 3.0 + 0.02 * state + rng.gauss(0, 0.01)
            said.append(({"model.core": "mamba", "model.core.mamba.state": state}, loss))
    return search([({**params, "train.lr": rng.uniform(1e-3, 1e-2)}, loss) for params, loss in said])


def test_a_parameter_of_a_branch_takes_no_credit_for_the_branch() -> None:
    found = importance(branches())
    assert {path: share.trials for path, share in found.items()} == {
        "model.core": 40,
        "train.lr": 40,
        "model.core.mamba.state": 20,
        "model.core.retnet.heads": 20,
    }
    assert found["model.core"].value > 0.9
    assert found["model.core.mamba.state"].value > 0.8
    assert found["model.core.retnet.heads"].value < 0.3
    assert found["train.lr"].value < 0.1


def test_a_parameter_of_too_few_trials_is_left_out() -> None:
    few = search([({"a": number / 9, **({"b": number} if number < 3 else {})}, float(number)) for number in range(9)])
    assert set(importance(few)) == {"a"}
    assert importance(search([({"a": 0.5}, 1.0)] * 5)) == {}


def test_what_alone_varies_in_its_branch_explains_no_noise() -> None:
    rng = random.Random(0)
    said = [
        {"core": "retnet", "core.retnet.heads": rng.choice([2, 4])} if number % 2 else {"core": "mamba"}
        for number in range(40)
    ]
    assert set(importance(search([(params, len(params) + rng.random()) for params in said]))) == {"core"}


def test_the_plot_says_how_many_trials_have_a_parameter() -> None:
    plot = next(one for one in pictures(branches()) if one.name == "importance")
    assert plot.caption == IMPORTANCE
    assert "model.core.mamba.state (20 of 40 trials)" in plot.svg
    assert "model.core (" not in plot.svg
