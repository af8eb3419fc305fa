"""The judge of implementations: it passes what is right and catches planted errors."""

from __future__ import annotations

import math

import pytest
import torch

from dense_lab_kernels._dispatch import ImplementationError
from dense_lab_kernels.decay_attention import chunked
from dense_lab_kernels.verify import deviations, verify


def arguments(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 40, 2, 8, generator=generator).to(dtype) for _ in range(3))
    return {"q": q, "k": k, "v": v, "log_decay": torch.tensor([-0.1, -0.01])}


class WrongGradient(torch.autograd.Function):
    """The identity, whose gradient is one part in a hundred too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_right_implementation_passes(dtype: torch.dtype) -> None:
    verdict = verify("decay_attention", "chunked", arguments(dtype))
    assert verdict.ok, verdict
    assert 0 < verdict.error <= verdict.allowed
    assert verdict[:4] == ("decay_attention", "chunked", "cpu", str(dtype).removeprefix("torch."))
    assert "q 1x40x2x8" in verdict.shapes


def test_a_planted_wrong_gradient_is_caught_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = chunked.decay_attention
    monkeypatch.setattr(
        chunked, "decay_attention", lambda q, k, v, g, **rest: right(q, WrongGradient.apply(k), v, g, **rest)
    )
    verdict = verify("decay_attention", "chunked", arguments())
    assert not verdict.ok
    assert verdict.worst == "dk"
    assert verdict.error > verdict.allowed


def test_a_planted_wrong_final_state_is_caught_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = chunked.decay_attention

    def wrong(*tensors, **rest):
        output, state = right(*tensors, **rest)
        return output, state + 1e-3 * state.detach()

    monkeypatch.setattr(chunked, "decay_attention", wrong)
    verdict = verify("decay_attention", "chunked", arguments())
    assert (verdict.ok, verdict.worst) == (False, "final_state")


def test_a_single_nan_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = chunked.decay_attention

    def wrong(*tensors, **rest):
        output, state = right(*tensors, **rest)
        hole = torch.zeros_like(output)
        hole[0, 0, 0, 0] = math.nan
        return output + hole, state

    monkeypatch.setattr(chunked, "decay_attention", wrong)
    verdict = verify("decay_attention", "chunked", arguments())
    assert (verdict.ok, verdict.worst) == (False, "output")
    assert math.isnan(verdict.error)


def test_a_missing_gradient_is_an_error() -> None:
    one = {"output": torch.ones(2)}
    with pytest.raises(ValueError, match="must agree"):
        deviations(one, {**one, "dq": torch.ones(2)}, one)


def test_what_cannot_run_says_so() -> None:
    with pytest.raises(ImplementationError, match="hand-made"):
        verify("decay_attention", "hand-made", arguments())
