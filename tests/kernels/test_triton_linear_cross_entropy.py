"""linear_cross_entropy in pieces, by torch and by Triton: loss and gradients against float64."""

from __future__ import annotations

import os

import pytest
import torch
from accuracy import as_dtype, assert_as_accurate, run_with_gradients

from dense_lab_kernels.linear_cross_entropy import chunked, linear_cross_entropy

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU and not INTERPRETED else "cpu"
IMPLEMENTATIONS = [
    "chunked",
    pytest.param(
        "triton", marks=pytest.mark.skipif(not (INTERPRETED or GPU), reason="needs TRITON_INTERPRET=1 or a GPU")
    ),
]
# The interpreter computes bf16 wrongly; on a GPU bf16 is what matters.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
pytestmark = [pytest.mark.usefixtures("poisoned_empty"), pytest.mark.parametrize("impl", IMPLEMENTATIONS)]


def targets_of(rows: int, vocabulary: int) -> torch.Tensor:
    targets = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(1))
    targets[1::3] = -100
    return targets.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(1, 4, 7), (13, 16, 100), (6, 8, 4099)])
def test_loss_and_gradients(
    rows: int, width: int, vocabulary: int, dtype: torch.dtype, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "_PIECE", vocabulary * 5 * dtype.itemsize)  # Pieces of five rows.
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "x": torch.randn(rows, width, generator=generator, dtype=torch.float64).to(DEVICE),
        "weight": torch.randn(vocabulary, width, generator=generator, dtype=torch.float64).to(DEVICE) / width**0.5,
    }
    targets = targets_of(rows, vocabulary)

    def run(name: str, kind: torch.dtype) -> dict[str, torch.Tensor]:
        rounded = as_dtype(as_dtype(inputs, dtype), kind)
        return run_with_gradients(lambda **x: linear_cross_entropy(**x, targets=targets, impl=name), rounded)

    assert_as_accurate(run(impl, dtype), run("reference", dtype), run("reference", torch.float64))


def test_nothing_scored_is_no_loss(impl: str) -> None:
    x = torch.randn(4, 8, device=DEVICE, requires_grad=True)
    weight = torch.randn(5, 8, device=DEVICE, requires_grad=True)
    loss = linear_cross_entropy(x, weight, torch.full((4,), -100, device=DEVICE), impl=impl)
    loss.backward()
    assert loss.item() == 0
    assert not x.grad.any()
    assert not weight.grad.any()


def test_extreme_logits(impl: str) -> None:
    """A row of equal logits far below zero, and one that is all but certain."""
    x = torch.tensor([[-300.0], [300.0]], device=DEVICE)
    weight = torch.tensor([[1.0], [1.0], [0.5]], device=DEVICE)
    targets = torch.tensor([2, 0], device=DEVICE)
    found, exact = (linear_cross_entropy(x, weight, targets, impl=name) for name in (impl, "reference"))
    torch.testing.assert_close(found, exact)
