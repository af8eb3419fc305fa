"""Selective scan on a CPU as compiled loops (loops.py), with a hand-written backward.

The layer's own recurrence is stream 0, its sources are streams 1, 2, ...; they are stacked so that one loop serves all.
Nothing of size T x D x N is kept: the forward saves the states before every `SEGMENT` tokens, the backward replays
them.

Letters: B batch, T tokens, D channels, N state size, G groups, S streams, W channels that one vector loop takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, softplus

from dense_lab_kernels._checks import compute_dtype
from dense_lab_kernels._numba import run
from dense_lab_kernels._vector import WIDTH
from dense_lab_kernels.selective_scan import loops
from dense_lab_kernels.selective_scan.loops import SEGMENT


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_activation: str = "softplus",
    initial_state: Tensor | None = None,
    sources: tuple[Any, ...] = (),
    gates: tuple[Tensor, ...] = (),
    site: str = "readout",
    source_states: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Output [B, T, D] in u's dtype, final state and source states [B, D, N]; arguments as in the public function."""
    batch, _, channels = u.shape
    streams = [(u, dt, A, B, dt_bias), *sources]
    channel = _Channels(channels, [C.shape[2], *(stream[3].shape[2] for stream in streams)])
    dtype = compute_dtype(u)
    starts = [initial_state, *(source_states or [None] * len(sources))]
    zeros = u.new_zeros(batch, channels, A.shape[1], dtype=dtype)
    y, last = _Scan.apply(
        channel.stack([s[0] for s in streams], dtype),
        channel.stack([_step(dt, bias, dt_activation, dtype) for _, dt, _, _, bias in streams], dtype),
        channel.stack([s[2].mT[None] for s in streams], dtype),
        torch.stack([channel.share(s[3].to(dtype)) for s in streams]).contiguous(),
        channel.share(C.to(dtype)).contiguous(),
        channel.stack(gates, dtype) if gates else zeros.new_zeros(0, 1, 1, 1),
        channel.widen(zeros.new_zeros(channels) if D is None else D.to(dtype)).contiguous(),
        zeros.new_zeros(0, 1, 1) if z is None else channel.widen(z.to(dtype)).contiguous(),
        channel.stack([(zeros if start is None else start).mT for start in starts], dtype),
        site == "carried",
    )
    own, *others = channel.narrow(last).mT.unbind(0)
    return channel.narrow(y).to(u.dtype), own, tuple(others)


def _step(dt: Tensor, bias: Tensor | None, activation: str, dtype: torch.dtype) -> Tensor:
    """The step that the recurrence takes."""
    dt = dt.to(dtype) if bias is None else dt.to(dtype) + bias.to(dtype)
    return softplus(dt) if activation == "softplus" else dt


class _Channels:
    """Padding of the last dimension, so that a block of W channels never straddles two groups."""

    def __init__(self, channels: int, groups: list[int]) -> None:
        self.channels = channels
        self.groups = math.lcm(*groups)
        self.in_group = channels // self.groups
        self.extra = -self.in_group % WIDTH

    def widen(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D'] with zeros after each group's channels."""
        if not self.extra:
            return x
        return pad(x.unflatten(-1, (self.groups, self.in_group)), (0, self.extra)).flatten(-2)

    def narrow(self, x: Tensor) -> Tensor:
        """[..., D'] -> [..., D]."""
        if not self.extra:
            return x
        return x.unflatten(-1, (self.groups, -1))[..., : self.in_group].flatten(-2)

    def stack(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """[S, ..., D'] in `dtype`: streams first, padded channels last."""
        wide = [self.widen(x.to(dtype)) for x in tensors]
        return torch.stack(wide) if len(wide) > 1 else wide[0].unsqueeze(0).contiguous()

    def share(self, x: Tensor) -> Tensor:
        """[B, T, G, N] -> [B, T, G', N] with the number of groups that suits all streams."""
        return x.repeat_interleave(self.groups // x.shape[2], dim=2)


def _work(u: Tensor, A: Tensor, slots: int) -> tuple[int, int, Tensor]:
    """Tasks, steps of a vector in each, and the scratch memory of a thread."""
    _, batch, tokens, channels = u.shape
    rows = A.shape[0] * A.shape[2]
    return batch * (channels // WIDTH), tokens * rows, A.new_empty(slots * rows * WIDTH)


class _Scan(torch.autograd.Function):
    """Stacked, padded streams: u, dt [S, B, T, D], A [S, 1, N, D], B [S, B, T, G, N], states [S, B, N, D]."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        gates: Tensor,
        D: Tensor,
        z: Tensor,
        start: Tensor,
        carried: bool,
    ) -> tuple[Tensor, Tensor]:
        """Output [B, T, D] and last states [S, B, N, D]."""
        segments = math.ceil(u.shape[2] / SEGMENT) if any(ctx.needs_input_grad) else 0
        saved = u.new_empty(segments, *start.shape)
        y, last = torch.empty_like(u[0]), torch.empty_like(start)
        inputs, filled = (u, dt, A, B, C, gates, D), (saved, y, last)
        run(loops.forward, *_work(u, A, loops.FORWARD_SLOTS), inputs, z, start, carried, *filled)
        ctx.save_for_backward(u, dt, A, B, C, gates, D, z, saved)
        ctx.carried = carried
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of everything but `carried`; sums over blocks of channels and over the batch are joined here."""
        u, dt, A, B, C, gates, D, z, saved = ctx.saved_tensors
        _, batch, _, channels = u.shape
        in_group = channels // WIDTH // C.shape[2]
        d_u, d_dt, d_gates, d_z = (torch.empty_like(x) for x in (u, dt, gates, z))
        d_start = torch.empty_like(saved[0])
        d_A = torch.empty_like(saved[0])
        d_B, d_C = B.new_empty(in_group, *B.shape), C.new_empty(in_group, *C.shape)
        d_D = D.new_zeros(batch, channels)
        given = (u, dt, A, B, C, gates, D), z, saved, ctx.carried, d_y.contiguous(), d_last.contiguous()
        found = (d_u, d_dt, d_A, d_B, d_C, d_gates, d_D, d_z, d_start)
        run(loops.backward, *_work(u, A, loops.BACKWARD_SLOTS), *given, found)
        return d_u, d_dt, d_A.sum(1, keepdim=True), d_B.sum(0), d_C.sum(0), d_gates, d_D.sum(0), d_z, d_start, None
