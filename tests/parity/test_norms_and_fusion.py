"""RMSNorm, and the selective transition of DenseSSM alone."""

from __future__ import annotations

import pytest
import torch

from dense_lab.dense import DenseConnection, DenseSpec
from dense_lab.modules import Stream
from dense_lab.norms import RMSNorm
from dense_lab_plugins.gates.mlp import MLPGate
from tests.parity.golden import Golden, difference
from tests.parity.test_dense_gau import DTYPES

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5}
"""These peers' float32 errors were not measured: a hundred roundings of values of order one."""


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype) -> None:
    """Forward and gradients, with and without weight."""
    golden = Golden("rmsnorm")
    x = golden["x"].to(dtype).requires_grad_()
    norm = RMSNorm(x.shape[-1], golden.meta["eps"]).to(dtype)
    norm.weight.data.copy_(golden["weight"])
    y = norm(x)
    y.backward(golden["dy"].to(dtype))
    plain = RMSNorm(x.shape[-1], golden.meta["eps"], elementwise_affine=False)(x)
    got = {"y": y, "y_noaffine": plain, "dx": x.grad, "dweight": norm.weight.grad}
    for name, value in got.items():
        assert difference(value, golden[name]) < ROUNDING[dtype] * max(1, float(golden[name].abs().max())), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_selective_transition(dtype: torch.dtype) -> None:
    """Gates of k and v from the layer's input, and the fused and normalised k."""
    golden = Golden("densessm_fusion")
    h = golden["h"].to(dtype)
    weights = {f"transition.gate.map.{i}.weight": golden[f"w_k_select.fc{n}"] for i, n in ((0, 1), (2, 2))}
    spec = DenseSpec.model_validate({"span": 2})  # the defaults are the official connection
    keys = golden["k"].shape[-1]
    connection = DenseConnection(spec, Stream("k", keys, dense=True), h.shape[-1], [keys, keys], 1e-6)
    connection.load_state_dict({**weights, "norm.weight": golden["w_k_norm"]})
    connection = connection.to(dtype)
    with torch.no_grad():
        (gate,) = connection.transition.gate(h)
        fused = connection(h, golden["k"].to(dtype), list(golden["k_past"].to(dtype)))
        values = MLPGate().build(h.shape[-1], golden["v_gate"].shape[-1], 2)
        values.load_state_dict({f"map.{i}.weight": golden[f"w_v_select.fc{n}"] for i, n in ((0, 1), (2, 2))})
        (v_gate,) = values.to(dtype)(h)
    for name, got in {"k_gate": gate, "k_fused": fused, "v_gate": v_gate}.items():
        expected = golden[name]
        assert difference(got, expected) < ROUNDING[dtype] * max(1, float(expected.abs().max())), name


@pytest.mark.parametrize("elementwise_affine", [True, False])
def test_rms_norm_gradients(elementwise_affine: bool) -> None:
    """The CPU's own backward against central differences, and its forward against torch's."""
    norm = RMSNorm(7, 1e-3, elementwise_affine=elementwise_affine).double()
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 3, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: norm(x), (x, *norm.parameters()))
    expected = torch.nn.functional.rms_norm(x, (7,), norm.weight, norm.eps)
    assert difference(norm(x), expected) < 1e-14
