"""Dropout, residual sum and RMSNorm written down: the specification that every other implementation must equal."""

from __future__ import annotations

import torch
from torch import Tensor

from dense_lab_kernels._checks import compute_dtype

LEVELS = 2**24
"""Probabilities are multiples of 1 / LEVELS."""


def add_rms_norm(
    x: Tensor, y: Tensor, weight: Tensor, *, dropout: float, seed: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Sum and normalised sum; arguments as in the public function."""
    wide = compute_dtype(x)
    read = y.to(wide)
    if dropout:
        read = torch.where(kept(y, dropout, seed), read / (1 - dropout), 0.0)
    total = (x.to(wide) + read).to(torch.promote_types(x.dtype, y.dtype))
    return total, torch.nn.functional.rms_norm(total.to(wide), x.shape[-1:], weight.to(wide), eps).to(dtype)


def kept(like: Tensor, dropout: float, seed: Tensor) -> Tensor:
    """Which elements of a tensor shaped as `like` survive: the 24 high bits of a hash of their index decide."""
    index = torch.arange(like.numel(), device=like.device).view(like.shape)
    bits = _mixed(_mixed((index + seed[0]) & _ONES) ^ seed[1])
    return (bits >> 8) >= round(dropout * LEVELS)


_ONES = 2**32 - 1


def _mixed(x: Tensor) -> Tensor:
    """A bijection of the numbers below 2^32 that changes each bit of the result with probability about 1/2 for each bit
    of x (C. Wellons, "Prospecting for hash functions", 2018: lowbias32)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _ONES
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _ONES
    return x ^ (x >> 16)
