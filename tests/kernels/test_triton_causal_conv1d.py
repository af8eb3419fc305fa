"""causal_conv1d in Triton: output, final state and every gradient against float64, on a GPU or interpreted."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from accuracy import as_dtype, assert_as_accurate, run_with_gradients

from dense_lab_kernels.causal_conv1d import causal_conv1d

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or a GPU (README.md here)"
    ),
    pytest.mark.usefixtures("poisoned_empty"),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
FULL = torch.float32
LOW = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter computes bf16 wrongly


def make(batch: int, tokens: int, channels: int, width: int, state: bool = True, bias: bool = True) -> dict[str, Any]:
    """float64 inputs."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(DEVICE)

    return {
        "x": draw(batch, tokens, channels),
        "weight": draw(channels, width) / width**0.5,
        "bias": draw(channels) if bias else None,
        "initial_state": draw(batch, channels, width - 1) if state else None,
    }


def check(inputs: dict[str, Any], dtype: torch.dtype, activation: str = "silu") -> None:
    def run(impl: str, kind: torch.dtype) -> dict[str, torch.Tensor]:
        # Rounded to the dtype first, so that all see the same numbers.
        rounded = as_dtype(as_dtype(inputs, dtype), kind)
        return run_with_gradients(lambda **x: causal_conv1d(**x, activation=activation, impl=impl), rounded)

    assert_as_accurate(run("triton", dtype), run("reference", dtype), run("reference", torch.float64))


# Each case costs a compilation of seconds on a GPU: every width, and every choice, once or twice.
@pytest.mark.parametrize(("width", "dtype"), [(1, FULL), (2, LOW), (4, FULL), (4, LOW), (8, FULL)], ids=str)
def test_output_state_and_gradients(width: int, dtype: torch.dtype) -> None:
    check(make(2, 11, 20, width), dtype, "silu")


@pytest.mark.parametrize("width", [1, 3])
def test_without_state_bias_and_activation(width: int) -> None:
    check(make(1, 9, 20, width, state=False, bias=False), LOW, "none")


@pytest.mark.parametrize("tokens", [1, 2, 3, 29, 61])
def test_lengths_around_the_segment_and_shorter_than_the_filter(tokens: int) -> None:
    check(make(1, tokens, 33, 4), torch.float32)


def test_only_the_final_state_has_a_gradient() -> None:
    inputs = as_dtype(make(1, 2, 8, 4), torch.float32)
    inputs["x"].requires_grad_()
    inputs["initial_state"].requires_grad_()
    final_state = causal_conv1d(**inputs, impl="triton").final_state
    found = torch.autograd.grad(final_state.sum(), [inputs["x"], inputs["initial_state"]])
    assert torch.equal(found[0], torch.ones_like(found[0]))
    # Two tokens push the two oldest of three inputs out.
    assert torch.equal(found[1], torch.tensor([0.0, 0.0, 1.0], device=DEVICE).expand_as(found[1]))


def test_pieces_with_the_state_handed_on_equal_one_pass() -> None:
    inputs = as_dtype(make(2, 40, 16, 4), torch.float32)
    whole = causal_conv1d(**inputs, activation="silu", impl="triton")
    x, state, pieces = inputs.pop("x"), inputs.pop("initial_state"), []
    for piece in x.split([33, 1, 1, 5], dim=1):
        result = causal_conv1d(piece, **inputs, activation="silu", initial_state=state, impl="triton")
        pieces.append(result.output)
        state = result.final_state
    assert torch.equal(torch.cat(pieces, dim=1), whole.output)
    assert torch.equal(state, whole.final_state)


def test_halves_of_a_split_are_read_in_place() -> None:
    inputs = as_dtype(make(2, 10, 32, 4), torch.float32)
    inputs["x"] = torch.randn(2, 10, 64, device=DEVICE).split(32, dim=-1)[1]
    found = causal_conv1d(**inputs, impl="triton")
    expected = causal_conv1d(**inputs, impl="reference")
    torch.testing.assert_close(tuple(found), tuple(expected))


def test_transposed_input_and_expanded_gradient() -> None:
    inputs = as_dtype(make(2, 10, 32, 4), torch.float32)
    inputs["x"] = torch.randn(2, 32, 10, device=DEVICE).mT.requires_grad_()
    grads = []
    for impl in ("triton", "reference"):
        grads += torch.autograd.grad(causal_conv1d(**inputs, impl=impl).output.sum(), [inputs["x"]])
    torch.testing.assert_close(*grads)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 2048, 1024), (1, 2000, 1536), (16, 512, 48)], ids=str)
def test_training_sizes(shape: tuple[int, int, int]) -> None:
    check(make(*shape, 4, state=False), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 2048, 1024), (1, 2000, 1536), (6, 1, 4096)], ids=str)
def test_training_and_decoding_sizes_with_a_state(shape: tuple[int, int, int]) -> None:
    check(make(*shape, 4), torch.bfloat16)
