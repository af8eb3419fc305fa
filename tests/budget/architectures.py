"""Random architectures brought to random budgets, and what is true of the answers, found by trying every width.

`python -m tests.budget.architectures 300` says how many met their budgets, how far off, and how many were refused.
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from dense_lab import budget as budgets
from dense_lab.budget_spec import BudgetSpec
from dense_lab.counting import flops_per_token, state_bytes
from dense_lab.errors import InputError
from dense_lab.model import ModelSpec
from dense_lab.study import RunSpec

AMOUNTS = {"params": (5e4, 5e6), "flops_per_token": (2e5, 2e7), "state_bytes": (8e3, 2e6)}
VOCABULARY = 256
"""Of python_source with bytes for tokens."""


class Case(NamedTuple):
    """An architecture and its budget."""

    run: RunSpec
    budget: BudgetSpec


def cases(seed: int) -> Iterator[Case]:
    """Without end."""
    draw = random.Random(seed)
    while True:
        target = draw.choice(list(AMOUNTS))
        low, high = AMOUNTS[target]
        budget: dict[str, Any] = {target: int(low * (high / low) ** draw.random()), "tolerance": 0.01}
        if target != "state_bytes":
            budget["solve"] = draw.choice(["width", ["width", "ffn"]])
        if target == "params":
            budget["count"] = draw.choice(["non_embedding", "all"])
        model = {
            "depth": draw.randint(1, 8),
            "core": _core(draw),
            "dense": draw.choice(["none", _dense(draw), _dense(draw)]),
            "ffn": draw.choice(["none", "swiglu", "torchscale"]),
            "head": draw.choice(["tied", "untied"]),
        }
        data = {"kind": "python_source", "tokenizer": "byte"}
        run = RunSpec.model_validate({"model": model, "data": data})
        yield Case(run, BudgetSpec.model_validate(budget))


def _core(draw: random.Random) -> dict[str, Any]:
    return draw.choice(
        [
            {"kind": "retnet", "heads": draw.choice([1, 2, 3, 4, 8]), "value_factor": draw.choice([1, 2])},
            {"kind": "gau_retnet", "heads": draw.choice([1, 2, 4, 6]), "key_factor": draw.choice([0.5, 1])},
            {"kind": "mamba", "state": draw.choice([4, 16]), "expand": draw.choice([1, 1.5, 2])},
        ]
    )


def _dense(draw: random.Random) -> dict[str, Any]:
    gate = draw.choice(
        [
            "none",
            {"kind": "linear", "sharing": draw.choice(["shared", "per_source"])},
            {"kind": "mlp", "sharing": draw.choice(["shared", "per_source"]), "reduction": draw.choice([4, 32])},
        ]
    )
    projection = draw.choice(["identity", "linear", {"kind": "low_rank", "rank": draw.choice([2, 16])}])
    return {
        "span": draw.randint(1, 4),
        "pattern": draw.choice(["recent", "first", "all", {"kind": "dilated", "dilation": 2}]),
        "transition": {"projection": projection, "gate": gate},
        "fusion": draw.choice(["add", "concat", {"kind": "attention", "head_width": draw.choice([4, 32])}]),
        "norm": draw.choice(["none", "rmsnorm"]),
        "owners": draw.choice(["reading", "every"]),
    }


def solved(case: Case) -> ModelSpec:
    """The model at the solved widths; raises InputError where it is refused."""
    return budgets.solve(case.run, case.budget).model


def built_size(model: ModelSpec, budget: BudgetSpec) -> float:
    """What the budget counts, of the whole model, built without any of the counting's short cuts."""
    if budget.target == "flops_per_token":
        return flops_per_token(model, VOCABULARY)
    if budget.target == "state_bytes":
        return state_bytes(model)
    with torch.device("meta"):
        module = model.build(VOCABULARY)
    outside = module.embedding.weight.numel() * (1 if model.head == "tied" else 2)
    return sum(p.numel() for p in module.parameters()) - (outside if budget.count == "non_embedding" else 0)


def nearest(case: Case) -> float:
    """The size nearest to the budget, over all widths and, where they are solved, feed-forward widths."""
    run, budget = case
    found: list[float] = []
    has_hidden = "ffn" in budget.solve and run.model.ffn.model_dump()["kind"] != "none"
    for width in range(1, 10_000):
        try:
            if has_hidden:
                found.append(_nearest_hidden(run.model.model_copy(update={"width": width}), budget))
                least = _with_hidden(run.model.model_copy(update={"width": width}), 1, budget)
            else:
                least = built_size(run.model.model_copy(update={"width": width}), budget)
                found.append(least)
        except InputError:
            continue
        if least > budget.amount:
            break
    return min(found, key=lambda size: abs(size - budget.amount))


def _nearest_hidden(model: ModelSpec, budget: BudgetSpec) -> float:
    """Sizes are linear in the hidden width, which is checked at its largest."""
    one, two = (_with_hidden(model, hidden, budget) for hidden in (1, 2))
    most = budgets.WIDEST * model.width
    assert _with_hidden(model, most, budget) == one + (most - 1) * (two - one)
    exact = 1 + (budget.amount - one) / (two - one)
    whole = {min(max(round(exact) + i, 1), most) for i in (-1, 0, 1)}
    return min((one + (h - 1) * (two - one) for h in whole), key=lambda size: abs(size - budget.amount))


def _with_hidden(model: ModelSpec, hidden: int, budget: BudgetSpec) -> float:
    return built_size(model.model_copy(update={"ffn": model.ffn.model_copy(update={"hidden": hidden})}), budget)


def main(number: int, seed: int = 0) -> int:
    """Print what became of `number` cases; the exit code says whether all is well."""
    start, counts, worst, wrong = time.perf_counter(), Counter[str](), 0.0, 0
    refused = []
    for case, _ in zip(cases(seed), range(number), strict=False):
        target = case.budget.target
        try:
            error = built_size(solved(case), case.budget) / case.budget.amount - 1
        except InputError:
            refused.append(case)
            continue
        counts[f"{target} met"] += 1
        worst = max(worst, abs(error))
        wrong += abs(error) > case.budget.tolerance
    seconds = time.perf_counter() - start
    for case in refused:
        best = nearest(case)
        is_right = abs(best / case.budget.amount - 1) > case.budget.tolerance and said(best) in refusal(case)
        counts[f"{case.budget.target} refused {'rightly' if is_right else 'WRONGLY'}"] += 1
        wrong += not is_right
    for name, times in sorted(counts.items()):
        print(f"{times:5} {name}")
    print(f"{number} architectures in {seconds:.1f} s; largest difference of those met {worst:.3%}; {wrong} wrong")
    return min(wrong, 1)


def refusal(case: Case) -> str:
    """What is said of a case that is refused; empty where it is not."""
    try:
        solved(case)
    except InputError as error:
        return str(error)
    return ""


def said(size: float) -> str:
    """A size as it stands in a refusal."""
    from dense_lab.units import human

    return f" {human(size)} at width "


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 300))
