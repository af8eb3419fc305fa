"""Dense connections on the recurrent state, on the GPU itself: kernels, recorded steps and recorded decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dense_lab.generation import Decoder
from dense_lab.model import LanguageModel, ModelSpec
from tests.gpu import test_graph as graphs

pytestmark = pytest.mark.gpu
DEVICE, VOCABULARY = "cuda", 61
FORMS = [
    ("mamba", "state_readout"),
    ("mamba", "state_carried"),
    ("retnet", "state_readout"),
    ("gau_retnet", "state_readout"),
]


def spec(core: str, site: str, **more: Any) -> ModelSpec:
    tree = {"width": 64, "depth": 4, "core": core, "dense": {"span": 2, "sites": [site]}, **more}
    return ModelSpec.model_validate(tree)


def build(core: str, site: str) -> LanguageModel:
    return spec(core, site).build(VOCABULARY).initialise(0).to(DEVICE)


def tokens(length: int) -> Tensor:
    return torch.randint(VOCABULARY, (3, length), generator=torch.Generator().manual_seed(0)).to(DEVICE)


def found_by(core: str, site: str, dtype: torch.dtype, kernels: dict[str, str]) -> tuple[Tensor, Tensor, set[Any]]:
    """Logits, the gradient of all parameters in one vector, and what ran."""
    model, ids = build(core, site), tokens(101)
    model.kernels = kernels
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        logits = model(ids).float()
    gradient = torch.autograd.grad(logits.square().mean(), list(model.parameters()))
    return logits.detach(), torch.cat([x.flatten() for x in gradient]), set(model.ran.items())


@pytest.mark.parametrize(("core", "site"), FORMS)
def test_kernels_are_as_accurate_as_references(core: str, site: str) -> None:
    """bf16: logits no more than twice as far from float32's as those of the references in bf16, in the median, since
    norms blow up the rounding of single tokens. float32: the gradient, to its rounding blown up a thousand times."""
    operation = "selective_scan" if core == "mamba" else "decay_attention"
    plain = {operation: "reference"}
    exact, exact_gradient, _ = found_by(core, site, torch.float32, plain)
    reference, *_ = found_by(core, site, torch.bfloat16, plain)
    found, gradient, ran = found_by(core, site, torch.bfloat16, {})
    assert (operation, "triton") in ran
    assert gradient.isfinite().all()
    error, allowed = (float((x - exact).abs().median()) for x in (found, reference))
    assert error <= 2 * allowed, (error, allowed)
    _, gradient, _ = found_by(core, site, torch.float32, {})
    assert float((gradient - exact_gradient).norm() / exact_gradient.norm()) < 1e-3


@pytest.mark.parametrize(("core", "site"), FORMS)
def test_recorded_and_eager_steps_are_equal_bit_for_bit(core: str, site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = spec(core, site, ffn="swiglu", dropout=0.1)
    monkeypatch.setattr(graphs, "build", lambda _: made.build(graphs.VOCABULARY).initialise(0).to(DEVICE))
    seen, model, step = graphs.trained(graphs.GraphStep, core, graphs.SEQUENCES)
    expected, eager, _ = graphs.trained(graphs.EagerStep, core, graphs.SEQUENCES)
    assert step.mode == "graph"
    assert [x.item() for x in seen] == [x.item() for x in expected]
    for (name, found), exact in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert torch.equal(found, exact), name


@pytest.mark.parametrize(("core", "site"), FORMS)
@torch.no_grad()
def test_recorded_decoding_follows_whole_passes(core: str, site: str) -> None:
    """States that kernels update in place are read by later layers: every token's logits, against one pass."""
    model, ids, generated = build(core, site).eval(), tokens(20), 12
    decoder = Decoder(model, ids)
    found = [decoder.token.clone()]
    found += [decoder.advance().clone() for _ in range(generated - 1)]
    assert decoder.mode == "graph"
    whole = model(torch.cat([ids, torch.stack(found, 1)], 1))[:, ids.shape[1] - 1 : -1]
    chosen = whole.gather(-1, torch.stack(found, 1)[..., None])[..., 0]
    # Greedy: what was chosen is the largest, to rounding of float32 states and TF32-free products.
    assert (whole.amax(-1) - chosen).max() < 1e-3 * whole.abs().max()
