"""Causal depthwise convolution as a sum of shifted copies: the specification."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from dense_lab_kernels._checks import compute_dtype


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, D] and final state [B, D, W-1] in x's dtype; arguments as in the public function."""
    batch, tokens, channels = x.shape
    width = weight.shape[1]
    dtype = compute_dtype(x)
    before = x.new_zeros(batch, width - 1, channels) if initial_state is None else initial_state.mT.to(x.dtype)
    padded = torch.cat([before, x], dim=1)
    final_state = padded[:, tokens:].mT.contiguous()

    padded, taps = padded.to(dtype), weight.to(dtype)
    y = sum(taps[:, j] * padded[:, j : j + tokens] for j in range(width))
    if bias is not None:
        y = y + bias.to(dtype)
    if activation == "silu":
        y = silu(y)
    return y.to(x.dtype), final_state
