"""The recorded step trains exactly as the eager one does, and says so when it cannot be recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dense_lab.corpus import IGNORED, Batch
from dense_lab.model import LanguageModel, ModelSpec
from dense_lab.study import TrainSpec
from dense_lab.training.device import Place
from dense_lab.training.graph import GraphNotUsed, GraphStep
from dense_lab.training.optimizer import build_optimizer
from dense_lab.training.step import EagerStep, StepFunction

pytestmark = pytest.mark.gpu
CORES = ["retnet", "gau_retnet", "mamba"]
SEQUENCES, TOKENS, VOCABULARY = 6, 96, 500


def build(core: str, dense: str = "densessm") -> LanguageModel:
    tree: dict[str, Any] = {"width": 64, "depth": 3, "core": core, "dense": dense, "ffn": "swiglu", "dropout": 0.1}
    return ModelSpec.model_validate(tree).build(VOCABULARY).initialise(0).to("cuda")


def batch_number(step: int, sequences: int = SEQUENCES) -> Batch:
    ids = torch.randint(VOCABULARY, (sequences, TOKENS + 1), generator=torch.Generator().manual_seed(step))
    targets = ids[:, 1:].contiguous()
    targets[: step % 3, ::2] = IGNORED  # Shares of the pieces change from step to step.
    if step == 5:
        targets[:2] = IGNORED  # A piece without any scored position.
    return Batch(ids[:, :-1].contiguous(), targets)


def trained(
    kind: type, core: str, micro_size: int, steps: int = 8
) -> tuple[list[torch.Tensor], LanguageModel, StepFunction]:
    model, spec = build(core), TrainSpec()
    place = Place(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16)
    step = kind(model, build_optimizer(model, spec), place, micro_size, spec.clip)
    torch.manual_seed(0)
    seen = []
    for number in range(steps):
        seen += step(batch_number(number), lr=1e-3 * (number + 1) / 3)
    return seen, model, step


@pytest.mark.parametrize("micro_size", [SEQUENCES, 2, 4])
@pytest.mark.parametrize("core", CORES)
def test_recorded_and_eager_steps_are_equal_bit_for_bit(core: str, micro_size: int) -> None:
    seen, model, step = trained(GraphStep, core, micro_size)
    expected, eager, _ = trained(EagerStep, core, micro_size)
    assert step.mode == "graph"
    assert [x.item() for x in seen] == [x.item() for x in expected]
    for (name, found), exact in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert torch.equal(found, exact), name


def test_a_batch_of_another_shape_is_trained_on_eagerly_and_loudly() -> None:
    _, _, step = trained(GraphStep, "retnet", SEQUENCES, steps=4)
    with pytest.warns(GraphNotUsed, match="a batch of shape"):
        assert step(batch_number(0, sequences=3), 1e-3).loss.isfinite()
    assert step.mode.startswith("eager: a batch of shape (3, 96)")
    assert step(batch_number(1), 1e-3).loss.isfinite()


def test_what_cannot_be_recorded_runs_eagerly_and_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    original = LanguageModel.loss

    def waits(self: LanguageModel, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = original(self, inputs, targets)
        return loss + 0 * loss.item()

    monkeypatch.setattr(LanguageModel, "loss", waits)
    expected, *_ = trained(EagerStep, "retnet", SEQUENCES)
    with pytest.warns(GraphNotUsed, match="runs eagerly"):
        seen, _, step = trained(GraphStep, "retnet", SEQUENCES)
    assert step.mode.startswith("eager: ")
    assert [x.item() for x in seen] == [x.item() for x in expected]
