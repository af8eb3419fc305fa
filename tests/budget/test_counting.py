"""Counts, made on parts that models share, against whole models."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from dense_lab import block, counting, registry, sharing
from dense_lab.counting import PARTS, count, parameters_by_part
from dense_lab.model import ModelSpec
from tests.budget.architectures import cases

VOCABULARY = 37
MODELS = [case.run.model.model_copy(update={"width": 48}) for case in islice(cases(seed=3), 24)]
STATES = [
    {"core": core, "width": 32, "dense": {"span": 2, "sites": [site]}}
    for core, site in (("mamba", "state_readout"), ("mamba", "state_carried"), ("retnet", "state_readout"))
]
MODELS += [ModelSpec.model_validate(state) for state in STATES]
MODELS.append(
    ModelSpec.model_validate(
        {"width": 32, "blocks": [{"core": "mamba", "repeat": 2}, {"core": "retnet", "ffn": "swiglu"}]}
    )
)


@pytest.mark.parametrize("model", MODELS, ids=range(len(MODELS)))
def test_parameters_by_part_are_those_of_the_whole_model(model: ModelSpec) -> None:
    module = model.build(VOCABULARY)
    found = parameters_by_part(model, VOCABULARY)
    assert tuple(found) == PARTS
    assert sum(found.values()) == sum(parameter.numel() for parameter in module.parameters())
    assert found["dense"] == sum(p.numel() for block in module.blocks for p in block.dense.parameters())
    assert found["core"] == sum(p.numel() for block in module.blocks for p in block.core.parameters())


@pytest.mark.parametrize("model", MODELS, ids=range(len(MODELS)))
def test_state_is_that_of_a_pass(model: ModelSpec) -> None:
    with torch.no_grad():
        state = model.build(VOCABULARY).initialise(0).run(torch.zeros(1, 3, dtype=torch.long)).state
    leaves = [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    assert count(model, VOCABULARY).state_bytes == sum(4 * leaf.numel() for leaf in leaves)


class _Products(TorchFunctionMode):
    """FLOPs of products with a weight."""

    flops = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.linear:
            self.flops += 2 * args[0].numel() // args[0].shape[-1] * args[1].numel()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("model", MODELS[:24], ids=range(24))
def test_flops_of_linear_maps_are_those_of_a_pass(model: ModelSpec) -> None:
    """Three tokens, so that a map that runs once for each source or never would show."""
    library = registry.default()
    references = {name: "reference" for kernels in library.kernels for name in kernels.OPERATIONS}
    module = model.build(VOCABULARY).initialise(0)
    with torch.no_grad(), library.kernel_session(references), _Products() as products:
        module(torch.zeros(1, 3, dtype=torch.long))
    mixing = sum(block.mixing_flops() for block in module.blocks)
    assert count(model, VOCABULARY).flops_per_token == pytest.approx(products.flops / 3 + mixing, rel=1e-12)


def test_counting_imports_no_compiler() -> None:
    """It would take seconds, on the meta device for nearly any arithmetic."""
    code = (
        "import sys; from dense_lab.counting import count; from dense_lab.model import ModelSpec\n"
        "for core in ('retnet', 'gau_retnet', 'mamba'):\n"
        "    count(ModelSpec.model_validate({'core': core, 'dense': {'span': 2}, 'ffn': 'swiglu'}), 64)\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("pattern", "kinds"), [("recent", 4), ("first", 4), ("dilated", 4), ("all", 12)])
def test_layers_that_read_alike_are_connected_once(pattern: str, kinds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """12 layers at span 3 read of none to three earlier ones, or, with `all`, of none to eleven."""
    connected = []

    def connect(blocks: Any, index: int, *rest: Any) -> None:
        connected.append(index)
        block.connect(blocks, index, *rest)

    monkeypatch.setattr(counting, "connect", connect)
    monkeypatch.setattr(sharing, "_modules", {})
    model = ModelSpec.model_validate({"width": 32, "depth": 12, "dense": {"span": 3, "pattern": pattern}})
    found = parameters_by_part(model, VOCABULARY)["dense"]
    assert len(connected) == kinds
    assert found == sum(p.numel() for layer in model.build(VOCABULARY).blocks for p in layer.dense.parameters())
