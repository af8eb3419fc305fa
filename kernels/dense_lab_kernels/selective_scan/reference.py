"""Selective scan token by token: the specification that every other implementation must equal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from dense_lab_kernels._checks import compute_dtype


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
    batch, tokens, channels = u.shape
    dtype = compute_dtype(u)
    own_steps = _discretise(u, dt, A, B, dt_bias, dt_activation)
    source_steps = [_discretise(s.u, s.dt, s.A, s.B, s.dt_bias, dt_activation) for s in sources]
    readout = _per_channel(C.to(dtype), channels).unbind(1)
    gate_values = [gate.to(dtype).unsqueeze(-1).unbind(1) for gate in gates]

    zeros = u.new_zeros(batch, channels, A.shape[1], dtype=dtype)
    state = zeros if initial_state is None else initial_state.to(dtype)
    others = [zeros for _ in sources] if source_states is None else [s.to(dtype) for s in source_states]
    outputs = []
    for t in range(tokens):
        others = [decay[t] * h + inflow[t] for h, (decay, inflow) in zip(others, source_steps, strict=True)]
        reads = [gate[t] * h for gate, h in zip(gate_values, others, strict=True)]
        state = own_steps[0][t] * state + own_steps[1][t]
        fused = sum(reads, start=state)
        if site == "carried":
            state = fused
        outputs.append((readout[t] * fused).sum(-1))

    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + D.to(dtype) * u.to(dtype)
    if z is not None:
        y = y * silu(z.to(dtype))
    return y.to(u.dtype), state, tuple(others)


def _discretise(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, dt_bias: Tensor | None, dt_activation: str
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """exp(dt A) and dt B u, both [B, D, N] for each of the T tokens."""
    dtype = compute_dtype(u)
    dt = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    if dt_activation == "softplus":
        dt = softplus(dt)
    inflow = (dt * u.to(dtype)).unsqueeze(-1) * _per_channel(B.to(dtype), u.shape[2])
    return torch.exp(dt.unsqueeze(-1) * A.to(dtype)).unbind(1), inflow.unbind(1)


def _per_channel(grouped: Tensor, channels: int) -> Tensor:
    """[B, T, G, N] -> [B, T, D, N]: group g serves D/G neighbouring channels."""
    return grouped.repeat_interleave(channels // grouped.shape[2], dim=2)
