"""dense_fuse in Triton: output and every gradient against float64, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from accuracy import as_dtype, assert_as_accurate, run_with_gradients

from dense_lab_kernels.dense_fuse import Bottleneck, dense_fuse

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


def make(shape: tuple[int, ...], m: int, gates: int | None, norm: bool, seed: int = 0) -> dict[str, Any]:
    """float64 inputs; gates: None, 0 for one shared gate, or one per source."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(DEVICE)

    gate = None if gates is None else draw(*shape) if gates == 0 else tuple(draw(*shape) for _ in range(gates))
    return {
        "own": draw(*shape),
        "sources": tuple(draw(*shape) for _ in range(m)),
        "gate": gate,
        "weight": 1 + draw(shape[-1]) / 4 if norm else None,
    }


def check(inputs: dict[str, Any], dtype: torch.dtype, **options: Any) -> None:
    def run(impl: str, kind: torch.dtype) -> dict[str, torch.Tensor]:
        # Rounded to the dtype first, so that all see the same numbers.
        rounded = as_dtype(as_dtype(inputs, dtype), kind)
        return run_with_gradients(lambda **x: dense_fuse(**x, **options, impl=impl), rounded)

    assert_as_accurate(run("triton", dtype), run("reference", dtype), run("reference", torch.float64))


# Each case costs compilations on a GPU: every choice beside every other that its code depends on.
@pytest.mark.parametrize(
    ("m", "gates", "activation", "dtype"),
    [
        (1, None, "none", LOW),
        (2, None, "none", FULL),
        (1, 0, "silu", FULL),
        (1, 0, "silu", LOW),
        (1, 0, "sigmoid", LOW),
        (3, 0, "none", FULL),
        (1, 1, "silu", LOW),
        (3, 3, "none", LOW),
        (3, 3, "sigmoid", FULL),
    ],
)
def test_output_and_gradients(m: int, gates: int | None, activation: str, dtype: torch.dtype) -> None:
    for norm in (True, False):
        check(make((2, 5, 48), m, gates, norm), dtype, activation=activation)


def with_bottleneck(inputs: dict[str, Any], inner: int) -> dict[str, Any]:
    """The inputs with a gate of that many hidden numbers."""
    generator = torch.Generator().manual_seed(inner)
    width = inputs["own"].shape[-1]
    weight = torch.randn(width, inner, generator=generator, dtype=torch.float64) / inner**0.5
    hidden = torch.randn(*inputs["own"].shape[:-1], inner, generator=generator, dtype=torch.float64)
    return {**inputs, "gate": Bottleneck(hidden.to(DEVICE), weight.to(DEVICE))}


@pytest.mark.parametrize("returning", ["fused", "fused and own"])
@pytest.mark.parametrize(
    ("m", "gates", "dtype"), [(1, None, LOW), (1, 0, LOW), (3, 0, FULL), (2, 2, LOW), (1, "bottleneck", FULL)]
)
def test_raw_streams_that_later_layers_read(m: int, gates: Any, dtype: torch.dtype, returning: str) -> None:
    for norm in (True, False):
        inputs = make((2, 5, 48), m, None if gates == "bottleneck" else gates, norm)
        inputs = with_bottleneck(inputs, 9) if gates == "bottleneck" else inputs
        options = {"activation": "silu", "stream_activation": "silu", "scale": 0.3, "returning": returning}
        check(inputs, dtype, **options)
    check(make((2, 5, 48), m, None, False), dtype, returning=returning)


def test_own_that_no_later_layer_reads_after_all() -> None:
    inputs = as_dtype(make((3, 40), 1, 0, True), torch.float32)
    leaves = [inputs["own"].requires_grad_(), inputs["gate"].requires_grad_(), inputs["weight"].requires_grad_()]
    options = {**inputs, "activation": "silu", "stream_activation": "silu", "returning": "fused and own"}
    for chosen in ((0,), (1,), (0, 1)):
        found, expected = (
            torch.autograd.grad(
                sum(dense_fuse(**options, impl=impl)[i].cos().sum() for i in chosen), leaves, allow_unused=True
            )
            for impl in ("triton", "reference")
        )
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("norm", ["norm", "no norm"])
@pytest.mark.parametrize(("width", "inner", "m"), [(48, 9, 1), (300, 16, 2), (20, 1, 1)])
@pytest.mark.parametrize("dtype", [LOW, FULL], ids=str)
def test_few_rows_without_gradients(width: int, inner: int, m: int, norm: str, dtype: torch.dtype) -> None:
    inputs = with_bottleneck(make((3, 1, width), m, None, norm == "norm"), inner)
    with torch.no_grad():
        step = dense_fuse(**as_dtype(inputs, dtype), activation="silu", stream_activation="silu", impl="triton")
        plain = dense_fuse(**as_dtype(inputs, dtype), activation="silu", stream_activation="silu", impl="reference")
        exact = as_dtype(as_dtype(inputs, dtype), torch.float64)
        exact = dense_fuse(**exact, activation="silu", stream_activation="silu", impl="reference")
    assert_as_accurate({"output": step}, {"output": plain}, {"output": exact})


@pytest.mark.parametrize("shape", [(1, 1), (7,), (63, 33), (257, 32), (2, 3, 1030), (1, 4097)], ids=str)
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    check(make(shape, 2, 0, True), torch.float32, activation="silu")


def test_halves_of_a_split_are_read_in_place() -> None:
    inputs = make((4, 6, 64), 1, 0, True)
    own, other = torch.randn(4, 6, 128, device=DEVICE).split(64, dim=-1)
    weight = inputs["weight"].float()
    arguments = (own, (other,), other, weight)
    found = dense_fuse(*arguments, activation="silu", impl="triton")
    torch.testing.assert_close(found, dense_fuse(*arguments, activation="silu", impl="reference"))


def test_upstream_gradient_with_any_strides() -> None:
    inputs = as_dtype(make((4, 6, 40), 1, 0, True), torch.float32)
    inputs["own"].requires_grad_()
    grads = {}
    for impl in ("triton", "reference"):
        dense_fuse(**inputs, impl=impl).sum().backward()  # an expanded gradient
        dense_fuse(**inputs, impl=impl).mT.contiguous().cos().sum().backward()  # a transposed one
        grads[impl], inputs["own"].grad = inputs["own"].grad, None
    torch.testing.assert_close(grads["triton"], grads["reference"])


def test_gradients_accumulate_apart_although_they_share_memory() -> None:
    own, a, b = (torch.randn(3, 32, device=DEVICE, requires_grad=True) for _ in range(3))
    dense_fuse(own, (a, b), impl="triton").sum().backward()
    own.grad.add_(1.0)
    assert torch.equal(a.grad, torch.ones_like(a))
    assert torch.equal(b.grad, torch.ones_like(b))


def test_mixed_dtypes_keep_their_own_gradient_dtype() -> None:
    own = torch.randn(3, 32, device=DEVICE, dtype=torch.float16, requires_grad=True)
    source, gate = (torch.randn(3, 32, device=DEVICE, requires_grad=True) for _ in range(2))
    weight = torch.ones(32, device=DEVICE, requires_grad=True)
    out = dense_fuse(own, (source,), gate, weight, impl="triton")
    out.float().sum().backward()
    assert out.dtype == own.grad.dtype == torch.float16
    assert source.grad.dtype == gate.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3000, 768), (1500, 3072), (4096, 32), (500, 8192)], ids=str)
@pytest.mark.parametrize(("m", "gates"), [(1, 0), (2, 0)])
def test_training_sizes(shape: tuple[int, int], m: int, gates: int) -> None:
    check(make(shape, m, gates, True), torch.bfloat16, activation="silu")


@pytest.mark.gpu
@pytest.mark.parametrize(("width", "inner"), [(768, 48), (3072, 48), (3072, 192)])
def test_published_sizes(width: int, inner: int) -> None:
    inputs = with_bottleneck(make((2800, width), 1, None, True), inner)
    options = {"activation": "silu", "stream_activation": "silu", "scale": 0.05}
    check(inputs, torch.bfloat16, returning="fused and own", **options)
    few = dict(inputs)
    few["own"], few["sources"] = few["own"][:6], (few["sources"][0][:6],)
    few["gate"] = Bottleneck(few["gate"].hidden[:6], few["gate"].weight)
    low = as_dtype(few, torch.bfloat16)
    with torch.no_grad():
        found = dense_fuse(**low, impl="triton", **options)
        exact = dense_fuse(**as_dtype(low, torch.float64), impl="reference", **options)
    assert (found.double() - exact).abs().max() <= torch.finfo(torch.bfloat16).eps * exact.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "gates", "dtype"), [(2, 2, LOW), (4, None, LOW), (2, 0, FULL)])
def test_many_streams_at_a_training_size(m: int, gates: int | None, dtype: torch.dtype) -> None:
    check(make((1500, 3072), m, gates, True), dtype, activation="silu")


@pytest.mark.gpu
def test_graph_capture_replays_the_same_numbers() -> None:
    inputs = as_dtype(make((64, 768), 2, 0, True), torch.bfloat16)
    leaves = [inputs["own"], *inputs["sources"], inputs["gate"], inputs["weight"]]
    for leaf in leaves:
        leaf.requires_grad_()

    def step() -> tuple[torch.Tensor, ...]:
        out = dense_fuse(**inputs, activation="silu", impl="triton")
        return torch.autograd.grad(out.float().square().sum(), leaves)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        expected = [g.clone() for g in step()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor in captured:
        tensor.zero_()
    graph.replay()
    for found, wanted in zip(captured, expected, strict=True):
        assert torch.equal(found, wanted)
