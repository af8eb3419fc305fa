"""Dense fusion written down: the specification that every other implementation must equal."""

from __future__ import annotations

import torch
from torch import Tensor

from dense_lab_kernels._checks import compute_dtype

_ACTIVATIONS = {"none": lambda x: x, "silu": torch.nn.functional.silu, "sigmoid": torch.sigmoid}


def dense_fuse(
    own: Tensor,
    sources: tuple[Tensor, ...],
    gate: Tensor | tuple[Tensor, ...] | None = None,
    weight: Tensor | None = None,
    *,
    activation: str = "none",
    eps: float = 1e-6,
) -> Tensor:
    """[..., W] in own's dtype; arguments as in the public function."""
    dtype = compute_dtype(own)
    activate = _ACTIVATIONS[activation]
    gates = gate if isinstance(gate, tuple) else (gate,) * len(sources)
    fused = own.to(dtype)
    for source, one in zip(sources, gates, strict=True):
        read = source.to(dtype)
        fused = fused + (read if one is None else activate(one.to(dtype)) * read)
    if weight is not None:
        fused = fused / torch.sqrt(fused.square().mean(-1, keepdim=True) + eps) * weight.to(dtype)
    return fused.to(own.dtype)
