"""rotate in Triton: output and gradient against float64, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from accuracy import as_dtype, assert_as_accurate, run_with_gradients

from dense_lab_kernels import compiling_ahead
from dense_lab_kernels.rotate import rotate

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or a GPU (README.md here)"
    ),
    pytest.mark.usefixtures("poisoned_empty"),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter computes bf16 wrongly; on a GPU bf16 is what matters.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])


def check(shape: tuple[int, ...], dtype: torch.dtype, **options: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = {"x": torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)}

    def run(impl: str, kind: torch.dtype) -> dict[str, torch.Tensor]:
        rounded = as_dtype(as_dtype(inputs, dtype), kind)
        return run_with_gradients(lambda x: rotate(x, **options, impl=impl), rounded)

    assert_as_accurate(run("triton", dtype), run("reference", dtype), run("reference", torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normaliser", ["none", "retention"])
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_output_and_gradient(activation: str, normaliser: str, dtype: torch.dtype) -> None:
    check((2, 5, 3, 24), dtype, activation=activation, normaliser=normaliser, scale=0.25)


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (1, 63, 1, 6), (1, 100, 2, 20), (3, 1, 2, 384)], ids=str)
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    check(shape, torch.float32, activation="silu", normaliser="retention")


@pytest.mark.parametrize("position", [0, 1, 4097, 1_000_003])
def test_positions_go_on_and_stay_exact(position: int) -> None:
    start = torch.tensor(position, device=DEVICE)
    check((2, 3, 2, 16), torch.float32, normaliser="retention", start=start)


def test_heads_of_a_wider_tensor_are_read_in_place() -> None:
    wide = torch.randn(2, 3, 64, device=DEVICE)
    x = wide[..., 32:].unflatten(-1, (2, 16))
    torch.testing.assert_close(rotate(x, impl="triton"), rotate(x, impl="reference"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("activation", "scale"), [("silu", 1.0), ("none", 0.5)])
def test_two_tensors_at_once(activation: str, scale: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(2, 5, 3, 32, generator=generator, dtype=torch.float64).to(DEVICE)
    options = {"start": torch.tensor(7, device=DEVICE), "normaliser": "retention", "activation": activation}
    inputs = {"x": wide[..., :24].contiguous(), "also": wide[..., 8:]}

    def run(impl: str, kind: torch.dtype) -> dict[str, torch.Tensor]:
        rounded = as_dtype(as_dtype(inputs, dtype), kind)
        return run_with_gradients(lambda **pair: rotate(**pair, **options, scale=scale, impl=impl), rounded)

    found, exact = run("triton", dtype), run("reference", torch.float64)
    assert_as_accurate(found, run("reference", dtype), exact)
    torch.testing.assert_close(exact["output[0]"], rotate(inputs["x"].to(dtype).double(), **options, scale=scale))
    torch.testing.assert_close(exact["output[1]"], rotate(inputs["also"].to(dtype).double(), start=options["start"]))
    assert {"dx", "dalso"} <= found.keys()


def test_nothing_runs_while_kernels_are_compiled_ahead() -> None:
    x = torch.randn(1, 3, 1, 8, device=DEVICE, requires_grad=True)
    with compiling_ahead():
        ahead = rotate(x, impl="triton")
    assert ahead.isnan().all()
    torch.testing.assert_close(rotate(x, impl="triton"), rotate(x, impl="reference"))


def test_pieces_agree_with_the_whole() -> None:
    x = torch.randn(1, 9, 2, 8, dtype=torch.float64)
    parts = [rotate(p, start=torch.tensor(s), normaliser="retention") for p, s in ((x[:, :4], 0), (x[:, 4:], 4))]
    torch.testing.assert_close(torch.cat(parts, 1), rotate(x, normaliser="retention"))
