"""What stands between two layers of a pre-norm network: dropout, residual sum and RMSNorm in one pass.

    sum    = x + dropout(y)
    normed = sum / sqrt(mean(sum^2) + eps) * weight

The mean is over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4). Dropout keeps an element with
probability 1 - p and divides it by that (Srivastava et al. 2014). Which ones it keeps is a function of the seed and of
the element's position, so that no mask is stored and all implementations keep the same ones. Letters: W width; leading
dimensions are free.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dense_lab_kernels._checks import Arguments
from dense_lab_kernels._dispatch import choose, operation, triton_verdict
from dense_lab_kernels.add_rms_norm import reference

__all__ = ["AddRMSNormOutput", "add_rms_norm"]

_OPERATION = "add_rms_norm"


class AddRMSNormOutput(NamedTuple):
    """`total` in the wider dtype of x and y, `normed` in the dtype asked for; both [..., W]."""

    total: Tensor
    normed: Tensor


@operation
def add_rms_norm(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> AddRMSNormOutput:
    """Add a layer's output y [..., W] to the residual stream x [..., W], and normalise the sum, times weight [W].

    dropout: probability that an element of y is left out. seed: [2] int64, random below 2^32, needed when it is not 0.
    dtype: of `normed`; by default x's. Both results are computed in float32 (float64 for float64 inputs).
    impl: "auto", "triton" (GPU) or "reference" (any device).

    Differentiable with respect to x, y and weight; gradients flow from both results.
    Raises ValueError for shapes, dtypes or devices that do not fit; ImplementationError for an impl that cannot run.
    """
    given = Arguments(_OPERATION)
    names = " ".join([*(f"L{i}" for i in range(max(x.ndim, 1) - 1)), "W"])
    given.shape("x", x, names)
    given.positive(names)
    given.shape("y", y, names)
    given.shape("weight", weight, "W")
    if not 0 <= dropout < 1:
        raise ValueError(f"{_OPERATION}: dropout must be at least 0 and below 1, got {dropout}")
    fits = seed is not None and seed.dtype == torch.int64 and tuple(seed.shape) == (2,) and seed.device == x.device
    if dropout and not fits:
        got = None if seed is None else f"{seed.dtype} {list(seed.shape)} on {seed.device}"
        raise ValueError(f"{_OPERATION}: dropout needs a seed, int64 [2] on {x.device}, got {got}")
    arguments, options = (x, y, weight), {"dropout": dropout, "seed": seed, "eps": eps, "dtype": dtype or x.dtype}
    verdicts = {"triton": triton_verdict(_OPERATION, impl, x.device, *arguments, **options), "reference": None}
    if choose(_OPERATION, impl, verdicts) == "reference":
        return AddRMSNormOutput(*reference.add_rms_norm(*arguments, **options))
    from dense_lab_kernels.add_rms_norm import triton

    return AddRMSNormOutput(*triton.add_rms_norm(*arguments, **options))
