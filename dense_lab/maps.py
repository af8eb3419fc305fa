"""Linear maps without bias: several of one input, with fewer passes over memory in the backward pass on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def linear_maps(x: Tensor, weights: Sequence[Tensor], parts: Sequence[int] | None = None) -> list[Tensor]:
    """x [..., W] times each of the weights [N, W], transposed: [..., N] for each.

    The output of weight i comes in `parts[i]` equal parts, each contiguous. Cutting the weight is cheaper than cutting
    the output, whose parts would have to be copied, and whose gradients joined.

    On a GPU the gradients of x are summed by the products themselves, and those of float32 weights are float32 sums
    that are never rounded to autocast's dtype.
    """
    parts = parts or [1] * len(weights)
    if x.is_cuda and torch.is_grad_enabled():
        if torch.is_autocast_enabled("cuda"):
            x = x.to(torch.get_autocast_dtype("cuda"))
        return list(LinearMaps.apply(x, parts, *weights))  # type: ignore[no-untyped-call]
    pieces = [piece for w, n in zip(weights, parts, strict=True) for piece in (w.chunk(n) if n > 1 else (w,))]
    return [nn.functional.linear(x, piece) for piece in pieces]


class LinearMaps(torch.autograd.Function):
    """See `linear_maps`; the weights are rounded to x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: Sequence[int], *weights: Tensor) -> tuple[Tensor, ...]:
        """One result for each part."""
        narrow = [w.to(x.dtype) for w in weights]
        ctx.save_for_backward(x, *narrow)
        ctx.parts, ctx.dtypes = parts, [w.dtype for w in weights]
        rows = x.flatten(0, -2)
        return tuple((rows @ w.t()).view(*x.shape[:-1], -1) for w in _pieces(narrow, parts))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the weights."""
        x, *narrow = ctx.saved_tensors
        rows, columns = x.flatten(0, -2), [grad.flatten(0, -2) for grad in grads]
        d_rows: Tensor | None = None
        for grad, weight in zip(columns, _pieces(narrow, ctx.parts), strict=True):
            d_rows = grad @ weight if d_rows is None else d_rows.addmm_(grad, weight)
        d_weights = [torch.empty_like(w, dtype=dtype) for w, dtype in zip(narrow, ctx.dtypes, strict=True)]
        for grad, d_weight in zip(columns, _pieces(d_weights, ctx.parts), strict=True):
            _multiply(grad.t(), rows, d_weight)
        return None if d_rows is None else d_rows.view_as(x), None, *d_weights


def _pieces(weights: Sequence[Tensor], parts: Sequence[int]) -> list[Tensor]:
    return [piece for w, n in zip(weights, parts, strict=True) for piece in w.chunk(n)]


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, rounded once to out's dtype."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
