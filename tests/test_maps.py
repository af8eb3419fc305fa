"""Linear maps of one input equal those of torch, gradients included."""

from __future__ import annotations

import pytest
import torch

from dense_lab.maps import LinearMaps, linear_maps

SIZES, PARTS = (5, 6), (1, 2)


def draw(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 7, 8), *((size, 8) for size in SIZES))
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [x.to(device, dtype).requires_grad_() for x in drawn]


def test_gradients_are_those_of_finite_differences() -> None:
    x, *weights = draw("cpu", torch.float64)
    assert torch.autograd.gradcheck(lambda x, *weights: LinearMaps.apply(x, PARTS, *weights), (x, *weights))
    for found, exact in zip(LinearMaps.apply(x, PARTS, *weights), linear_maps(x, weights, PARTS), strict=True):
        torch.testing.assert_close(found, exact)


@pytest.mark.gpu
def test_under_autocast_gradients_of_weights_are_not_rounded() -> None:
    x, *weights = draw("cuda", torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        found = linear_maps(x, weights, PARTS)
    assert {part.dtype for part in found} == {torch.bfloat16}
    sum(part.float().sum() for part in found).backward()
    for weight in weights:
        assert weight.grad.dtype == torch.float32
        # Every output has a gradient of 1: a row of the weight's gradient is the sum of x as rounded by autocast.
        exact = x.detach().bfloat16().float().flatten(0, 1).sum(0).expand_as(weight)
        torch.testing.assert_close(weight.grad, exact, rtol=1e-5, atol=1e-5)
    exact = sum(weight.detach().bfloat16().float().sum(0) for weight in weights)
    # Two sums of bfloat16 results, each rounded to 8 bits.
    torch.testing.assert_close(x.grad, exact.expand_as(x), rtol=2**-6, atol=2**-6)
