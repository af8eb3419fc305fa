"""Decay attention token by token: the specification that every other implementation must equal."""

from __future__ import annotations

import torch
from torch import Tensor

from dense_lab_kernels._checks import compute_dtype


def decay_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, V] in v's dtype and final state [B, H, K, V]; arguments as in the public function."""
    batch, tokens, heads, value_size = v.shape
    dtype = compute_dtype(v)
    # Head h reads group h // (H / G).
    q, k = (x.to(dtype).repeat_interleave(heads // x.shape[2], dim=2) for x in (q, k))
    values = v.to(dtype)
    decay = log_decay.to(dtype).exp().expand(batch, tokens, heads)
    if initial_state is None:
        state = values.new_zeros(batch, heads, q.shape[-1], value_size)
    else:
        state = initial_state.to(dtype)

    outputs = []
    for q_t, k_t, v_t, decay_t in zip(*(x.unbind(1) for x in (q, k, values, decay)), strict=True):
        state = decay_t[..., None, None] * state + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
        outputs.append((q_t.unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outputs, dim=1).to(v.dtype), state
