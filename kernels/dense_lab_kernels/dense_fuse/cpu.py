"""Dense fusion on a CPU as compiled loops (loops.py): one pass over memory forward, one backward.

Letters: W width, m sources, N rows (all leading dimensions together), R width of a gate's bottleneck.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, silu

from dense_lab_kernels._checks import compute_dtype
from dense_lab_kernels._numba import run
from dense_lab_kernels._vector import WIDTH
from dense_lab_kernels.dense_fuse import loops
from dense_lab_kernels.dense_fuse.reference import ACTIVATIONS, Bottleneck

_NARROW = 16
"""A wider bottleneck is multiplied out by torch, whose products of matrices are faster then."""


def dense_fuse(
    own: Tensor,
    sources: tuple[Tensor, ...],
    gate: Tensor | tuple[Tensor, ...] | Bottleneck | None = None,
    weight: Tensor | None = None,
    *,
    activation: str = "none",
    stream_activation: str = "none",
    scale: float = 1.0,
    eps: float = 1e-6,
    returning: str = "fused",
) -> Tensor | tuple[Tensor, Tensor]:
    """As the public function; torch activates the streams, multiplies out a wide bottleneck and scales."""
    activate = ACTIVATIONS[stream_activation]
    if isinstance(gate, Bottleneck) and gate.hidden.shape[-1] > _NARROW:
        gate = gate.factors()
    hidden = second = None
    if isinstance(gate, Bottleneck):
        (hidden, second), gate = gate, None
    gates = () if gate is None else gate if isinstance(gate, tuple) else (gate,)
    # A norm sees no scale but in its eps.
    options = _Options(activation == "silu", activation == "sigmoid", eps / scale**2, len(sources))
    fused, again = _Fuse.apply(options, weight, hidden, second, *map(activate, (own, *sources)), *gates)
    fused = fused * scale if weight is None and scale != 1 else fused
    if returning == "fused":
        return fused
    return fused, again if stream_activation == "none" else own


class _Options(NamedTuple):
    silu: bool
    sigmoid: bool
    eps: float
    count: int  # m


class _Fuse(torch.autograd.Function):
    """One function from what is given to what is wanted: each operation that autograd sees is host time, of which a
    small model's step has little to spare.

    own, sources and gates [..., W]; weight [W], and of a narrow gate hidden [..., R] and second [W, R], or None each.
    """

    @staticmethod
    def forward(
        ctx: Any,
        options: _Options,
        weight: Tensor | None,
        hidden: Tensor | None,
        second: Tensor | None,
        own: Tensor,
        *others: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The fused stream, and own once more; others: m sources, then the gates."""
        dtype, count = compute_dtype(own), options.count
        row, *rows = (_vectors(x, dtype) for x in (own, *others))
        norm = row.new_empty(0) if weight is None else _vectors(weight, dtype).flatten()
        before = table = row.new_empty(0, 0)
        if hidden is not None and second is not None:
            before, table = _vectors(hidden, dtype, 4), _vectors(_vectors(second, dtype, 4).t(), dtype)
        out, scales = torch.empty_like(row), row.new_empty(len(row))
        given = (row, _addresses(rows[:count]), _addresses(rows[count:]), silu(before), table, norm)
        run(loops.forward, *_work(row, rows), row[:0], given, *options[:3], own.shape[-1], out, scales)
        ctx.save_for_backward(scales, norm, before, given[3], table, row, *rows)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.shapes = options, [None if x is None else x.shape for x in (own, hidden, second)]
        return _shaped(out, own.shape).to(own.dtype), own.view_as(own)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_again: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients, which autograd rounds to the dtypes of what was given. Sources that share a gate share one."""
        scales, norm, before, hidden, table, own, *others = ctx.saved_tensors
        silu_, sigmoid, _, count = ctx.options
        (shape, hidden_shape, second_shape), rank = ctx.shapes, len(table)
        tasks, cost = _work(own, others)
        gates = others[count:]
        # Without a gate sources have own's gradient, unless that has more in it.
        reads = own.new_empty(len(gates) or int(rank > 0 or d_again is not None), *own.shape)
        d = (torch.empty_like(own), reads, own.new_empty(len(gates), *own.shape), torch.empty_like(hidden))
        sums = own.new_empty(tasks, rank + 1, own.shape[1])
        given = (own, _addresses(others[:count]), _addresses(gates), hidden, table, norm)
        d_out = torch.zeros_like(own) if d_out is None else _vectors(d_out, own.dtype)
        d_again = own[:0] if d_again is None else _vectors(d_again, own.dtype)
        scratch = own.new_empty(2 + loops.ROWS, own.shape[1])
        run(loops.backward, tasks, cost, scratch, given, silu_, sigmoid, shape[-1], scales, d_out, d_again, (*d, sums))
        d_own, d_reads, d_gates, d_active = d
        first, *rest = (_shaped(x, shape) for x in (d_own, *d_reads.unbind(), *d_gates.unbind()))
        d_sources = rest[: len(d_reads)] or [first]
        streams = (first, *(d_sources if len(d_sources) == count else d_sources * count), *rest[len(d_reads) :])
        total = sums.sum(0)
        d_weight = total[rank, : shape[-1]] if len(norm) else None
        if not rank:
            return None, d_weight, None, None, *streams
        d_hidden = _shaped(torch.ops.aten.silu_backward(d_active, before), hidden_shape)
        return None, d_weight, d_hidden, total[: second_shape[1], : shape[-1]].t(), *streams


def _vectors(x: Tensor, dtype: torch.dtype, multiple: int = WIDTH) -> Tensor:
    """[N, W'] of x [..., W], contiguous, in the dtype computed in, with zeros up to a multiple."""
    width = x.shape[-1]
    missing = -width % multiple
    if not missing and x.dtype == dtype and x.is_contiguous():
        return x.view(-1, width)
    x = x.to(dtype).reshape(-1, width)
    return (pad(x, (0, missing)) if missing else x).contiguous()


def _shaped(rows: Tensor, shape: torch.Size) -> Tensor:
    """Rows [N, W'] as [..., W]."""
    return rows.view(shape) if rows.shape[1] == shape[-1] else rows[:, : shape[-1]].reshape(shape)


def _addresses(tensors: Sequence[Tensor]) -> np.ndarray:
    """Where the tensors' numbers are; the caller keeps the tensors alive."""
    return np.array([x.data_ptr() for x in tensors], dtype=np.int64)


def _work(own: Tensor, others: Sequence[Tensor]) -> tuple[int, int]:
    """Tasks, and vector operations in each."""
    return math.ceil(len(own) / loops.ROWS), loops.ROWS * (own.shape[1] // WIDTH) * (2 + len(others))
