"""add_rms_norm in Triton: both results and every gradient against float64, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from accuracy import as_dtype, assert_as_accurate, run_with_gradients

from dense_lab_kernels.add_rms_norm import add_rms_norm, reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or a GPU (README.md here)"
    ),
    pytest.mark.usefixtures("poisoned_empty"),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter computes bf16 wrongly; on a GPU bf16 is what matters.
NARROW = torch.float16 if INTERPRETED else torch.bfloat16


def seed() -> torch.Tensor:
    return torch.tensor([2**32 - 5, 123456789], device=DEVICE)


def check(shape: tuple[int, ...], dropout: float, x: torch.dtype, y: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": shape, "y": shape, "weight": shape[-1:]}
    drawn = {name: torch.randn(*s, generator=generator, dtype=torch.float64).to(DEVICE) for name, s in shapes.items()}
    rounded = {name: drawn[name].to(kind) for name, kind in (("x", x), ("y", y), ("weight", torch.float32))}

    def run(impl: str, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        dtype = y if inputs["x"].dtype != torch.float64 else torch.float64
        options = {"dropout": dropout, "seed": seed() if dropout else None, "dtype": dtype, "impl": impl}
        return run_with_gradients(lambda **tensors: tuple(add_rms_norm(**tensors, **options)), inputs)

    exact = run("reference", as_dtype(rounded, torch.float64))
    assert_as_accurate(run("triton", rounded), run("reference", rounded), exact)


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.75])
@pytest.mark.parametrize("y", [torch.float32, NARROW], ids=str)
@pytest.mark.parametrize("x", [torch.float32, NARROW], ids=str)
def test_results_and_gradients(x: torch.dtype, y: torch.dtype, dropout: float) -> None:
    check((2, 3, 48), dropout, x, y)


@pytest.mark.parametrize("shape", [(1, 1), (7,), (63, 33), (3, 1030)], ids=str)
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    check(shape, 0.25, torch.float32, torch.float32)


def test_the_norm_alone_may_have_a_gradient() -> None:
    x, y = (torch.randn(5, 32, device=DEVICE, requires_grad=True) for _ in range(2))
    weight = torch.randn(32, device=DEVICE)
    for output in (0, 1):
        found, exact = (
            torch.autograd.grad(add_rms_norm(x, y, weight, impl=impl)[output].square().sum(), (x, y))
            for impl in ("triton", "reference")
        )
        torch.testing.assert_close(found, exact)


def test_the_kept_elements_are_as_many_as_asked_for_and_independent() -> None:
    like = torch.empty(1000, 1000, device=DEVICE)
    first, second = (reference.kept(like, 0.1, seed() + n).double() for n in (0, 1))
    # Four standard deviations of a mean of a million draws, for a probability and for a product of two.
    assert abs(first.mean().item() - 0.9) < 4 * 0.3 / 1000
    for other in (second, first.roll(1, 0), first.roll(1, 1), first.mT):
        assert abs((first * other).mean().item() - 0.81) < 4 * 0.3924 / 1000
