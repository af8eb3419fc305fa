"""Causal convolution: the compiled loops against the reference, and what both promise."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from accuracy import as_dtype, assert_as_accurate, assert_equal_within, run_with_gradients

from dense_lab_kernels import causal_conv1d

pytest.importorskip("numba")
IMPLEMENTATIONS = ("reference", "numba")


def inputs(tokens: int, *, channels: int = 6, width: int = 4, full: bool = True) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(tokens + channels)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    given = {"x": normal(2, tokens, channels), "weight": normal(channels, width)}
    return given | ({"bias": normal(channels), "initial_state": normal(2, channels, width - 1)} if full else {})


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize(("channels", "width", "full"), [(6, 4, True), (144, 3, False), (16, 1, True)])
@pytest.mark.parametrize("tokens", [1, 2, 63, 100, 257])
def test_compiled_equals_the_reference(tokens: int, channels: int, width: int, full: bool, activation: str) -> None:
    given = inputs(tokens, channels=channels, width=width, full=full)
    fast, plain = (partial(causal_conv1d, activation=activation, impl=impl) for impl in ("numba", "reference"))
    assert_equal_within(run_with_gradients(fast, given), run_with_gradients(plain, given), tolerance=1e-12)
    low = as_dtype(given, torch.float32)
    exact = run_with_gradients(plain, as_dtype(low, torch.float64))
    assert_as_accurate(run_with_gradients(fast, low), run_with_gradients(plain, low), exact)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradients_are_those_of_the_formula(impl: str) -> None:
    given = {name: tensor.requires_grad_() for name, tensor in inputs(5, channels=3).items()}

    def run(x: Any, weight: Any, bias: Any, state: Any) -> tuple[torch.Tensor, ...]:
        return tuple(causal_conv1d(x, weight, bias, activation="silu", initial_state=state, impl=impl))

    assert torch.autograd.gradcheck(run, tuple(given.values()), fast_mode=True)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_pieces_with_the_state_handed_on_equal_the_whole(impl: str) -> None:
    given = inputs(40)

    def in_pieces(lengths: list[int]) -> dict[str, torch.Tensor]:
        def run(x: Any, weight: Any, bias: Any, initial_state: Any) -> Any:
            state, outputs = initial_state, []
            for piece in x.split(lengths, 1):
                output, state = causal_conv1d(piece, weight, bias, activation="silu", initial_state=state, impl=impl)
                outputs.append(output)
            return torch.cat(outputs, 1), state

        return run_with_gradients(run, given)

    whole = in_pieces([40])
    assert_equal_within(in_pieces([2, 1, 37]), whole, tolerance=1e-12)
    assert_equal_within(in_pieces([1] * 40), whole, tolerance=1e-12)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_last_tap_sees_the_current_token(impl: str) -> None:
    x = torch.arange(1.0, 6.0).reshape(1, 5, 1)
    now = causal_conv1d(x, torch.tensor([[0.0, 0.0, 1.0]]), impl=impl)
    before = causal_conv1d(x, torch.tensor([[1.0, 0.0, 0.0]]), impl=impl)
    assert now.output.flatten().tolist() == [1, 2, 3, 4, 5]
    assert before.output.flatten().tolist() == [0, 0, 1, 2, 3]
    assert now.final_state.flatten().tolist() == [4, 5]  # oldest first


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(impl: str, dtype: torch.dtype) -> None:
    low = as_dtype(inputs(40), dtype)
    found = causal_conv1d(**low, impl=impl)
    exact = causal_conv1d(**as_dtype(low, torch.float64), impl="reference")
    assert (found.output.dtype, found.final_state.dtype) == (dtype, dtype)
    scale = exact.output.abs().max().item()
    assert (found.output.double() - exact.output).abs().max().item() <= torch.finfo(dtype).eps * scale


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(5, 4)}, r"weight must have shape \[D, W\] with D=6, got \[5, 4\]"),
        ({"weight": torch.zeros(6, 0)}, "W must be at least 1, got W=0"),
        ({"bias": torch.zeros(1)}, r"bias must have shape \[D\]"),
        ({"initial_state": torch.zeros(2, 6, 4)}, r"initial_state must have shape \[B, D, W-1\] .* got \[2, 6, 4\]"),
        ({"activation": "gelu"}, "activation must be one of none, silu, got 'gelu'"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    given = as_dtype(inputs(9), torch.float32)
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**{**given, **change})
