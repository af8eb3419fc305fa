"""The loop's parts by themselves: plan, learning rate, parameter groups, accumulation, metric, files."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from math import nan
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dense_lab.components import Core
from dense_lab.corpus import IGNORED, Batch
from dense_lab.errors import InputError
from dense_lab.modules import CoreModule
from dense_lab.study import RunSpec, TrainSpec
from dense_lab.training.device import Place
from dense_lab.training.evaluate import evaluate, example_accuracy
from dense_lab.training.optimizer import build_optimizer, undecayed
from dense_lab.training.record import Recorder
from dense_lab.training.schedule import learning_rate, plan
from dense_lab.training.step import EagerStep, StepClock

CPU = Place(torch.device("cpu"), torch.float32)


class TestPlan:
    def test_a_budget_in_steps(self) -> None:
        spec = TrainSpec(tokens="10k", batch_tokens=1000, micro_batch_tokens=300, evaluations=4, checkpoints=1)
        found = plan(spec, seq_len=128)
        # 7 sequences of 128 are 896 tokens; 11 such batches fit into 10,000 tokens.
        assert (found.batch_size, found.micro_size, found.steps, found.tokens_per_step) == (7, 2, 11, 896)
        assert sorted(found.evaluations) == [3, 6, 8, 11]
        assert sorted(found.checkpoints) == [6]
        assert found.logs == frozenset(range(1, 12))

    def test_few_lines_for_many_steps(self) -> None:
        found = plan(TrainSpec(tokens="100M", batch_tokens=1024, checkpoints=3), seq_len=128)
        assert found.steps == 97656
        assert 100 <= len(found.logs) <= 112
        assert found.logs >= found.evaluations | found.checkpoints
        assert max(found.evaluations) == found.steps
        assert len(found.checkpoints) == 3

    @pytest.mark.parametrize(
        ("wrong", "said"),
        [
            ({"batch_tokens": 64}, "train.batch_tokens: 64 tokens are less than one sequence of 128"),
            ({"micro_batch_tokens": 64}, "train.micro_batch_tokens: 64"),
            ({"tokens": 4000}, "train.tokens: 4000 tokens are less than one batch of 4096"),
        ],
    )
    def test_budgets_that_hold_nothing(self, wrong: dict[str, int], said: str) -> None:
        with pytest.raises(InputError, match=said):
            plan(TrainSpec(**wrong), seq_len=128)


class TestLearningRate:
    @pytest.mark.parametrize(
        ("schedule", "middle", "end"),
        [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("wsd", 1, 0.1), ("constant", 1, 1)],
    )
    def test_warm_up_middle_and_end(self, schedule: str, middle: float, end: float) -> None:
        spec = TrainSpec(lr=2.0, schedule=schedule, warmup=0.2, lr_end=0.1, decay=0.25)
        rates = [learning_rate(spec, step, 100) / 2 for step in range(1, 101)]
        assert rates[:20] == pytest.approx([i / 20 for i in range(1, 21)])
        assert rates[59] == pytest.approx(middle)
        assert rates[-1] == pytest.approx(end)
        assert rates[19:] == sorted(rates[19:], reverse=True)

    def test_wsd_falls_in_its_last_part(self) -> None:
        spec = TrainSpec(lr=1.0, schedule="wsd", warmup=0, decay=0.2, lr_end=0)
        rates = [learning_rate(spec, step, 10) for step in range(1, 11)]
        assert rates == pytest.approx([1] * 8 + [0.5, 0])

    def test_all_warm_up(self) -> None:
        assert learning_rate(TrainSpec(lr=1.0, warmup=1), 10, 10) == 1


def test_weight_decay_spares_embeddings_vectors_and_what_a_core_declares() -> None:
    class Module(CoreModule):
        streams = ()

        def __init__(self) -> None:
            super().__init__()
            self.A_log = torch.nn.Parameter(torch.zeros(4, 4))
            self.mixer = torch.nn.Linear(4, 4)

        def undecayed(self) -> set[str]:
            return {"A_log"}

    class Odd(Core):
        kind: str = "odd"

        def build(self, width: int) -> CoreModule:
            return Module()

    spec = RunSpec.model_validate({"model": {"width": 4, "depth": 1, "head": "untied", "core": Odd()}})
    model = spec.model.build(11)
    spared = {
        "embedding.weight",
        "norm.weight",
        "blocks.0.norm.weight",
        "blocks.0.core.A_log",
        "blocks.0.core.mixer.bias",
    }
    assert undecayed(model) == spared
    groups = build_optimizer(model, TrainSpec(weight_decay=0.3)).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert decay == {name: 0.0 if name in spared else 0.3 for name in names.values()}
    tied = RunSpec.model_validate({"model": {"width": 4, "depth": 1, "core": Odd()}}).model.build(11)
    assert "head.weight" not in dict(tied.named_parameters())


def test_the_optimiser_is_that_of_torch() -> None:
    spec = TrainSpec(weight_decay=0.3)
    gradients = [[torch.randn(4, 3), torch.randn(3)] for _ in range(4)]
    gradients[1][1] = None  # A parameter without a gradient stays where it is.

    def trained(kind: str) -> list[torch.Tensor]:
        model = torch.nn.Linear(3, 4)
        weights = [model.weight, torch.nn.Parameter(torch.ones(3))]
        model.scale = weights[1]
        model.weight.data.copy_(torch.arange(12.0).view(4, 3))
        model.bias.requires_grad_(False)
        optimizer = build_optimizer(model, spec)
        if kind == "torch":
            groups = [{**group} for group in optimizer.param_groups]
            optimizer = torch.optim.AdamW(groups, lr=spec.lr, betas=(spec.beta1, spec.beta2), fused=True)
        for number, pair in enumerate(gradients):
            for weight, gradient in zip(weights, pair, strict=True):
                weight.grad = gradient
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (number + 1)
            optimizer.step()
            optimizer.zero_grad()
        assert all(weight.grad is None for weight in weights)
        moments = [optimizer.state[weight][key] for weight in weights for key in ("step", "exp_avg", "exp_avg_sq")]
        return [*weights, *moments]

    for ours, theirs in zip(trained("ours"), trained("torch"), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("micro_size", [1, 2, 3])
def test_pieces_of_a_batch_give_the_gradient_of_the_whole(micro_size: int) -> None:
    spec = RunSpec.model_validate({"model": {"width": 16, "depth": 1, "core": {"kind": "retnet", "heads": 2}}})
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(20, (5, 8), generator=generator)
    targets = torch.randint(20, (5, 8), generator=generator)
    targets[0, 1:] = targets[2, 3:] = targets[3] = IGNORED  # Pieces with few scored positions and one with none.

    def step(size: int) -> tuple[float, float, list[torch.Tensor]]:
        model = spec.model.build(20).initialise(0).double()
        # SGD at rate 1 without momentum: the change of the weights is the gradient itself.
        optimizer = torch.optim.SGD(model.parameters())
        before = [p.detach().clone() for p in model.parameters()]
        output = EagerStep(model, optimizer, CPU, size, clip=None)(Batch(inputs, targets), lr=1.0)
        changes = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
        return output.loss.item(), output.gradient_norm.item(), changes

    loss, norm, changes = step(5)
    loss_in_pieces, norm_in_pieces, changes_in_pieces = step(micro_size)
    # The model computes its loss in fp32 (2^-24), whatever its weights.
    assert loss_in_pieces == pytest.approx(loss, rel=1e-6)
    assert norm_in_pieces == pytest.approx(norm, rel=1e-6)
    for ours, theirs in zip(changes_in_pieces, changes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * norm)


def test_a_split_without_batches_has_no_accuracy() -> None:
    corpus = SimpleNamespace(eval_batches=lambda *_: iter(()), scores_accuracy=True)
    found = evaluate(torch.nn.Identity(), corpus, "test", 4, 0, CPU)
    assert found == {"test/loss": pytest.approx(nan, nan_ok=True), "test/accuracy": pytest.approx(nan, nan_ok=True)}


def test_accuracy_is_the_reference_metric() -> None:
    stored = np.load(Path(__file__).parents[1] / "oracles" / "metric_zoology.npz", allow_pickle=False)
    logits, targets = torch.from_numpy(stored["logits"]), torch.from_numpy(stored["targets"]).long()
    found = example_accuracy(logits, targets).double()
    np.testing.assert_allclose(found.numpy(), stored["per_example_accuracy"], rtol=1e-6)
    assert found.mean().item() == pytest.approx(float(stored["accuracy"]), rel=1e-6)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    assert loss.item() == pytest.approx(float(stored["loss"]), rel=1e-5)


@pytest.mark.parametrize(("steps", "timed"), [(1, 1), (8, 6), (100, 90)])
def test_the_first_steps_are_not_timed_unless_there_are_few(
    steps: int, timed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)) ** 2)
    clock = StepClock(CPU.device, steps)
    assert clock.median() is None
    for _ in range(steps):
        clock.lap()
    # Lap i lasts i^2 - (i - 1)^2 = 2 i - 1 seconds.
    laps = [2 * i - 1 for i in range(steps - timed + 1, steps + 1)]
    assert clock.median() == statistics.median(laps)


class TestRecorder:
    def test_lines_after_a_checkpoint_are_cut(self, tmp_path: Path, small: Callable[..., RunSpec]) -> None:
        recorder = Recorder(tmp_path)
        recorder.begin(small(), {"builtin": "1"})
        for step in (1, 2, 3):
            recorder.add({"step": step, "train/loss": 1 / step})
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 4, "train/lo')
        recorder.keep_until(2)
        recorder.add({"step": 3, "train/loss": 0.5})
        read = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert read == [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 0.5}, {"step": 3, "train/loss": 0.5}]

    def test_results_come_back(self, tmp_path: Path) -> None:
        recorder = Recorder(tmp_path)
        assert recorder.result() is None
        written = recorder.end("failed", "why", {"seconds": 1.5}, {"seed": "0"})
        assert recorder.result() == written

    def test_versions_of_plugins_make_another_run(self, tmp_path: Path, small: Callable[..., RunSpec]) -> None:
        Recorder(tmp_path).begin(small(), {"builtin": "1"})
        with pytest.raises(InputError, match="holds another run"):
            Recorder(tmp_path).begin(small(), {"builtin": "2"})
