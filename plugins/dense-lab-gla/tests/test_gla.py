"""The conformance kit, and the operation against golden arrays.

`gla.npz` holds inputs, outputs and gradients of fla-org/flash-linear-attention's naive recurrence (commit bc3b101),
computed in float64 on a CPU.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from dense_lab_gla import GLA, gated_linear_attention

from dense_lab.model import ModelSpec
from dense_lab.testing import CoreTests, relative_difference


class TestGLA(CoreTests):
    @pytest.fixture
    def component(self) -> GLA:
        return GLA(heads=2)


def test_against_the_naive_recurrence() -> None:
    with np.load(Path(__file__).parent / "gla.npz", allow_pickle=False) as arrays:
        golden = {name: torch.from_numpy(arrays[name]).double() for name in arrays.files if name != "meta"}
    inputs = [golden[name].requires_grad_() for name in ("q", "k", "v", "gk", "initial_state")]
    o, state = gated_linear_attention(*inputs)
    assert relative_difference(o, golden["o"]) < 1e-9
    assert relative_difference(state, golden["final_state"]) < 1e-9
    gradients = torch.autograd.grad((o * golden["do"]).sum() + (state * golden["dht"]).sum(), inputs)
    for name, gradient in zip(("q", "k", "v", "gk", "initial_state"), gradients, strict=True):
        assert relative_difference(gradient, golden[f"d{name}"]) < 1e-9, name


def test_takes_dense_connections() -> None:
    spec = ModelSpec.model_validate({"width": 32, "core": {"kind": "gla"}, "dense": {"span": 2}})
    model = spec.build(16).initialise(0)
    model.loss(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)).backward()
    assert all(p.grad is not None for p in model.parameters())
