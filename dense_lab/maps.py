"""Linear maps without bias: several of one input, with fewer launches and passes over memory on a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _Joining(NamedTuple):
    x: Tensor
    weights: list[Tensor]
    found: list[Tensor]


_joining: ContextVar[_Joining | None] = ContextVar("dense_lab_joining", default=None)
_rounded: ContextVar[Mapping[int, Tensor]] = ContextVar("dense_lab_rounded", default=MappingProxyType({}))


def linear_maps(x: Tensor, weights: Sequence[Tensor], parts: Sequence[int] | None = None) -> list[Tensor]:
    """x [..., W] times each of the weights [N, W], transposed: [..., N] for each.

    The output of weight i comes in `parts[i]` equal parts, each contiguous. Cutting the weight is cheaper than cutting
    the output, whose parts would have to be copied, and whose gradients joined.

    On a GPU the gradients of x are summed by the products themselves, and those of float32 weights are float32 sums
    that are never rounded to autocast's dtype.
    """
    parts = parts or [1] * len(weights)
    if not (x.is_cuda and torch.is_grad_enabled()):
        pieces = [piece for w, n in zip(weights, parts, strict=True) for piece in (w.chunk(n) if n > 1 else (w,))]
        return [nn.functional.linear(x, piece) for piece in pieces]
    joining = _joining.get()
    joined = joining.weights if joining is not None and joining.x is x and not joining.found else []
    if torch.is_autocast_enabled("cuda"):
        x = x.to(torch.get_autocast_dtype("cuda"))
    known = _rounded.get()
    weights = [*weights, *joined]
    copies = [known.get(id(weight)) if x.dtype != weight.dtype else None for weight in weights]
    results = list(LinearMaps.apply(x, Plan(parts, len(joined), copies), *weights))  # type: ignore[no-untyped-call]
    if joined and joining is not None:
        joining.found.extend(results[sum(parts) :])
    return results[: sum(parts)]


@contextmanager
def joining(x: Tensor, weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield a list that holds x times each of the weights [N, W], transposed, once the block has ended.

    In training they are one product: for narrow maps that others of the same tensor surround. On a GPU it is computed
    beside the first `linear_maps` of x within the block, whose gradient of x is summed with theirs.
    """
    found: list[Tensor] = []
    token = _joining.set(_Joining(x, list(weights), found) if weights else None)
    try:
        yield found
    finally:
        _joining.reset(token)
    if weights and not found:
        joined = len(weights) > 1 and torch.is_grad_enabled() and not x.is_cuda
        found.extend(_one_product(x, weights) if joined else linear_maps(x, weights))


def _one_product(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    results = nn.functional.linear(x, torch.cat(list(weights)))
    return list(torch.split(results, [len(weight) for weight in weights], -1))


@contextmanager
def rounding_once(weights: Iterable[Tensor], device: torch.device) -> Iterator[None]:
    """Round the weights to autocast's dtype in one launch, for all `linear_maps` and `rounded` within the block."""
    copies: dict[int, Tensor] = {}
    if device.type == "cuda" and torch.is_autocast_enabled("cuda") and torch.is_grad_enabled():
        wide = [weight for weight in weights if weight.dtype == torch.float32]
        narrow = [torch.empty_like(weight, dtype=torch.get_autocast_dtype("cuda")) for weight in wide]
        if wide:
            with torch.no_grad():
                torch._foreach_copy_(narrow, wide)
        copies = {id(weight): copy for weight, copy in zip(wide, narrow, strict=True)}
    token = _rounded.set(copies)
    try:
        yield
    finally:
        _rounded.reset(token)


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`."""
    copy = _rounded.get().get(id(weight))
    if copy is None or copy.dtype != dtype:
        return weight.to(dtype)
    result: Tensor = _Rounded.apply(weight, copy)  # type: ignore[no-untyped-call]
    return result


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return copy.view_as(copy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


class Plan(NamedTuple):
    """How weights are multiplied."""

    parts: Sequence[int]
    """Into how many equal pieces each is cut, those that are joined left out."""
    joined: int
    """So many of the last ones are one product."""
    copies: Sequence[Tensor | None]
    """Of the weights in x's dtype, as far as there are."""


class LinearMaps(torch.autograd.Function):
    """See `linear_maps`; the weights are rounded to x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Plan, *weights: Tensor) -> tuple[Tensor, ...]:
        """One result for each part."""
        cut = len(weights) - plan.joined
        narrow = [w.to(x.dtype) if copy is None else copy for w, copy in zip(weights, plan.copies, strict=True)]
        narrow, joined = narrow[:cut], torch.cat(narrow[cut:]) if plan.joined else None
        ctx.save_for_backward(x, joined, *narrow)
        ctx.parts, ctx.dtypes, ctx.heights = plan.parts, [w.dtype for w in weights], [len(w) for w in weights[cut:]]
        rows = x.flatten(0, -2)
        found = [(rows @ w.t()).view(*x.shape[:-1], -1) for w in _pieces(narrow, plan.parts)]
        if joined is not None:
            found += (rows @ joined.t()).view(*x.shape[:-1], -1).split(ctx.heights, -1)
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the weights."""
        x, joined, *narrow = ctx.saved_tensors
        rows, columns = x.flatten(0, -2), [grad.flatten(0, -2) for grad in grads]
        pieces, dtypes = _pieces(narrow, ctx.parts), ctx.dtypes[: len(narrow)]
        d_weights = [torch.empty_like(w, dtype=dtype) for w, dtype in zip(narrow, dtypes, strict=True)]
        d_pieces = _pieces(d_weights, ctx.parts)
        if joined is not None:
            columns[len(pieces) :] = [torch.cat(columns[len(pieces) :], 1)]
            d_joined = torch.empty_like(joined, dtype=ctx.dtypes[-1])
            pieces, d_pieces = [*pieces, joined], [*d_pieces, d_joined]
            d_weights += d_joined.split(ctx.heights)
        d_rows: Tensor | None = None
        for grad, weight in zip(columns, pieces, strict=True):
            d_rows = grad @ weight if d_rows is None else d_rows.addmm_(grad, weight)
        for grad, d_weight in zip(columns, d_pieces, strict=True):
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
