"""The compiled loops of the causal convolution: a task is a stripe of channels of one sequence, token by token.

Letters: B batch, T tokens, D channels, W filter width, P = T + W - 1; b sequence, t token, j tap, c channel.

    x [B, P, D] begins with the W-1 inputs before the first token; weight [W, D], bias [D], y [B, T, D]
"""

from __future__ import annotations

from typing import Any

from dense_lab_kernels._numba import compiled, inlined
from dense_lab_kernels._vector import WIDTH, exp, load, store

STRIPE = 8 * WIDTH  # channels of a task: enough neighbours in memory, and the taps stay in the nearest cache

Array = Any
Vector = Any


@inlined
def _filtered(x: Array, weight: Array, bias: Array, before: int, c: int) -> Vector:
    """bias + sum_j weight_j x_j of the channels from c on; `before` is the offset of the first input."""
    taps, channels = weight.shape
    y = load(bias, c)
    for j in range(taps):
        y = y + load(weight, j * channels + c) * load(x, before + j * channels)
    return y


@inlined
def _opened(y: Vector, like: Array) -> Vector:
    """sigmoid(y)."""
    one = like.dtype.type(1)
    return one / (exp(like.dtype.type(0) - y) + one)


@compiled
def forward(x: Array, weight: Array, bias: Array, silu: bool, y: Array, scratch: Array, first: int, stop: int) -> None:
    """Tasks first..stop: fill y."""
    _, tokens, channels = y.shape
    taps, stripes = weight.shape[0], (channels + STRIPE - 1) // STRIPE
    for task in range(first, stop):
        b, begin = task // stripes, task % stripes * STRIPE
        for t in range(tokens):
            for c in range(begin, min(begin + STRIPE, channels), WIDTH):
                out = _filtered(x, weight, bias, (b * (tokens + taps - 1) + t) * channels + c, c)
                if silu:
                    out = out * _opened(out, y)
                store(y, (b * tokens + t) * channels + c, out)


@compiled
def backward(
    x: Array, weight: Array, bias: Array, silu: bool, d_y: Array, d: Any, scratch: Array, first: int, stop: int
) -> None:
    """Tasks first..stop: add to d = x, weight, bias, which come as zeros; the last two are per sequence."""
    d_x, d_weight, d_bias = d
    _, tokens, channels = d_y.shape
    taps, stripes = weight.shape[0], (channels + STRIPE - 1) // STRIPE
    one = x.dtype.type(1)
    for task in range(first, stop):
        b, begin = task // stripes, task % stripes * STRIPE
        for t in range(tokens):
            for c in range(begin, min(begin + STRIPE, channels), WIDTH):
                before = (b * (tokens + taps - 1) + t) * channels + c
                along = load(d_y, (b * tokens + t) * channels + c)
                if silu:
                    y = _filtered(x, weight, bias, before, c)
                    opened = _opened(y, x)
                    along = along * opened * (one + y * (one - opened))
                store(d_bias, b * channels + c, load(d_bias, b * channels + c) + along)
                for j in range(taps):
                    at, tap = before + j * channels, j * channels + c
                    store(d_x, at, load(d_x, at) + load(weight, tap) * along)
                    into = b * taps * channels + tap
                    store(d_weight, into, load(d_weight, into) + load(x, at) * along)
