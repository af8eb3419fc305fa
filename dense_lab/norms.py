"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467): torch's, with few passes on a CPU and by kernels on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dense_lab import registry as registries


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    torch has fused kernels for GPUs only; on a CPU it differentiates the formula operation by operation, which took
    twice as long as this (B8 T256 width 128, one thread) and a tenth of a small model's training step.
    """

    eps: float

    def __init__(self, width: int, eps: float, *, elementwise_affine: bool = True):
        super().__init__(width, eps, elementwise_affine)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """[..., width] -> [..., width], times silu(gate) when there is one."""
        plain = x.dtype in (torch.float32, torch.float64) and (self.weight is None or self.weight.dtype == x.dtype)
        if x.device.type == "cpu" and plain:
            normed: Tensor = _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
            return normed if gate is None else nn.functional.silu(gate) * normed
        operation = registries.default().operation("rms_norm") if x.is_cuda else None
        if operation is None:
            normed = super().forward(x)
            return normed if gate is None else nn.functional.silu(gate) * normed
        low = torch.is_autocast_enabled("cuda")  # The result is what the next product would round it to.
        dtype = torch.get_autocast_dtype("cuda") if low else x.dtype
        out: Tensor = operation(x, self.weight, gate, activation="silu", eps=self.eps, dtype=dtype)
        return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        y: Tensor = x * scale
        return y if weight is None else y.mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """With s the scale and N the width: dx = s (w dy) - x s^3 sum(w dy x) / N, dw = sum over tokens of s dy x."""
        x, weight, scale = ctx.saved_tensors
        products = dy * x
        if weight is None:
            d_weight, dot, dx = None, products.sum(-1, keepdim=True), dy * scale
        else:
            products = products.flatten(0, -2)
            d_weight = products.mT.mv(scale.flatten())
            dot, dx = products.mv(weight).view_as(scale), (dy * weight).mul_(scale)
        return dx.addcmul_(x, dot.mul_(scale.pow(3)).div_(-x.shape[-1])), d_weight, None
