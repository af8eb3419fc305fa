"""RMSNorm, optionally times an activated gate: what stands in front of every layer and behind every retention.

    out = x / sqrt(mean(x^2) + eps) * weight * act(gate)

The mean is over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4). Letters: W width; leading
dimensions are free.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dense_lab_kernels._checks import Arguments
from dense_lab_kernels._dispatch import choose, operation, triton_verdict
from dense_lab_kernels.rms_norm import reference

__all__ = ["rms_norm"]

_OPERATION = "rms_norm"


@operation
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    activation: Literal["none", "silu"] = "none",
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """Normalise rows of x [..., W], times weight [W], times act(gate [..., W]); any of the two may be None.

    dtype: of the result; by default x's. It is computed in float32 (float64 for float64 inputs).
    impl: "auto", "triton" (GPU) or "reference" (any device).

    Differentiable with respect to every tensor.
    Raises ValueError for shapes, dtypes or devices that do not fit; ImplementationError for an impl that cannot run.
    """
    given = Arguments(_OPERATION)
    given.one_of("activation", activation, ("none", "silu"))
    names = " ".join([*(f"L{i}" for i in range(max(x.ndim, 1) - 1)), "W"])
    given.shape("x", x, names)
    given.positive(names)
    given.optional("weight", weight, "W")
    given.optional("gate", gate, names)
    arguments, options = (x, weight, gate), {"activation": activation, "eps": eps, "dtype": dtype or x.dtype}
    verdicts = {"triton": triton_verdict(_OPERATION, impl, x.device, *arguments, **options), "reference": None}
    if choose(_OPERATION, impl, verdicts) == "reference":
        return reference.rms_norm(*arguments, **options)
    from dense_lab_kernels.rms_norm import triton

    return triton.rms_norm(*arguments, **options)
