"""Linear maps of one input equal those of torch, gradients included."""

from __future__ import annotations

import pytest
import torch

from dense_lab.maps import LinearMaps, Plan, joining, linear_maps, rounded, rounding_once

SIZES, PARTS = (5, 6), (1, 2)
JOINED = (3, 2)


def draw(device: str, dtype: torch.dtype, sizes: tuple[int, ...] = SIZES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 7, 8), *((size, 8) for size in sizes))
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [x.to(device, dtype).requires_grad_() for x in drawn]


def test_gradients_are_those_of_finite_differences() -> None:
    for joined in ((), JOINED):
        x, *weights = draw("cpu", torch.float64, SIZES + joined)
        plan = Plan(PARTS, len(joined), [None] * len(weights))
        assert torch.autograd.gradcheck(
            lambda x, *weights, plan=plan: LinearMaps.apply(x, plan, *weights), (x, *weights)
        )
        exact = linear_maps(x, weights, (*PARTS, *(1 for _ in joined)))
        for one, other in zip(LinearMaps.apply(x, plan, *weights), exact, strict=True):
            torch.testing.assert_close(one, other)


def test_joined_maps_are_there_whatever_the_block_does() -> None:
    x, *weights = draw("cpu", torch.float64, SIZES + JOINED)
    exact = linear_maps(x, weights[2:])
    for inside in (lambda: linear_maps(x, weights[:2], PARTS), lambda: linear_maps(x + 1, weights[:1]), lambda: None):
        with joining(x, weights[2:]) as found:
            inside()
        for one, other in zip(found, exact, strict=True):
            torch.testing.assert_close(one, other)
    with joining(x, []) as found:
        linear_maps(x, weights[:2])
    assert found == []


@pytest.mark.gpu
def test_joined_and_rounded_at_once_as_one_by_one() -> None:
    gradients = []
    for form in ("at once", "one by one"):
        x, *weights = draw("cuda", torch.float32, (*SIZES, *JOINED))
        several, second = weights[2:], torch.ones(4, 3, device="cuda", requires_grad=True)
        h = x.bfloat16()
        with (
            torch.autocast("cuda", torch.bfloat16),
            rounding_once([*weights, second] if form == "at once" else [], x.device),
        ):
            with joining(h, several if form == "at once" else []) as found:
                wide = linear_maps(h, weights[:2], PARTS)
            found = found or linear_maps(h, several)
            last = torch.nn.functional.linear(found[0], rounded(second, torch.bfloat16))
        sum((y.float() ** 2).sum() for y in (*wide, *found, last)).backward()
        gradients.append([t.grad for t in (x, *weights, second)])
    for one, other in zip(*gradients, strict=True):
        assert one.dtype == torch.float32
        # Sums of bfloat16 numbers in another order.
        torch.testing.assert_close(one, other, rtol=2**-6, atol=2**-6 * other.abs().max().item())


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
