"""What the kernel tests share: run an implementation with its gradients, and judge it by its distance from float64.

The rule is that of `dense_lab_kernels.verify`; here it is asserted, tensor by tensor.

    exact = run_with_gradients(reference, as_dtype(inputs, torch.float64), upstreams)
    plain = run_with_gradients(reference, as_dtype(inputs, torch.float32), upstreams)
    fast = run_with_gradients(kernel, as_dtype(inputs, torch.float32), upstreams)
    assert_as_accurate(fast, plain, exact)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dense_lab_kernels.verify import FACTOR, as_dtype, deviations, differences, flat, run_with_gradients

__all__ = ["as_dtype", "assert_as_accurate", "assert_equal_within", "differences", "flat", "run_with_gradients"]


def assert_as_accurate(
    fast: Mapping[str, Tensor], plain: Mapping[str, Tensor], exact: Mapping[str, Tensor], *, factor: float = FACTOR
) -> None:
    """Fail unless every fast tensor is within `factor` x (plain's distance from exact + rounding band) of exact.

    The three mappings (from `run_with_gradients`) must have the same keys and shapes; a NaN anywhere fails.
    """
    failures = [
        f"{found.name}: {found.measure} {found.error:.2e} from float64, allowed {found.allowed:.2e}"
        for found in deviations(fast, plain, exact, factor)
        if not found.ok
    ]
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
