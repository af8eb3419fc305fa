"""Causal depthwise convolution on a CPU as compiled loops (loops.py), with a hand-written backward."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from dense_lab_kernels._checks import compute_dtype
from dense_lab_kernels._numba import run
from dense_lab_kernels._vector import WIDTH
from dense_lab_kernels.causal_conv1d import loops


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
    dtype = compute_dtype(x)
    extra = -channels % WIDTH

    def widen(tensor: Tensor) -> Tensor:
        """Whole vectors of channels, the last dimension, in the dtype computed in."""
        tensor = tensor.to(dtype)
        return (pad(tensor, (0, extra)) if extra else tensor).contiguous()

    if initial_state is None:
        initial_state = x.new_zeros(batch, channels, weight.shape[1] - 1)
    padded = torch.cat([initial_state.mT.to(x.dtype), x], dim=1)
    bias = x.new_zeros(channels) if bias is None else bias
    y = _Convolve.apply(widen(padded), widen(weight.mT), widen(bias), activation == "silu")
    return y[..., :channels].to(x.dtype), padded[:, tokens:].mT.contiguous()


class _Convolve(torch.autograd.Function):
    """x [B, T + W - 1, D], weight [W, D], bias [D] -> [B, T, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, silu: bool) -> Tensor:
        """The filtered, activated inputs."""
        y = x.new_empty(x.shape[0], x.shape[1] - weight.shape[0] + 1, x.shape[2])
        run(loops.forward, *_work(y, weight), x, weight, bias, silu, y)
        ctx.save_for_backward(x, weight, bias)
        ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias."""
        x, weight, bias = ctx.saved_tensors
        found = (torch.zeros_like(x), weight.new_zeros(len(x), *weight.shape), bias.new_zeros(len(x), *bias.shape))
        run(loops.backward, *_work(d_y, weight), x, weight, bias, ctx.silu, d_y.contiguous(), found)
        d_x, d_weight, d_bias = found
        return d_x, d_weight.sum(0), d_bias.sum(0), None


def _work(y: Tensor, weight: Tensor) -> tuple[int, int, Tensor]:
    """Tasks, vector operations in each, and no scratch memory."""
    batch, tokens, channels = y.shape
    tasks = batch * math.ceil(channels / loops.STRIPE)
    return tasks, tokens * min(channels, loops.STRIPE) // WIDTH * (1 + len(weight)), y.new_empty(0)
