"""rms_norm in Triton: output and every gradient against float64, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from accuracy import as_dtype, assert_as_accurate, run_with_gradients

from dense_lab_kernels.rms_norm import rms_norm

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


def check(shape: tuple[int, ...], weight: bool, gate: bool, dtype: torch.dtype, **options: Any) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(DEVICE)

    inputs = {
        "x": draw(*shape),
        "weight": 1 + draw(shape[-1]) / 4 if weight else None,
        "gate": draw(*shape) if gate else None,
    }

    def run(impl: str, kind: torch.dtype) -> dict[str, torch.Tensor]:
        rounded = as_dtype(as_dtype(inputs, dtype), kind)
        return run_with_gradients(lambda **x: rms_norm(**x, **options, impl=impl), rounded)

    assert_as_accurate(run("triton", dtype), run("reference", dtype), run("reference", torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("gate", ["absent", "none", "silu"])
def test_output_and_gradients(gate: str, weight: bool, dtype: torch.dtype) -> None:
    check((2, 3, 2, 48), weight, gate != "absent", dtype, activation="silu" if gate == "silu" else "none")


@pytest.mark.parametrize("shape", [(1, 1), (7,), (3, 100), (63, 33), (2, 3, 1030), (1, 4097)], ids=str)
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    check(shape, True, True, torch.float32, activation="silu")


def test_heads_of_a_wider_tensor_are_read_in_place() -> None:
    wide = torch.randn(2, 3, 4 * 16, device=DEVICE, requires_grad=True)
    x = torch.randn(2, 3, 2, 16, device=DEVICE)
    gate = wide[..., 32:].unflatten(-1, (2, 16))
    found, exact = (rms_norm(x, None, gate, activation="silu", impl=impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(found, exact)
    upstream = torch.randn_like(found)
    gradients = [torch.autograd.grad(y, wide, upstream)[0] for y in (found, exact)]
    torch.testing.assert_close(*gradients)


def test_the_result_has_the_dtype_asked_for() -> None:
    x = torch.randn(3, 16, device=DEVICE)
    exact = rms_norm(x, dtype=torch.float16, impl="reference")
    assert exact.dtype == torch.float16
    torch.testing.assert_close(rms_norm(x, dtype=torch.float16, impl="triton"), exact, rtol=2**-10, atol=0)
