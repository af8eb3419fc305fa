"""Dense fusion: the compiled loops against the reference, and what both promise."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from accuracy import as_dtype, assert_as_accurate, assert_equal_within, run_with_gradients

from dense_lab_kernels import dense_fuse
from dense_lab_kernels.dense_fuse import Bottleneck

pytest.importorskip("numba")
IMPLEMENTATIONS = ("reference", "numba")


def inputs(
    sources: int = 2, *, shape: tuple[int, ...] = (3, 23, 37), gate: str = "shared", norm: str = "norm"
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(sources + shape[-1])

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    given: dict[str, Any] = {"own": normal(*shape), "sources": tuple(normal(*shape) for _ in range(sources))}
    if gate == "shared":
        given["gate"] = normal(*shape)
    if gate == "each":
        given["gate"] = tuple(normal(*shape) for _ in range(sources))
    if norm == "norm":
        given["weight"] = normal(shape[-1])
    return given


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("activation", ["none", "silu", "sigmoid"])
@pytest.mark.parametrize("norm", ["norm", "no-norm"])
@pytest.mark.parametrize("gate", ["no-gate", "shared", "each"])
@pytest.mark.parametrize(("sources", "width"), [(1, 37), (3, 32)])
def test_compiled_equals_the_reference(sources: int, width: int, gate: str, norm: str, activation: str) -> None:
    given = inputs(sources, shape=(3, 23, width), gate=gate, norm=norm)
    fast, plain = (partial(dense_fuse, activation=activation, impl=impl) for impl in ("numba", "reference"))
    assert_equal_within(run_with_gradients(fast, given), run_with_gradients(plain, given), tolerance=1e-12)
    low = as_dtype(given, torch.float32)
    exact = run_with_gradients(plain, as_dtype(low, torch.float64))
    assert_as_accurate(run_with_gradients(fast, low), run_with_gradients(plain, low), exact)


@pytest.mark.parametrize("norm", ["norm", "no-norm"])
@pytest.mark.parametrize("rank", [5, 20])
def test_raw_streams_and_a_bottleneck(rank: int, norm: str) -> None:
    given = inputs(2, norm=norm, gate="no-gate")
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*size, rank, generator=generator, dtype=torch.float64) for size in ((3, 23), (37,)))
    options = {"activation": "sigmoid", "stream_activation": "silu", "scale": 0.3, "returning": "fused and own"}
    found, expected = (
        run_with_gradients(partial(dense_fuse, impl=impl, **options), {**given, "gate": Bottleneck(hidden, weight)})
        for impl in IMPLEMENTATIONS
    )
    assert_equal_within(found, expected, tolerance=1e-12)
    silu = torch.nn.functional.silu
    gate = torch.sigmoid(silu(hidden) @ weight.T)
    fused = 0.3 * (silu(given["own"]) + gate * sum(map(silu, given["sources"])))
    if norm == "norm":
        fused = torch.nn.functional.rms_norm(fused, (37,), given["weight"], 1e-6)
    assert torch.allclose(expected["output[0]"], fused, rtol=1e-12)
    assert torch.equal(expected["output[1]"], given["own"])


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("gate", ["no-gate", "shared", "each", "bottleneck"])
@pytest.mark.parametrize("norm", ["norm", "no-norm"])
def test_owns_other_gradient_is_added(norm: str, gate: str) -> None:
    given = inputs(2, norm=norm, gate="no-gate" if gate == "bottleneck" else gate)
    if gate == "bottleneck":
        generator = torch.Generator().manual_seed(0)
        hidden, weight = (torch.randn(*size, 5, generator=generator, dtype=torch.float64) for size in ((3, 23), (37,)))
        given["gate"] = Bottleneck(hidden, weight)
    fast, plain = (
        partial(dense_fuse, activation="silu", returning="fused and own", impl=impl) for impl in ("numba", "reference")
    )
    assert_equal_within(run_with_gradients(fast, given), run_with_gradients(plain, given), tolerance=1e-12)
    low = as_dtype(given, torch.float32)
    exact = run_with_gradients(plain, as_dtype(low, torch.float64))
    assert_as_accurate(run_with_gradients(fast, low), run_with_gradients(plain, low), exact)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradients_are_those_of_the_formula(impl: str) -> None:
    given = inputs(2, shape=(2, 5), gate="each")
    tensors = [given["own"], *given["sources"], *given["gate"], given["weight"]]

    def run(own: Any, first: Any, second: Any, gate: Any, other: Any, weight: Any) -> torch.Tensor:
        return dense_fuse(own, [first, second], [gate, other], weight, activation="silu", eps=0.1, impl=impl)

    assert torch.autograd.gradcheck(run, [tensor.requires_grad_() for tensor in tensors], fast_mode=True)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(5,), (1, 1, 33), (2, 3, 4, 16)])
def test_leading_dimensions_are_free(impl: str, shape: tuple[int, ...]) -> None:
    given = inputs(2, shape=shape)
    rows = {name: given[name].reshape(-1, shape[-1]) for name in ("own", "gate")}
    expected = dense_fuse(
        **rows, sources=[x.reshape(-1, shape[-1]) for x in given["sources"]], weight=given["weight"], impl="reference"
    )
    assert torch.allclose(dense_fuse(**given, impl=impl), expected.reshape(shape), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_views_are_read_where_they_lie(impl: str) -> None:
    given = inputs(1, shape=(4, 6, 16), norm="no-norm")
    turned = {"own": given["own"].mT, "gate": given["gate"].mT, "sources": [given["sources"][0].mT]}
    assert torch.allclose(dense_fuse(**turned, impl=impl), dense_fuse(**given, impl="reference").mT, rtol=1e-12)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_tensor_may_be_its_own_source(impl: str) -> None:
    own = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
    dense_fuse(own, [own, own], impl=impl).sum().backward()
    assert torch.equal(own.grad, torch.full_like(own, 3.0))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(impl: str, dtype: torch.dtype) -> None:
    low = as_dtype(inputs(2), dtype)
    found = dense_fuse(**low, activation="silu", impl=impl)
    exact = dense_fuse(**as_dtype(low, torch.float64), activation="silu", impl="reference")
    assert found.dtype == dtype
    assert (found.double() - exact).abs().max().item() <= torch.finfo(dtype).eps * exact.abs().max().item()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": ()}, "sources must hold at least one tensor, got none"),
        ({"sources": (torch.zeros(3, 23, 36),)}, r"sources\[0\] must have shape \[L0, L1, W\] .* got \[3, 23, 36\]"),
        ({"gate": (torch.zeros(3, 23, 37),)}, r"gate must be one tensor or one per source \(2\), got 1"),
        ({"gate": torch.zeros(37)}, "gate must have shape"),
        ({"weight": torch.zeros(36)}, r"weight must have shape \[W\] with W=37, got \[36\]"),
        ({"activation": "tanh"}, "activation must be one of none, silu, sigmoid, got 'tanh'"),
        ({"eps": -1.0}, "eps must be >= 0 and scale > 0, got -1.0 and 1.0"),
        ({"scale": 0.0}, "eps must be >= 0 and scale > 0, got 1e-06 and 0.0"),
        (
            {"gate": Bottleneck(torch.zeros(3, 23, 5), torch.zeros(37, 4))},
            r"gate.weight must have shape \[W, R\] .*R=5",
        ),
        ({"own": torch.tensor(1.0)}, r"own must have shape \[..., W\]"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    given = as_dtype(inputs(2), torch.float32)
    with pytest.raises(ValueError, match=message):
        dense_fuse(**{**given, **change})
