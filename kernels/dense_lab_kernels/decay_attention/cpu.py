"""Decay attention on a CPU as a compiled loop (loops.py) that keeps a head's state in the nearest cache.

Forward and backward are one and the same walk with its roles exchanged. With fade_t = exp(g_t) and the gradient of the
state R_t = fade_{t+1} R_{t+1} + q_t do_t^T, which begins with the gradient of the final state:

    o_t = q_t^T S_t    S_t = fade_t S_{t-1} + k_t v_t^T              walk(q, k, v)
    dq_t = do_t^T S_t^T    the same states, transposed               walk(do, v, k)
    dv_t = k_t^T R_t                                                 walk(k, q, do), backwards
    dk_t = v_t^T R_t^T                                               walk(v, do, q), backwards

There is no gradient of the decays: it needs S and R of the same token at once, which only the chunked form keeps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from dense_lab_kernels._checks import compute_dtype
from dense_lab_kernels._numba import run
from dense_lab_kernels._vector import WIDTH
from dense_lab_kernels.decay_attention import loops
from dense_lab_kernels.decay_attention.loops import PAIR


def decay_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, V] in v's dtype and final state [B, H, K, V]; arguments as in the public function."""
    batch, tokens, heads, value_size = v.shape
    dtype, key_size = compute_dtype(v), q.shape[-1]
    if initial_state is None:
        initial_state = v.new_zeros(batch, heads, key_size, value_size, dtype=dtype)
    missing = (0, -value_size % PAIR, 0, -key_size % PAIR)
    fades = log_decay.detach().to(dtype).exp()
    output, state = _Walk.apply(
        *(_whole_vectors(x.to(dtype)) for x in (q, k, v)),
        fades.expand(1 if fades.ndim == 1 else batch, tokens, heads).contiguous(),
        (pad(initial_state, missing) if any(missing) else initial_state).to(dtype).contiguous(),
    )
    return output[..., :value_size].to(v.dtype), state[..., :key_size, :value_size]


def _whole_vectors(x: Tensor) -> Tensor:
    """[..., K] with zeros up to whole pairs of vectors."""
    missing = -x.shape[-1] % PAIR
    return (pad(x, (0, missing)) if missing else x).contiguous()


def _walk(q: Tensor, k: Tensor, v: Tensor, fades: Tensor, start: Tensor, backwards: bool) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, V] and the last state [B, H, K, V] of one walk; see loops.py."""
    batch, heads, rows, columns = start.shape
    tokens = q.shape[1]
    out, last = v.new_empty(batch, tokens, heads, columns), torch.empty_like(start)
    cost = tokens * rows * columns // WIDTH
    run(loops.scan, batch * heads, cost, start[0, 0].flatten(), q, k, v, fades, start, backwards, out, last)
    return out, last


class _Walk(torch.autograd.Function):
    """q, k [B, T, G, K], v [B, T, H, V], fades [B or 1, T, H], start [B, H, K, V]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, fades: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and the last state."""
        ctx.save_for_backward(q, k, v, fades, start)
        return _walk(q, k, v, fades, start, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v and start."""
        q, k, v, fades, start = ctx.saved_tensors
        d_out, d_last = d_out.contiguous(), d_last.contiguous()
        following = torch.cat([fades[:, 1:], torch.ones_like(fades[:, :1])], dim=1)
        d_q, _ = _walk(d_out, v, k, fades, start.mT.contiguous(), False)
        d_v, d_start = _walk(k, q, d_out, following, d_last, True)
        d_k, _ = _walk(v, d_out, q, following, d_last.mT.contiguous(), True)
        d_q, d_k = (x.unflatten(2, (q.shape[2], -1)).sum(3) if q.shape[2] < x.shape[2] else x for x in (d_q, d_k))
        return d_q, d_k, d_v, None, d_start * fades[:, 0, :, None, None]
