"""What the RetNet family shares: decay, rotation, the normaliser of the recurrent form. Letters: H heads, K key width."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dense_lab_kernels import decay_attention


class RetentionState(NamedTuple):
    """State of a retention core."""

    matrix: Tensor
    """[B, H, K, V]: S_t = gamma S_{t-1} + k_t v_t^T, keys rotated at their positions."""
    position: Tensor
    """[] int64: tokens seen."""


class Retention(nn.Module):
    """Multi-scale retention of rotated queries and keys (RetNet, arXiv 2307.08621, eq. 5-8).

    gamma_h = 1 - 2^(-5-h). The official row normaliser 1/sqrt(c_t), c_t = gamma c_{t-1} + 1, is applied so that all
    forms equal the official recurrent one; it does not depend on the data.
    """

    def __init__(self, heads: int, key_width: int):
        super().__init__()
        self.heads = heads
        log_gamma = torch.log1p(-(2.0 ** (-5 - torch.arange(heads, dtype=torch.float64))))
        self.register_buffer("log_decay", log_gamma, persistent=False)
        # Both ends included: theta_0 = 1 and theta_last = 1e-4, unlike the usual rotary embedding.
        theta = 10000.0 ** -torch.linspace(0, 1, key_width // 2, dtype=torch.float64)
        self.register_buffer("theta", theta, persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, state: RetentionState | None) -> tuple[Tensor, RetentionState]:
        """q, k [B, T, H, K], v [B, T, H, V] -> o [B, T, H, V] and the next state."""
        start = state.position if state is not None else torch.zeros((), dtype=torch.int64, device=q.device)
        positions = start + torch.arange(q.shape[1], device=q.device)
        angles = positions[:, None].double() * self.theta  # [T, K/2]
        cos, sin = (f(angles)[:, None].to(torch.promote_types(q.dtype, torch.float32)) for f in (torch.cos, torch.sin))
        scale = self._row_scale(positions).to(q.dtype)  # [T, H]
        out = decay_attention(
            rotate(q, cos, sin) * scale[..., None],
            rotate(k, cos, sin),
            v,
            self.log_decay.to(cos.dtype),
            initial_state=state.matrix if state is not None else None,
        )
        return out.output, RetentionState(out.final_state, start + q.shape[1])

    def _row_scale(self, positions: Tensor) -> Tensor:
        """1/sqrt(c_t) in fp64, c_t = (1 - gamma^(t+1)) / (1 - gamma); [T, H]."""
        gone = -torch.expm1(self.log_decay * (positions[:, None] + 1))
        return (-torch.expm1(self.log_decay) / gone).sqrt()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (2i, 2i+1) of x [B, T, H, K] by angles whose cos and sin are [T, 1, K/2]; computed in fp32 or better."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)
