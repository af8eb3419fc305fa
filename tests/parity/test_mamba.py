"""Mamba-1: the authors' inner function, and transformers' whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dense_lab.interop import load_checkpoint
from dense_lab.model import LanguageModel
from dense_lab_plugins.cores.mamba import Mamba
from tests.parity.checkpoints import mamba_parts, their_names, write
from tests.parity.golden import Golden, difference
from tests.parity.test_dense_gau import DTYPES


@pytest.mark.parametrize("dtype", DTYPES)
def test_inner(dtype: torch.dtype) -> None:
    """Everything behind the input map, forward and gradients."""
    golden = Golden("mamba1_inner")
    meta = golden.meta
    spec = Mamba(
        state=meta["d_state"],
        conv_width=meta["d_conv"],
        dt_rank=meta["dt_rank"],
        expand=meta["d_inner"] / meta["d_model"],
    )
    core = spec.build(meta["d_model"])
    weights = {
        "conv_weight": golden["conv1d_weight"].squeeze(1),
        "conv_bias": golden["conv1d_bias"],
        "x_proj.weight": golden["x_proj_weight"],
        "dt_proj.weight": golden["delta_proj_weight"],
        "dt_proj.bias": golden["delta_bias"],
        "out_proj.weight": golden["out_proj_weight"],
        "A_log": torch.log(-golden["A"].double()),
        "D": golden["D"],
    }
    core = core.to(torch.float64)
    # The golden input is what comes out of the input map.
    core.in_proj = torch.nn.Linear(2 * meta["d_inner"], 2 * meta["d_inner"], bias=False)
    core.load_state_dict({**weights, "in_proj.weight": torch.eye(2 * meta["d_inner"])})
    core = core.to(dtype)
    xz = golden["xz"].mT.to(dtype).requires_grad_()  # [B, L, 2 D]
    out, _ = core(xz)
    assert difference(out, golden["out"]) < golden.tolerance(golden["out"], dtype, "f32")

    out.backward(golden["dout"].to(dtype))
    gradients = {name: parameter.grad for name, parameter in core.named_parameters() if name != "in_proj.weight"}
    expected = {
        "conv_weight": golden["dconv1d_weight"].squeeze(1),
        "conv_bias": golden["dconv1d_bias"],
        "x_proj.weight": golden["dx_proj_weight"],
        "dt_proj.weight": golden["ddelta_proj_weight"],
        "dt_proj.bias": golden["ddelta_bias"],
        "out_proj.weight": golden["dout_proj_weight"],
        "A_log": golden["dA"] * golden["A"],  # dA / dA_log = A
        "D": golden["dD"],
    }
    assert set(gradients) == set(expected)
    for name, gradient in expected.items():
        assert difference(gradients[name], gradient) < golden.tolerance(gradient, dtype, "f32"), name
    assert difference(xz.grad.mT, golden["dxz"]) < golden.tolerance(golden["dxz"], dtype, "f32")


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("mamba1_hf_lm")


@pytest.fixture
def model(golden: Golden, tmp_path: Path) -> LanguageModel:
    write(tmp_path, *mamba_parts(golden))
    return load_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_model(golden: Golden, model: LanguageModel, dtype: torch.dtype) -> None:
    """Logits, the output of every layer, loss and gradients."""
    model, ids = model.to(dtype), golden["input_ids"].long()
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, out: outputs.append(out[0] + out[1]))
    features, _ = model.features(ids)
    logits = model.head(features)
    assert difference(logits, golden["logits"]) < golden.tolerance(golden["logits"], dtype, "f32")
    for got, expected in zip([*outputs, features], golden["hidden_states"], strict=True):
        assert difference(got, expected) < golden.tolerance(expected, dtype, "f32")

    loss = model.loss(ids[:, :-1], ids[:, 1:])
    assert difference(loss, golden["loss"]) < golden.tolerance(golden["loss"], dtype, "f32")
    loss.backward()
    theirs = their_names(model, "mamba")
    gradients = {theirs[name]: parameter.grad for name, parameter in model.named_parameters()}
    for name, norm in zip(golden.arrays["grad_norm_names"], golden["grad_norms"], strict=True):
        assert difference(gradients[name].norm(), norm) < golden.tolerance(norm, dtype, "f32"), name
    for name in golden.names("grad:"):
        expected = golden[f"grad:{name}"]
        got = gradients[name].reshape(expected.shape)
        assert difference(got, expected) < golden.tolerance(expected, dtype, "f32"), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding(golden: Golden, model: LanguageModel, dtype: torch.dtype) -> None:
    """Prefill and then token by token, and the states after the last token."""
    model, ids, prefill = model.to(dtype), golden["input_ids"].long(), golden.meta["prefill"]
    with torch.no_grad():
        out = model.run(ids[:, :prefill])
        logits = [out.logits]
        for token in ids[:, prefill:].T:
            out = model.step(token, out.state)
            logits.append(out.logits[:, None])
    expected = golden["logits_cached"]
    assert difference(torch.cat(logits, 1), expected) < golden.tolerance(expected, dtype, "f32")
    for layer, state in enumerate(out.state):
        conv, ssm = golden["conv_state_last"][layer], golden["ssm_state_last"][layer]
        # Theirs holds the current input too.
        assert difference(state.conv, conv[..., 1:]) < golden.tolerance(conv, dtype, "f32"), layer
        assert difference(state.ssm, ssm) < golden.tolerance(ssm, dtype, "f32"), layer
