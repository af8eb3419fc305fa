"""The rotation in one pass (Triton), backward the same pass with the angle turned round.

A program owns some tokens of one sequence and walks over the heads, which share its angles. Angles are reduced to one
turn in float64, so that position 100,000 is as exact as position 1; sine and cosine are float32.

Letters: B batch, T tokens, H heads, K key width of a head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from dense_lab_kernels._triton import Launch, Sm90Case, compile_once, unsupported_place
from dense_lab_kernels.rotate.reference import angles, log_decays

__all__ = ["rotate", "sm90_cases", "unsupported"]

_OPERATION = "rotate"
_WIDEST = 4096


@triton.jit
def _pairs(tile, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    """Even and odd columns of [TOKENS, WIDTH]."""
    return tl.split(tl.reshape(tile, (TOKENS, WIDTH // 2, 2)))


@triton.jit(do_not_specialize=["tokens", "blocks", "scale"])
def _rotate(
    x,  # forward: the input; backward: the gradient of the result
    before,  # backward with an activation: the input of the forward
    out,
    turns,  # [K/2] fp64: theta in turns per token
    log_decay,  # [H] fp64
    start,  # [] int64
    x_batch,
    x_token,
    x_head,
    before_batch,
    before_token,
    before_head,
    tokens,
    heads,
    width,
    blocks,  # of tokens, per sequence
    scale,
    STARTED: tl.constexpr,
    NORMALISED: tl.constexpr,
    SILU: tl.constexpr,
    BACKWARD: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    token = (tl.program_id(0) % blocks) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, WIDTH)
    half = tl.arange(0, WIDTH // 2)
    mask = (token < tokens)[:, None] & (column < width)[None, :]
    position = token.to(tl.float64)
    if STARTED:
        position += tl.load(start).to(tl.float64)
    turn = position[:, None] * tl.load(turns + half, mask=half < width // 2, other=0.0)[None, :]
    angle = ((turn - tl.floor(turn)) * 6.283185307179586).to(tl.float32)
    cosine = tl.cos(angle) * scale
    sine = tl.sin(angle) * scale
    if BACKWARD:
        sine = -sine
    token = token.to(tl.int64)
    for head in range(heads):
        offset = batch * x_batch + token * x_token + head * x_head
        value = tl.load(x + offset[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if SILU and not BACKWARD:
            value *= tl.sigmoid(value)
        if NORMALISED:
            decay = tl.load(log_decay + head)
            size = tl.sqrt((1.0 - tl.exp(decay)) / (1.0 - tl.exp(decay * (position + 1.0))))
            value *= size.to(tl.float32)[:, None]
        real, imaginary = _pairs(value, TOKENS, WIDTH)
        turned = tl.join(real * cosine - imaginary * sine, real * sine + imaginary * cosine)
        value = tl.reshape(turned, (TOKENS, WIDTH))
        if SILU and BACKWARD:
            offset = batch * before_batch + token * before_token + head * before_head
            raw = tl.load(before + offset[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
            open_ = tl.sigmoid(raw)
            value *= open_ * (1.0 + raw * (1.0 - open_))
        offset = ((batch * tokens + token) * heads + head) * width
        tl.store(out + offset[:, None] + column[None, :], value.to(out.dtype.element_ty), mask=mask)


def _tile(width: int) -> tuple[int, int, int]:
    """Tokens per program, padded width, warps: 2048 elements, 16 per thread of 4 warps."""
    block = max(triton.next_power_of_2(width), 4)
    return max(1, 2048 // block), block, 4 if block <= 2048 else 8


@functools.cache
def _turns(width: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return angles(width, device) / (2 * math.pi)


def _launch(x: Tensor, before: Tensor | None, out: Tensor, start: Tensor | None, options: dict[str, Any]) -> Launch:
    _, tokens, heads, width = x.shape
    rows, block, warps = _tile(width)
    turns, decays = _turns(width, x.device), log_decays(heads, x.device)
    strides = (*x.stride()[:3], *(x if before is None else before).stride()[:3])
    sizes = (tokens, heads, width, triton.cdiv(tokens, rows), options["scale"])
    flags = {
        "STARTED": start is not None,
        "NORMALISED": options["normaliser"] == "retention",
        "SILU": options["activation"] == "silu",
        "BACKWARD": options["BACKWARD"],
    }
    tensors = (x, x if before is None else before, out, turns, decays, turns if start is None else start)
    return Launch(_rotate, (*tensors, *strides, *sizes), {**flags, "TOKENS": rows, "WIDTH": block, "num_warps": warps})


def _run(launch: Launch, batch: int) -> None:
    launch.kernel[(batch * launch.arguments[15],)](*launch.arguments, **launch.options)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, start: Tensor | None, options: dict[str, Any]) -> Tensor:
        x = x if x.stride(3) == 1 else x.contiguous()
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        silu = options["activation"] == "silu"
        launch = _launch(x, None, out, start, {**options, "BACKWARD": False})
        with torch.cuda.device_of(x):
            if ctx.needs_input_grad[0]:
                backward = _launch(out, x if silu else None, out, start, {**options, "BACKWARD": True})
                kinds = tuple(sorted(options.items(), key=str)), start is None, x.shape[2] == 1, x.shape[3] % 16
                compile_once((_OPERATION, x.dtype, launch.options["WIDTH"], *kinds), lambda: [launch, backward])
            _run(launch, x.shape[0])
        ctx.save_for_backward(x if silu else None, start)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        before, start = ctx.saved_tensors
        grad = grad.contiguous()
        d_x = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        with torch.cuda.device_of(grad):
            _run(_launch(grad, before, d_x, start, {**ctx.options, "BACKWARD": True}), grad.shape[0])
        return d_x, None, None


def rotate(x: Tensor, *, start: Tensor | None, normaliser: str, activation: str, scale: float) -> Tensor:
    """[B, T, H, K] in x's dtype; arguments as in the public function."""
    return _Rotate.apply(x, start, {"normaliser": normaliser, "activation": activation, "scale": scale})


def unsupported(x: Tensor, **_: Any) -> str | None:
    """Why these arguments cannot run here, or None."""
    if x.dtype == torch.float64:
        return "computes in float32, got float64"
    if x.shape[3] > _WIDEST:
        return f"K must be at most {_WIDEST}, got {x.shape[3]}"
    return unsupported_place(x)


def _sm90_case(kind: str, width: int, dtype: str, started: str, normaliser: str, activation: str) -> Sm90Case:
    rows, block, warps = _tile(width)
    stream, table, size = f"*{dtype}:16", "*fp64:16", "i32:16"
    strides = ("x_batch", "x_token", "x_head", "before_batch", "before_token", "before_head")
    signature = {"x": stream, "before": stream, "out": stream, "turns": table, "log_decay": table, "start": "*i64:16"}
    signature |= dict.fromkeys(strides, size)
    signature |= {"tokens": "i32", "heads": "i32", "width": size, "blocks": "i32", "scale": "fp32"}
    flags = {
        "STARTED": started == "started",
        "NORMALISED": normaliser == "retention",
        "SILU": activation == "silu",
        "BACKWARD": kind == "backward",
    }
    name = f"{kind}-{started}-{normaliser}-{activation}-{dtype}-w{block}"
    return Sm90Case(name, _rotate, signature, {**flags, "TOKENS": rows, "WIDTH": block}, warps, 3)


def sm90_cases() -> Iterator[Sm90Case]:
    """Queries and keys, training and decoding."""
    for kind in ("forward", "backward"):
        for width in (64, 384):
            yield _sm90_case(kind, width, "bf16", "first", "retention", "silu")
            yield _sm90_case(kind, width, "bf16", "first", "none", "none")
        yield _sm90_case(kind, 384, "fp32", "started", "retention", "none")
