"""Streams that a GPU leaves unfinished until their fusion: the same model as finishing them at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dense_lab.block import Block
from dense_lab.model import LanguageModel, ModelSpec

GAU, RETNET = {"kind": "gau_retnet", "heads": 2}, {"kind": "retnet", "heads": 2}
DENSE = {"kind": "densessm", "span": 2}


def built(**spec: Any) -> LanguageModel:
    model = ModelSpec.model_validate({"width": 16, "depth": 4, "dense": DENSE, **spec}).build(11).initialise(0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # Where scales of 1 would hide a mistake.
        parameter.data += torch.randn(parameter.shape, generator=generator) / 8
    return model.double()


def ran(model: LanguageModel) -> dict[str, torch.Tensor]:
    ids = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0))
    first = model.run(ids[:, :5])
    logits = torch.cat([first.logits, model.run(ids[:, 5:], first.state).logits], 1)
    logits.log_softmax(-1)[..., 3].sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"logits": logits, **gradients}


def transition(gate: dict[str, Any]) -> dict[str, Any]:
    return {**DENSE, "transition": {"kind": "gated", "gate": gate}}


@pytest.mark.parametrize(
    ("spec", "raw"),
    [
        ({"core": GAU}, {"k", "v"}),
        ({"core": RETNET}, {"k", "v"}),
        ({"core": GAU, "dense": {**DENSE, "norm": "none", "sites": ("v",), "owners": "every"}}, {"v"}),
        (
            {"core": GAU, "dense": transition({"kind": "mlp", "sharing": "per_source", "activation": "sigmoid"})},
            {"k", "v"},
        ),
        ({"core": GAU, "dense": transition({"kind": "linear"})}, {"k", "v"}),
        ({"core": GAU, "dense": transition({"kind": "none"})}, {"k", "v"}),
        ({"core": GAU, "dense": {**DENSE, "fusion": "concat"}}, set()),
        ({"core": GAU, "dense": {**DENSE, "transition": {"kind": "gated", "projection": "linear"}}}, set()),
        ({"core": GAU, "dense": {**DENSE, "pattern": {"kind": "dilated"}}}, {"k", "v"}),
    ],
    ids=lambda value: "-".join(sorted(value)) if isinstance(value, set) else None,
)
def test_finished_late_or_at_once(spec: dict[str, Any], raw: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(**spec)
    assert {name for block in model.blocks for name in block.raw} == raw
    at_once = ran(model)
    monkeypatch.setattr(Block, "_left_raw", lambda block, *_: block.raw)
    late = ran(model)
    assert at_once.keys() == late.keys()
    for name, tensor in at_once.items():
        torch.testing.assert_close(late[name], tensor, rtol=1e-9, atol=1e-11, msg=name)


def test_cores_that_do_unlike_things_to_a_stream() -> None:
    """RetNet's keys have the scale of another head width, and no activation."""
    blocks = [{"core": {**RETNET, "value_factor": 2}}, {"core": {**GAU, "key_factor": 1.0}, "repeat": 2}]
    model = ModelSpec.model_validate({"width": 16, "dense": DENSE, "blocks": blocks}).build(11)
    assert [block.raw for block in model.blocks] == [set(), set(), set()]
