"""Decay attention of single tokens in Triton: equal to the reference, and in place where that is allowed."""

from __future__ import annotations

import os

import pytest
import torch

from dense_lab_kernels import decay_attention, reusing_states

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or a GPU (README.md here)"
    ),
    pytest.mark.usefixtures("poisoned_empty"),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
SHAPES = [(2, 2, 2, 16, 32, "constant"), (1, 4, 2, 20, 70, "per token"), (3, 1, 1, 130, 5, "constant")]


def draw(batch: int, heads: int, groups: int, key_size: int, value_size: int, decay: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(DEVICE)

    q, k, v = (
        normal(batch, 1, groups, key_size),
        normal(batch, 1, groups, key_size),
        normal(batch, 1, heads, value_size),
    )
    g = -normal(heads).abs() if decay == "constant" else -normal(batch, 1, heads).abs()
    return q, k, v, g, normal(batch, heads, key_size, value_size)


@pytest.mark.parametrize("start", ["zero", "given"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape: tuple, start: str) -> None:
    *tensors, state = draw(*shape)
    state = state if start == "given" else None
    before = None if state is None else state.clone()
    found, exact = (decay_attention(*tensors, initial_state=state, impl=impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(found.output, exact.output)
    torch.testing.assert_close(found.final_state, exact.final_state)
    assert state is None or torch.equal(state, before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_place(shape: tuple) -> None:
    *tensors, state = draw(*shape)
    exact = decay_attention(*tensors, initial_state=state.clone(), impl="reference")
    with reusing_states():
        found = decay_attention(*tensors, initial_state=state, impl="triton")
    assert found.final_state is state
    torch.testing.assert_close(found.output, exact.output)
    torch.testing.assert_close(state, exact.final_state)


def test_a_wanted_gradient_is_not_lost() -> None:
    *tensors, state = draw(*SHAPES[0])
    state.requires_grad_()
    with reusing_states():
        decay_attention(*tensors, initial_state=state, impl="triton").output.sum().backward()
    assert state.grad.any()
