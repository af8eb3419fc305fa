"""Dense fusion on a CPU as compiled loops (loops.py): one pass over memory forward, one backward.

Letters: W width, m sources, R rows (all leading dimensions together).
"""

from __future__ import annotations

import math
from typing import Any

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
    """As the public function; torch activates the streams, multiplies out a bottleneck and scales."""
    activate = ACTIVATIONS[stream_activation]
    gate = gate.factors() if isinstance(gate, Bottleneck) else gate
    # A norm sees no scale but in its eps.
    fused = _fuse(activate(own), tuple(map(activate, sources)), gate, weight, activation, eps / scale**2)
    fused = fused * scale if weight is None and scale != 1 else fused
    return (fused, own) if returning == "fused and own" else fused


def _fuse(
    own: Tensor,
    sources: tuple[Tensor, ...],
    gate: Tensor | tuple[Tensor, ...] | None,
    weight: Tensor | None,
    activation: str,
    eps: float,
) -> Tensor:
    width = own.shape[-1]
    dtype = compute_dtype(own)

    def rows(x: Tensor) -> Tensor:
        """[R, W'] in the dtype computed in, with zeros up to whole vectors."""
        x = x.to(dtype).reshape(-1, width)
        return (pad(x, (0, -width % WIDTH)) if width % WIDTH else x).contiguous()

    gates = () if gate is None else gate if isinstance(gate, tuple) else (gate,)
    norm = own.new_zeros(0, dtype=dtype) if weight is None else rows(weight).flatten()
    tensors = (rows(x) for x in (own, *sources, *gates))
    fused = _Fuse.apply(activation, eps, width, len(sources), norm, *tensors)
    return fused[:, :width].reshape(own.shape).to(own.dtype)


def _addresses(tensors: tuple[Tensor, ...]) -> np.ndarray:
    """Where the tensors' numbers are; the caller keeps the tensors alive."""
    return np.array([x.data_ptr() for x in tensors], dtype=np.int64)


class _Fuse(torch.autograd.Function):
    """All tensors [R, W'] but the weight [W'], empty for none; `width` is W, the padding left out."""

    @staticmethod
    def forward(
        ctx: Any, activation: str, eps: float, width: int, count: int, weight: Tensor, own: Tensor, *others: Tensor
    ) -> Tensor:
        """The fused rows; others: `count` sources, then the gates."""
        out, scales = torch.empty_like(own), own.new_empty(len(own))
        ctx.options = (activation == "silu", activation == "sigmoid")
        ctx.width, ctx.count = width, count
        given = (own, _addresses(others[:count]), _addresses(others[count:]), weight)
        run(loops.forward, *_work(own, others), own[:0], given, *ctx.options, eps, width, out, scales)
        ctx.save_for_backward(scales, weight, own, *others)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of weight, own, sources and gates. Sources that share a gate, or have none, share a gradient."""
        scales, weight, own, *others = ctx.saved_tensors
        sources, gates = others[: ctx.count], others[ctx.count :]
        d_own, d_reads, d_gates = torch.empty_like(own), *(own.new_empty(len(gates), *own.shape) for _ in range(2))
        tasks, cost = _work(own, others)
        d_weight = weight.new_zeros(tasks, len(weight))
        given = (own, _addresses(sources), _addresses(gates), weight)
        filled = (d_own, d_reads, d_gates, d_weight)
        run(loops.backward, tasks, cost, own[0], given, *ctx.options, ctx.width, scales, d_out.contiguous(), filled)
        reads = d_reads.unbind(0) if gates else (d_own,)
        d_sources = reads if len(reads) == ctx.count else reads * ctx.count
        found = (d_weight.sum(0), d_own, *d_sources, *d_gates.unbind(0))
        return None, None, None, None, *found


def _work(own: Tensor, others: Any) -> tuple[int, int]:
    """Tasks, and vector operations in each."""
    return math.ceil(len(own) / loops.ROWS), loops.ROWS * (own.shape[1] // WIDTH) * (2 + len(others))
