"""Linear map and cross-entropy over pieces of the tokens: a piece's logits become its gradient in place.

The gradients of x and weight are computed in the forward pass, as long as a piece's logits exist, and scaled in the
backward pass. What turns logits into losses and gradients is a parameter: torch here, a kernel in `triton`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dense_lab_kernels._checks import compute_dtype

_PIECE = 256 * 2**20
"""Bytes of logits at a time: enough rows for full speed of the products, little beside a training step's memory."""

Rows = Callable[[Tensor, Tensor, int, Literal["keep", "gradient"]], Tensor]
"""(logits, targets, ignored, what becomes of the logits) -> loss of each row, 0 where ignored."""


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, ignored: int) -> Tensor:
    """Mean loss []; arguments as in the public function."""
    return LinearCrossEntropy.apply(x, weight, targets, ignored, _rows)


def _rows(logits: Tensor, targets: Tensor, ignored: int, then: Literal["keep", "gradient"]) -> Tensor:
    wide = logits.to(compute_dtype(logits))
    losses = torch.nn.functional.cross_entropy(wide, targets, ignore_index=ignored, reduction="none")
    if then == "gradient":
        scored = (targets != ignored)[:, None]
        index = targets.clamp(min=0)[:, None]
        probabilities = wide.softmax(-1).scatter_add_(1, index, torch.full_like(wide[:, :1], -1.0))
        logits.copy_(probabilities * scored)
    return losses


class LinearCrossEntropy(torch.autograd.Function):
    """See the module."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, ignored: int, rows: Rows) -> Tensor:
        """Mean loss []."""
        wide = compute_dtype(x)
        then: Literal["keep", "gradient"] = "gradient" if any(ctx.needs_input_grad) else "keep"
        narrow = weight.detach().to(x.dtype)
        d_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        d_weight = None
        losses = torch.empty(len(x), dtype=wide, device=x.device)
        size = max(1, _PIECE // (len(weight) * x.element_size()))
        size = size // 128 * 128 or size
        for start in range(0, len(x), size):
            piece = slice(start, start + size)
            logits = x[piece] @ narrow.t()
            losses[piece] = rows(logits, targets[piece], ignored, then)
            if d_x is not None:
                torch.mm(logits, narrow, out=d_x[piece])
            if ctx.needs_input_grad[1]:
                share = logits.t() @ x[piece]
                d_weight = share.to(wide) if d_weight is None else d_weight.add_(share)
            del logits
        count = (targets != ignored).sum().clamp(min=1)
        ctx.save_for_backward(d_x, d_weight, count)
        ctx.weight_dtype = weight.dtype
        return losses.sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The stored gradients, scaled."""
        d_x, d_weight, count = ctx.saved_tensors
        factor = grad / count
        scaled_x = None if d_x is None else (d_x * factor).to(d_x.dtype)
        scaled_weight = None if d_weight is None else (d_weight * factor).to(ctx.weight_dtype)
        return scaled_x, scaled_weight, None, None, None
