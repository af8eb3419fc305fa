"""The official DenseRetNet as one choice among ours: whole model, both forms, states, loss and gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dense_lab.interop import load_checkpoint
from dense_lab.model import LanguageModel
from dense_lab_kernels.rotate.reference import turn
from dense_lab_plugins.cores import retention
from dense_lab_plugins.cores.retention import RetentionState
from tests.parity.checkpoints import their_names, write_dense_gau
from tests.parity.golden import Golden, difference

DTYPES = [torch.float64, torch.float32]


@pytest.fixture(params=["dense_gau_m1", "dense_gau_m2"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


@pytest.fixture
def model(golden: Golden, tmp_path: Path) -> LanguageModel:
    write_dense_gau(tmp_path, golden)
    return load_checkpoint(tmp_path)


def official_parallel(
    q: Tensor, k: Tensor, v: Tensor, state: RetentionState | None, query_activation: str
) -> tuple[Tensor, None]:
    """The official parallel form, whose rows are also divided by clip(sum of |scores|, 1, 5e4), constant backwards."""
    q = torch.nn.functional.silu(q) if query_activation == "silu" else q
    tokens, heads = q.shape[1:3]
    time = torch.arange(tokens, dtype=torch.float64)
    log_gamma = torch.log1p(-(2.0 ** (-5 - torch.arange(heads, dtype=torch.float64))))
    fade = torch.exp((time[:, None] - time) * log_gamma[:, None, None]).tril()  # [H, T, T]
    fade = fade / fade.sum(-1, keepdim=True).sqrt()
    theta = 10000.0 ** -torch.linspace(0, 1, q.shape[-1] // 2, dtype=torch.float64)
    phasors = torch.polar(torch.ones(1, dtype=torch.float64), time[:, None, None] * theta)
    q, k = (turn(x.double(), phasors).transpose(1, 2) for x in (q, k))
    scores = q @ k.mT * fade
    scores = scores / scores.detach().abs().sum(-1, keepdim=True).clamp(1, 5e4)
    return (scores @ v.double().transpose(1, 2)).transpose(1, 2).to(v.dtype), None


@pytest.mark.parametrize("dtype", DTYPES)
def test_recurrent_form(golden: Golden, model: LanguageModel, dtype: torch.dtype) -> None:
    """One pass, and token by token, give what the official recurrent form gives."""
    model, ids, expected = model.to(dtype), golden["input_ids"].long(), golden["logits_recurrent"]
    tolerance = golden.tolerance(torch.ones((), dtype=torch.float64), dtype, "f32_recurrent")
    with torch.no_grad():
        assert difference(model(ids), expected) < tolerance * float(expected.abs().max())
        state, logits = None, []
        for token in ids.T:
            out = model.step(token, state)
            state = out.state
            logits.append(out.logits)
    assert difference(torch.stack(logits, 1), expected) < tolerance * float(expected.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_state(golden: Golden, model: LanguageModel, dtype: torch.dtype) -> None:
    """The state of the first layer; the official one is value-major, normalised, and one position behind."""
    model, ids = model.to(dtype), golden["input_ids"].long()
    with torch.no_grad():
        state = model.run(ids).state[0]
    assert int(state.position) == ids.shape[1]
    scale = golden["rec_scale_last"].sqrt()[:, None, None]
    # Keys at position t instead of t - 1: one more step of the rotation.
    step = torch.polar(torch.ones(1, dtype=torch.float64), 10000.0 ** -torch.linspace(0, 1, 8, dtype=torch.float64))
    official = golden["rec_state_last_layer0"].double().permute(0, 1, 3, 2) * scale  # [B, H, K, V]
    turned = turn(official.mT, step).mT
    # Stored in float32, as `float()` says.
    assert difference(state.matrix, turned) < golden.tolerance(turned.float(), dtype, "f32_recurrent")


def loss_and_gradients(model: LanguageModel, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean next-token loss, and gradients by the official names."""
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    loss.backward()
    # The official embedding has a padding_idx: token 0 learns nothing.
    model.embedding.weight.grad[0] = 0
    theirs = their_names(model)
    return loss.detach(), {theirs[name]: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", DTYPES)
def test_parallel_form_with_the_official_normaliser(
    golden: Golden, model: LanguageModel, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the normaliser of the rows is equal tightly: layer inputs, logits, loss and every gradient."""
    monkeypatch.setattr(retention, "retention", official_parallel)
    model, ids = model.to(dtype), golden["input_ids"].long()
    entered: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: entered.append(sum(x for x in args[:2] if x is not None)))
    features, _ = model.features(ids)
    seen = {"hidden_in": torch.stack(entered), "final_normed": features, "logits_parallel": model.head(features)}
    for name, got in seen.items():
        assert difference(got, golden[name]) < golden.tolerance(golden[name], dtype, "f32_parallel"), name

    loss, gradients = loss_and_gradients(model, ids)
    assert difference(loss, golden["loss"]) < golden.tolerance(golden["loss"], dtype, "f32_parallel")
    for name, norm in zip(golden.arrays["grad_norm_names"], golden["grad_norms"], strict=True):
        got = gradients[name].norm() if name in gradients else torch.zeros(())
        assert difference(got, norm) < golden.tolerance(norm, dtype, "f32_parallel"), name
    for name in golden.names("grad:"):
        expected = golden[f"grad:{name}"]
        assert difference(gradients[name], expected) < golden.tolerance(expected, dtype, "f32_parallel"), name


def test_parallel_form_at_its_gap(golden: Golden, model: LanguageModel) -> None:
    """Ours differs from the official parallel form as the official recurrent one does, and no more."""
    model, ids = model.double(), golden["input_ids"].long()
    gap = golden.measured["parallel_vs_recurrent"]
    assert difference(model(ids), golden["logits_parallel"]) < 1.001 * gap
    loss, gradients = loss_and_gradients(model, ids)
    # A change of all logits by up to `gap` moves the loss by up to twice as much.
    assert difference(loss, golden["loss"]) < 2 * gap
    for name in golden.names("grad:"):
        expected = golden[f"grad:{name}"]
        assert difference(gradients[name], expected) < 10 * gap * max(1.0, float(expected.abs().max())), name


def test_first_layer_owns_what_no_gradient_reaches(golden: Golden, model: LanguageModel) -> None:
    """As in the official model, so that its checkpoints load and its size is right."""
    _, gradients = loss_and_gradients(model.double(), golden["input_ids"].long())
    missing = set(their_names(model).values()) - set(gradients)
    parts = ("k_select.fc1", "k_select.fc2", "v_select.fc1", "v_select.fc2", "k_norm", "v_norm")
    assert missing == {f"model.layers.0.self_attn.{part}.weight" for part in parts}
