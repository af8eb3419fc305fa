"""RMSNorm with a gate written down: the specification that every other implementation must equal."""

from __future__ import annotations

import torch
from torch import Tensor

from dense_lab_kernels._checks import compute_dtype


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    *,
    activation: str,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """[..., W] in `dtype`; arguments as in the public function."""
    wide = compute_dtype(x)
    out = torch.nn.functional.rms_norm(x.to(wide), x.shape[-1:], None if weight is None else weight.to(wide), eps)
    if gate is not None:
        gate = gate.to(wide)
        out = out * (torch.nn.functional.silu(gate) if activation == "silu" else gate)
    return out.to(dtype)
