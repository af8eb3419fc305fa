"""RetNet's rotation of queries and keys by their position, with what comes right before and after it.

    out_t = scale * r_t * Rot(t theta) act(x_t)

Rot turns the pairs (2i, 2i+1), read as complex numbers, by the angles t theta_i (Sun et al. 2023, arXiv 2307.08621,
eq. 3-5). theta_i = 10000^(-i / (K/2 - 1)): both ends included, unlike the usual rotary embedding. r_t = 1, or for
queries the retention normaliser 1 / sqrt(c_t), c_t = gamma c_{t-1} + 1, gamma_h = 1 - 2^(-5-h) (eq. 7-8).

Letters: B batch, T tokens, H heads, K key width of a head.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dense_lab_kernels._checks import Arguments
from dense_lab_kernels._dispatch import choose, operation, triton_verdict
from dense_lab_kernels.rotate import reference

__all__ = ["rotate"]

_OPERATION = "rotate"


@operation
def rotate(
    x: Tensor,
    also: Tensor | None = None,
    *,
    start: Tensor | None = None,
    normaliser: Literal["none", "retention"] = "none",
    activation: Literal["none", "silu"] = "none",
    scale: float = 1.0,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Rotate x [B, T, H, K]; the result has its shape and dtype. Positions and angles are exact whatever that is.

    also: a second tensor of that shape and dtype, rotated and nothing else (keys beside queries); both are returned.
    start: [] int64, position of the first token; None means 0. normaliser: "retention" multiplies by r_t.
    activation, scale: applied to x before, and to the result.
    impl: "auto", "triton" (GPU) or "reference" (any device).

    Differentiable with respect to x and also.
    Raises ValueError for shapes, dtypes or devices that do not fit; ImplementationError for an impl that cannot run.
    """
    given = Arguments(_OPERATION)
    given.shape("x", x, "B T H K")
    given.optional("also", also, "B T H K")
    given.positive("B T H K")
    given.one_of("normaliser", normaliser, ("none", "retention"))
    given.one_of("activation", activation, ("none", "silu"))
    if x.shape[3] % 2:
        raise ValueError(f"{_OPERATION}: K must be even, since pairs are rotated, got K={x.shape[3]}")
    if start is not None and (start.dtype != torch.int64 or start.ndim or start.device != x.device):
        got = f"{start.dtype} {list(start.shape)} on {start.device}"
        raise ValueError(f"{_OPERATION}: start must be a scalar int64 tensor on {x.device}, got {got}")
    options = {"start": start, "normaliser": normaliser, "activation": activation, "scale": scale}
    verdicts = {"triton": triton_verdict(_OPERATION, impl, x.device, x, also, **options), "reference": None}
    if choose(_OPERATION, impl, verdicts) == "reference":
        return reference.rotate(x, also, **options)
    from dense_lab_kernels.rotate import triton

    return triton.rotate(x, also, **options)
