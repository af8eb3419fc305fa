"""What a plain implementation in low precision does: the attention form in torch, its products in the dtype given.

It is nobody's choice: `dense_lab_kernels.verify` measures how far such an implementation is from float64, since matrix
units take their operands, decayed keys among them, in the precision of the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def decay_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, V] and final state [B, H, K, V] (RetNet, arXiv 2307.08621, eq. 5); as in the public function."""
    dtype, tokens, heads = v.dtype, v.shape[1], v.shape[2]
    q, k = (x.to(dtype).repeat_interleave(heads // x.shape[2], dim=2).transpose(1, 2) for x in (q, k))
    values = v.transpose(1, 2)
    sums = log_decay.expand(v.shape[:3]).transpose(1, 2).cumsum(-1)
    gaps = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).masked_fill(
        torch.ones(tokens, tokens, dtype=torch.bool, device=v.device).triu(1), float("-inf")
    )
    output = ((q @ k.mT).float() * gaps.exp()).to(dtype) @ values
    leave = (k.float() * (sums[..., -1:] - sums).exp().unsqueeze(-1)).to(dtype)
    state = (leave.mT @ values).float()
    if initial_state is not None:
        enter = (q.float() * sums.exp().unsqueeze(-1)).to(dtype)
        output = output + enter @ initial_state.to(dtype)
        state = state + sums[..., -1:, None].exp() * initial_state
    return output.transpose(1, 2), state
