"""Dense fusion on a CPU as compiled loops (loops.py): one pass over memory forward, one backward.

Letters: W width, m sources, N rows (all leading dimensions together), R width of a gate's bottleneck.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

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
    # A norm sees no scale but in its eps.
    given = (activate(own), tuple(map(activate, sources)), gate, weight)
    fused, again = _fuse(*given, activation, eps / scale**2)
    fused = fused * scale if weight is None and scale != 1 else fused
    if returning == "fused":
        return fused
    return fused, again if stream_activation == "none" else own


def _fuse(
    own: Tensor,
    sources: tuple[Tensor, ...],
    gate: Tensor | tuple[Tensor, ...] | Bottleneck | None,
    weight: Tensor | None,
    activation: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The fused stream and own, both like own."""
    width = own.shape[-1]
    dtype = compute_dtype(own)

    def rows(x: Tensor) -> Tensor:
        """[N, W'] in the dtype computed in, with zeros up to whole vectors."""
        x = x.to(dtype).reshape(-1, width)
        return (pad(x, (0, -width % WIDTH)) if width % WIDTH else x).contiguous()

    hidden = table = own.new_zeros(0, 0, dtype=dtype)
    if isinstance(gate, Bottleneck):
        fours = (0, -gate.hidden.shape[-1] % 4)
        hidden = pad(torch.nn.functional.silu(gate.hidden.to(dtype)), fours).flatten(0, -2).contiguous()
        table, gate = rows(pad(gate.weight, fours).mT), None
    gates = () if gate is None else gate if isinstance(gate, tuple) else (gate,)
    norm = own.new_zeros(0, dtype=dtype) if weight is None else rows(weight).flatten()
    options = _Options(activation == "silu", activation == "sigmoid", eps, width, len(sources))
    found = _Fuse.apply(options, norm, hidden, table, *map(rows, (own, *sources, *gates)))
    fused, again = (x[:, :width].reshape(own.shape).to(own.dtype) for x in found)
    return fused, again


def _addresses(tensors: tuple[Tensor, ...]) -> np.ndarray:
    """Where the tensors' numbers are; the caller keeps the tensors alive."""
    return np.array([x.data_ptr() for x in tensors], dtype=np.int64)


class _Options(NamedTuple):
    silu: bool
    sigmoid: bool
    eps: float
    width: int  # W, the padding left out
    count: int  # m


class _Fuse(torch.autograd.Function):
    """All tensors [N, W'] but the weight [W'], empty for none, and of a narrow gate hidden [N, R] and table [R, W']."""

    @staticmethod
    def forward(
        ctx: Any, options: _Options, weight: Tensor, hidden: Tensor, table: Tensor, own: Tensor, *others: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The fused rows, and own once more; others: m sources, then the gates."""
        out, scales = torch.empty_like(own), own.new_empty(len(own))
        sources, gates = others[: options.count], others[options.count :]
        given = (own, _addresses(sources), _addresses(gates), hidden, table, weight)
        run(loops.forward, *_work(own, others), own[:0], given, *options[:4], out, scales)
        ctx.save_for_backward(scales, weight, hidden, table, own, *others)
        ctx.set_materialize_grads(False)
        ctx.options = options
        return out, own.view_as(own)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_again: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of weight, hidden, table, own, sources and gates. Sources that share a gate share a gradient."""
        scales, weight, hidden, table, own, *others = ctx.saved_tensors
        silu, sigmoid, _, width, count = ctx.options
        sources, gates = others[:count], others[count:]
        tasks, cost = _work(own, others)
        # Without a gate sources have own's gradient, unless that has more in it.
        reads = own.new_empty(len(gates) or int(hidden.numel() > 0 or d_again is not None), *own.shape)
        d_table, d_weight = weight.new_empty(tasks, *table.shape), weight.new_zeros(tasks, len(weight))
        d = (torch.empty_like(own), reads, own.new_empty(len(gates), *own.shape), torch.empty_like(hidden))
        given = (own, _addresses(sources), _addresses(gates), hidden, table, weight)
        d_out = torch.zeros_like(own) if d_out is None else d_out.contiguous()
        d_again = own[:0] if d_again is None else d_again.contiguous()
        options, filled = (silu, sigmoid, width), (*d, d_table, d_weight)
        run(
            loops.backward,
            tasks,
            cost,
            own.new_empty(2 + loops.ROWS, own.shape[1]),
            given,
            *options,
            scales,
            d_out,
            d_again,
            filled,
        )
        d_own, d_reads, d_gates, d_hidden = d
        d_sources = d_reads.unbind(0) if len(d_reads) else (d_own,)
        d_sources = d_sources if len(d_sources) == count else d_sources * count
        return None, d_weight.sum(0), d_hidden, d_table.sum(0), d_own, *d_sources, *d_gates.unbind(0)


def _work(own: Tensor, others: Any) -> tuple[int, int]:
    """Tasks, and vector operations in each."""
    return math.ceil(len(own) / loops.ROWS), loops.ROWS * (own.shape[1] // WIDTH) * (2 + len(others))
