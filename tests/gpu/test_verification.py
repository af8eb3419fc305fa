"""On the GPU itself: what Triton computes is judged, right passes, a planted wrong gradient is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dense_lab.space import Study
from dense_lab.study import RunSpec
from dense_lab.verification import KernelError, ensure, examine

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DENSE_LAB_CACHE", str(tmp_path))
    monkeypatch.delenv("DENSE_LAB_VERIFY", raising=False)


def runs(core: str) -> list[RunSpec]:
    said = {
        "model.core": core,
        "model.width": "64",
        "model.depth": "3",
        "model.dense": "{kind: densessm, span: 2}",
        "model.ffn": "swiglu",
        "model.dropout": "0.1",
        "data": "{kind: mqar, seq_len: 80, pairs: 4, vocab: 128}",
        "train.batch_tokens": "320",
    }
    return [Study.load(None, list(said.items())).point({})]


@pytest.mark.parametrize("core", ["retnet", "gau_retnet", "mamba"])
def test_every_kernel_of_a_core_is_right(core: str) -> None:
    found = examine(runs(core), "cuda", "training and decoding")
    wrong = [finding for finding in found if not finding.ok]
    assert not wrong, wrong
    assert {"triton"} == {finding.implementation for finding in found}
    assert {"bfloat16", "float32"} >= {finding.dtype for finding in found}


def test_a_planted_wrong_gradient_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from dense_lab_kernels.decay_attention import triton

    class Larger(torch.autograd.Function):
        """The identity, whose gradient is a tenth too large."""

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.1

    right = triton.decay_attention
    monkeypatch.setattr(triton, "decay_attention", lambda q, k, v, g, **rest: right(q, Larger.apply(k), v, g, **rest))
    with pytest.raises(KernelError, match="decay_attention/triton is wrong on this machine: dk is"):
        ensure(runs("retnet"), "cuda")
    assert ensure(runs("retnet"), "cuda", "unverified") == "unverified: decay_attention/triton"
