"""The last linear map and cross-entropy at once, so that logits of all tokens never exist in float32.

    loss = mean over scored n of  log sum_v exp(x_n . w_v) - x_n . w_{target_n}        in nats

Letters: N tokens, W width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dense_lab_kernels._checks import Arguments
from dense_lab_kernels._dispatch import choose, operation, triton_verdict
from dense_lab_kernels.linear_cross_entropy import chunked, reference

__all__ = ["linear_cross_entropy"]

_OPERATION = "linear_cross_entropy"


@operation
def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *, ignored: int = -100, impl: str = "auto"
) -> Tensor:
    """Mean loss [] in float32 (float64 for float64 inputs) over the positions whose target is not `ignored`; 0 if none.

    x: [N, W]. weight: [V, W], rounded to x's dtype for the product. targets: [N] int64, `ignored` or below V.
    impl: "auto", "triton" (GPU), "chunked" (torch, any device, little memory) or "reference" (any device).

    Differentiable with respect to x and weight. Triton and chunked compute the gradients in the forward pass.
    Raises ValueError for shapes, dtypes or devices that do not fit; ImplementationError for an impl that cannot run.
    """
    given = Arguments(_OPERATION)
    given.shape("x", x, "N W")
    given.shape("weight", weight, "V W")
    given.positive("N W V")
    if targets.dtype != torch.int64 or targets.shape != x.shape[:1] or targets.device != x.device:
        got = f"{targets.dtype} {list(targets.shape)} on {targets.device}"
        raise ValueError(f"{_OPERATION}: targets must be int64 [N={x.shape[0]}] on {x.device}, got {got}")
    arguments = (x, weight, targets)
    verdicts = {
        "triton": triton_verdict(_OPERATION, impl, x.device, *arguments, ignored=ignored),
        "reference": None,
        "chunked": None,
    }
    match choose(_OPERATION, impl, verdicts):
        case "triton":
            from dense_lab_kernels.linear_cross_entropy import triton

            run = triton.linear_cross_entropy
        case "chunked":
            run = chunked.linear_cross_entropy
        case _:
            run = reference.linear_cross_entropy
    return run(*arguments, ignored=ignored)
