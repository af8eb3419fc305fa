"""The loop as a whole: what it writes, how it goes on after an interruption, how it ends when it cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dense_lab.errors import InputError, MachineError
from dense_lab.study import RunSpec
from dense_lab.training import Evaluation, Pruned, TrialFailed, loop, train
from dense_lab.training.step import EagerStep

Small = Callable[..., RunSpec]
TIMES = {"seconds", "step_seconds", "tokens_per_second", "peak_memory_bytes"}
CPU = {"device": "cpu", "threads": 1}


def lines(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the clock."""
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in read]


def untimed(metrics: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if key not in TIMES}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoint" / "model.safetensors")


def test_what_a_run_leaves_behind(small: Small, tmp_path: Path) -> None:
    seen: list[Evaluation] = []
    spec, folder = small(), tmp_path / "run"
    result = train(spec, folder, on_evaluation=seen.append, **CPU)
    assert [(e.step, e.tokens) for e in seen] == [(8, 512), (16, 1024), (24, 1536)]
    assert seen[-1].metrics["valid/loss"] < seen[0].metrics["valid/loss"]
    assert set(result.metrics) == {
        *("train/loss", "train/lr", "train/gradient_norm", "valid/loss", "valid/loss_best", "test/loss"),
        *("tokens_per_second", "step_seconds", "seconds", "peak_memory_bytes"),
        *("parameters", "embedding_parameters", "flops_per_token", "state_bytes"),
    }
    assert set(result.tags) == {
        *("seed", "spec", "data", "batches", "commit", "plugins", "device", "dtype", "implementations", "step"),
        *("host", "cpu", "pid", "torch", "triton", "numba", "python", "kernels.verified", "dense_lab", "code"),
    }
    assert result.tags["implementations"].startswith("decay_attention=")
    assert result.tags["device"] == "cpu (1 threads)"
    assert result.tags["step"] == "eager: no GPU"
    stored = json.loads((folder / "result.json").read_text())
    assert (stored["status"], stored["reason"], stored["metrics"]) == ("complete", "", result.metrics)
    said = json.loads((folder / "spec.json").read_text())
    assert said["digest"] == result.tags["spec"]
    assert RunSpec.model_validate({k: v for k, v in said.items() if k not in ("digest", "plugins")}) == spec
    assert [line["step"] for line in lines(folder)] == list(range(1, 25))
    assert {path.name for path in folder.iterdir()} == {"spec.json", "metrics.jsonl", "result.json", "checkpoint"}


def test_a_complete_run_is_not_trained_again(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(small(), tmp_path / "run", **CPU)
    monkeypatch.setattr(loop, "Run", None)
    assert train(small(), tmp_path / "run", **CPU) == first


@pytest.mark.parametrize("killed_at", [1, 2])
@pytest.mark.parametrize("changes", [{}, {"train.micro_batch_tokens": 32}])
def test_an_interrupted_run_goes_on_bit_for_bit(
    small: Small, tmp_path: Path, killed_at: int, changes: dict[str, Any]
) -> None:
    spec = small({"train.checkpoints": 4, **changes})  # after steps 5, 10, 14, 19; dropout is on
    whole = train(spec, tmp_path / "whole", **CPU)
    evaluations = 0

    def kill(_: Evaluation) -> None:
        nonlocal evaluations
        evaluations += 1
        if evaluations == killed_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(spec, tmp_path / "cut", on_evaluation=kill, **CPU)
    assert not (tmp_path / "cut" / "result.json").exists()
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "tok')  # The process died while it wrote.
    torch.rand(3)  # The random state of the process that goes on is another one.
    resumed = train(spec, tmp_path / "cut", **CPU)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert untimed(resumed.metrics) == untimed(whole.metrics)
    assert resumed.tags["batches"] == whole.tags["batches"]
    ours, theirs = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_training_leaves_the_random_state_of_the_process_alone(small: Small, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    train(small(), tmp_path / "run", **CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_arms_with_one_seed_see_the_same_batches(small: Small, tmp_path: Path) -> None:
    arms = {
        "plain": {},
        "dense": {"model.dense": {"kind": "densessm", "span": 1}},
        "wide": {"model.width": 32, "train.lr": 0.01},
        "pieces": {"train.micro_batch_tokens": 16},
        "seed": {"seed": 1},
    }
    batches = {name: train(small(arm), tmp_path / name, **CPU).tags["batches"] for name, arm in arms.items()}
    assert batches["plain"] == batches["dense"] == batches["wide"] == batches["pieces"]
    assert batches["seed"] != batches["plain"]


def test_a_pruned_run_says_so(small: Small, tmp_path: Path) -> None:
    def prune(_: Evaluation) -> None:
        raise Pruned("worse than the median")

    result = train(small(), tmp_path / "run", on_evaluation=prune, **CPU)
    assert (result.status, result.reason) == ("pruned", "worse than the median")
    assert "valid/loss" in result.metrics
    assert "test/loss" not in result.metrics


def test_no_test_without_test_text(small: Small, tmp_path: Path) -> None:
    for name, changes in (("tokens", {"train.test_tokens": 0}), ("text", {"data.test": 0})):
        assert "test/loss" not in train(small(changes), tmp_path / name, **CPU).metrics


def test_accuracy_is_reported_for_recall(small: Small, tmp_path: Path) -> None:
    spec = small({"data": {"kind": "mqar", "seq_len": 16, "pairs": 2, "vocab": 32}})
    metrics = train(spec, tmp_path / "run", **CPU).metrics
    assert 0 <= metrics["valid/accuracy"] <= 1
    assert 0 <= metrics["test/accuracy"] <= 1


def test_accuracy_of_several_sizes_is_their_mean(small: Small, tmp_path: Path) -> None:
    tests = [{"seq_len": 16, "pairs": 2}, {"seq_len": 32, "pairs": 4}]
    data = {"kind": "mqar", "seq_len": 16, "pairs": 2, "vocab": 64, "tests": tests}
    metrics = train(small({"data": data}), tmp_path / "run", **CPU).metrics
    parts = [metrics[f"test/accuracy_{task}"] for task in ("16-2", "32-4")]
    assert metrics["test/accuracy"] == pytest.approx(sum(parts) / 2, abs=1e-12)


def test_a_loss_that_is_no_number(small: Small, tmp_path: Path) -> None:
    with pytest.raises(TrialFailed, match=r"loss is (nan|inf) at step \d+ of 24 \(lr 1e\+30\); last good step \d"):
        train(small({"train.lr": 1e30, "train.clip": None, "train.warmup": 0}), tmp_path / "run", **CPU)
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    assert stored["status"] == "failed"
    assert "last good step" in stored["reason"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
    ],
)
def test_whatever_a_component_does_is_a_failed_trial(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    class Broken(EagerStep):
        def __call__(self, batch, lr):
            if lr < 2e-3:
                raise error
            return super().__call__(batch, lr)

    monkeypatch.setattr(loop, "build_step", Broken)
    with pytest.raises(TrialFailed, match=f"{said}.*last good step 9"):
        train(small({"train.warmup": 0}), tmp_path / "run", **CPU)
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    assert stored["status"] == "failed"
    assert said in stored["reason"]
    assert stored["metrics"]["train/loss"] > 0
    monkeypatch.undo()
    assert train(small({"train.warmup": 0}), tmp_path / "run", **CPU).status == "complete"


def test_a_spec_that_does_not_fit_together(small: Small, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"width 16 .* must divide into 3 heads"):
        train(small({"model.core": {"kind": "retnet", "heads": 3}}), tmp_path / "run", **CPU)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"


def test_an_implementation_that_does_not_exist(small: Small, tmp_path: Path) -> None:
    with pytest.raises(TrialFailed, match="impl='fastest' cannot run here"):
        train(small({"kernels": {"decay_attention": "fastest"}}), tmp_path / "run", **CPU)


def test_a_folder_with_another_run(small: Small, tmp_path: Path) -> None:
    train(small(), tmp_path / "run", **CPU)
    with pytest.raises(InputError, match="holds another run"):
        train(small({"seed": 1}), tmp_path / "run", **CPU)


def test_devices(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(MachineError, match="'cuda' was asked for, but torch sees 0 GPUs"):
        train(small(), tmp_path / "run", device="cuda")
    with pytest.raises(MachineError, match="bf16 needs a GPU"):
        train(small({"train.precision": "bf16"}), tmp_path / "run", device="cpu")
    with pytest.raises(InputError, match="no device named 'tpu'"):
        train(small(), tmp_path / "run", device="tpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
def test_a_gpu_run_uses_bf16_and_agrees_with_the_cpu(small: Small, tmp_path: Path) -> None:
    spec = small({"model.dropout": 0.0})
    result = train(spec, tmp_path / "gpu", device="cuda")
    assert result.tags["dtype"] == "bfloat16"
    assert result.tags["step"] == "graph"
    assert result.tags["device"].startswith("cuda:0 (")
    on_cpu = train(spec, tmp_path / "cpu", **CPU)
    assert result.tags["batches"] == on_cpu.tags["batches"]
    # bf16 has 8 bits: 2^-8 of the loss, which 24 steps of training may pass on a few times.
    assert result.metrics["valid/loss"] == pytest.approx(on_cpu.metrics["valid/loss"], rel=8 * 2**-8)
    assert result.metrics["tokens_per_second"] > 0
