"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467): torch's, with few passes on a CPU and by kernels on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
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
        out: Tensor = operation(x, self.weight, gate, activation="silu", eps=self.eps, dtype=_result_dtype(x))
        return out

    def after(self, x: Tensor, y: Tensor, dropout: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
        """x + dropout(y), and its norm; all [..., width].

        dropout: probability. seed: [2] int64, which elements a GPU drops; elsewhere torch's generator decides.
        """
        operation = registries.default().operation("add_rms_norm") if x.is_cuda and x.dtype != torch.float64 else None
        if operation is None:
            x = x + nn.functional.dropout(y, dropout)
            return x, self(x)
        options = {"dropout": dropout, "seed": seed, "eps": self.eps, "dtype": _result_dtype(x)}
        total, normed = operation(x, y, self.weight, **options)
        return total, normed


def _result_dtype(x: Tensor) -> torch.dtype:
    """What the next product would round the result to."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype


class Dropout:
    """Dropout of what layers add to the residual stream, for one pass."""

    def __init__(self, probability: float, writers: int, device: torch.device):
        """`writers`: how many layers add something."""
        self.probability = probability
        self._seeds: Iterator[Tensor | None] = itertools.repeat(None)
        if probability and device.type == "cuda":
            self._seeds = iter(torch.randint(2**32, (writers, 2), device=device).unbind())

    def add(self, x: Tensor, y: Tensor | None, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """x + dropout(y), or x where there is no y yet, and its norm; all [B, T, width]."""
        return (x, norm(x)) if y is None else norm.after(x, y, self.probability, next(self._seeds))


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
