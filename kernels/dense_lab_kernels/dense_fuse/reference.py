"""Dense fusion written down: the specification that every other implementation must equal."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dense_lab_kernels._checks import compute_dtype

ACTIVATIONS = {"none": lambda x: x, "silu": torch.nn.functional.silu, "sigmoid": torch.sigmoid}


class Bottleneck(NamedTuple):
    """A gate through a bottleneck of width R, before its activation: silu(hidden) weight^T."""

    hidden: Tensor
    """[..., R]"""
    weight: Tensor
    """[W, R]"""

    def factors(self) -> Tensor:
        """The gate [..., W]."""
        return torch.nn.functional.linear(torch.nn.functional.silu(self.hidden), self.weight)


def dense_fuse(
    own: Tensor,
    sources: tuple[Tensor, ...],
    gate: Tensor | tuple[Tensor, ...] | Bottleneck | None = None,
    weight: Tensor | None = None,
    *,
    activation: str = "none",
    stream_activation: str = "none",
    scale: float = 1.0,
    eps: float = 1e-6,
    returning: str = "fused",
) -> Tensor | tuple[Tensor, Tensor]:
    """As the public function."""
    dtype = compute_dtype(own)
    activate, activate_stream = ACTIVATIONS[activation], ACTIVATIONS[stream_activation]
    if isinstance(gate, Bottleneck):
        gate = Bottleneck(gate.hidden.to(dtype), gate.weight.to(dtype)).factors()
    gates = gate if isinstance(gate, tuple) else (gate,) * len(sources)
    fused = activate_stream(own.to(dtype))
    for source, one in zip(sources, gates, strict=True):
        read = activate_stream(source.to(dtype))
        fused = fused + (read if one is None else activate(one.to(dtype)) * read)
    fused = fused * scale
    if weight is not None:
        fused = fused / torch.sqrt(fused.square().mean(-1, keepdim=True) + eps) * weight.to(dtype)
    fused = fused.to(own.dtype)
    return (fused, own) if returning == "fused and own" else fused
