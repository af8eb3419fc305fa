"""What the kernel tests share: run an implementation with its gradients, and judge it by its distance from float64.

The rule: a fast form may be at most twice as far from float64 as a plain implementation in the same low precision is,
plus the band that rounding the result itself costs. No tolerance is set by hand. "Far" is the root mean square over a
tensor; the largest single difference, which chance alone moves more, may be four times as large, and so a single wrong
element shows too.

    exact = run_with_gradients(reference, as_dtype(inputs, torch.float64), upstreams)
    plain = run_with_gradients(reference, as_dtype(inputs, torch.float32), upstreams)
    fast = run_with_gradients(kernel, as_dtype(inputs, torch.float32), upstreams)
    assert_as_accurate(fast, plain, exact)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def flat(results: Any) -> list[Tensor]:
    """The tensors in nested tuples or lists, in order; None is skipped."""
    if results is None:
        return []
    if isinstance(results, Tensor):
        return [results]
    return [tensor for item in results for tensor in flat(item)]


def as_dtype(inputs: Mapping[str, Any], dtype: torch.dtype, *, keep: Sequence[str] = ()) -> dict[str, Any]:
    """A detached copy of the (nested) inputs in `dtype`; the names in `keep` and what is no tensor stay as they are."""

    def convert(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().to(dtype)
        if isinstance(value, tuple | list):
            return tuple(convert(item) for item in value)
        return value

    return {name: value if name in keep else convert(value) for name, value in inputs.items()}


def run_with_gradients(
    function: Callable[..., Any], inputs: Mapping[str, Any], upstreams: Sequence[Tensor] | None = None
) -> dict[str, Tensor]:
    """Call `function(**inputs)`; return its results and the gradient of every tensor among the (nested) inputs.

    The gradients are those of sum(result * upstream) over all results; upstreams are cast to each result's dtype and
    device, None draws them from a fixed seed, so that two calls with equal shapes see the same ones.
    Keys: "result0", "result1", ... and "d<name>" (with "[i]" where an input is nested).
    """
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            leaves[name] = value.detach().clone().requires_grad_()
            return leaves[name]
        if isinstance(value, tuple | list):
            return tuple(leaf(f"{name}[{i}]", item) for i, item in enumerate(value))
        return value

    results = flat(function(**{name: leaf(name, value) for name, value in inputs.items()}))
    if upstreams is None:
        generator = torch.Generator().manual_seed(1234)
        upstreams = [torch.randn(result.shape, generator=generator) for result in results]
    pairs = zip(results, upstreams, strict=True)
    # A result may depend on no input (the first state of a convolution of width 1 is empty).
    torch.autograd.backward(*zip(*[(r, u.to(r)) for r, u in pairs if r.requires_grad], strict=True))
    found = {f"result{i}": result.detach() for i, result in enumerate(results)}
    found |= {f"d{name}": tensor.grad for name, tensor in leaves.items() if tensor.grad is not None}
    return found


def differences(tensor: Tensor, exact: Tensor) -> tuple[float, float]:
    """Root mean square and largest absolute difference from `exact`, measured in float64."""
    if tensor.numel() == 0:
        return 0.0, 0.0
    difference = (tensor.detach().double().cpu() - exact.detach().double().cpu()).abs()
    return difference.square().mean().sqrt().item(), difference.max().item()


def rounding_band(dtype: torch.dtype, exact: Tensor) -> tuple[float, float]:
    """What storing `exact` in `dtype` may cost, root mean square and largest: one unit in the last place."""
    size, largest = differences(exact, torch.zeros_like(exact))
    return torch.finfo(dtype).eps * size, torch.finfo(dtype).eps * largest


def assert_as_accurate(
    fast: Mapping[str, Tensor], plain: Mapping[str, Tensor], exact: Mapping[str, Tensor], *, factor: float = 2.0
) -> None:
    """Fail unless every fast tensor is within `factor` x (plain's distance from exact + rounding band) of exact.

    The three mappings (from `run_with_gradients`) must have the same keys; a NaN anywhere fails.
    """
    failures = _unlike(fast, exact) + _unlike(plain, exact)
    for name, tensor in () if failures else fast.items():
        found = differences(tensor, exact[name])
        from_plain, band = differences(plain[name], exact[name]), rounding_band(tensor.dtype, exact[name])
        for i, measure in enumerate(("rms", "largest")):
            limit = factor * (1 + i) * (from_plain[i] + band[i])
            if not found[i] <= limit:
                failures.append(f"{name}: {measure} {found[i]:.2e} from float64, allowed {limit:.2e}")
    assert not failures, "; ".join(failures)


def assert_equal_within(found: Mapping[str, Tensor], exact: Mapping[str, Tensor], *, tolerance: float) -> None:
    """Fail unless every tensor is within tolerance x max(1, |exact|max) of exact; for float64 against float64."""
    failures = _unlike(found, exact)
    for name, tensor in () if failures else found.items():
        limit = tolerance * max(1.0, differences(exact[name], torch.zeros_like(exact[name]))[1])
        largest = differences(tensor, exact[name])[1]
        if not largest <= limit:
            failures.append(f"{name}: differs by {largest:.2e}, allowed {limit:.2e}")
    assert not failures, "; ".join(failures)


def _unlike(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> list[str]:
    """What makes two sets of results incomparable: names or shapes."""
    if set(found) != set(exact):
        return [f"{sorted(found)} where {sorted(exact)} were expected"]
    pairs = ((name, list(found[name].shape), list(exact[name].shape)) for name in found)
    return [f"{name}: shape {got} where {expected} was expected" for name, got, expected in pairs if got != expected]
