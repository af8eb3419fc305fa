"""The rotation in one pass (Triton), backward the same pass with the angle turned round.

A program owns some tokens of one sequence and walks over the heads, which share its angles. Angles are reduced to one
turn in float64, so that position 100,000 is as exact as position 1; sine and cosine are float32.

Letters: B batch, T tokens, H heads, K key width of a head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from dense_lab_kernels._triton import (
    ASSEMBLY,
    Launch,
    Sm90Case,
    applied,
    cdiv,
    compile_once,
    launch,
    power_of_2,
    sigmoid,
    unsupported_place,
)
from dense_lab_kernels.rotate.reference import angles, log_decays

__all__ = ["rotate", "sm90_cases", "unsupported"]

_OPERATION = "rotate"
_WIDEST = 4096


@triton.jit
def _pairs(tile, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    """Even and odd columns of [TOKENS, WIDTH]."""
    return tl.split(tl.reshape(tile, (TOKENS, WIDTH // 2, 2)))


@triton.jit
def _sine(angle):
    """Of angles between -pi and pi, to 2^-20: a twentieth of the work of one to the last bit."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "sin.approx.ftz.f32 $0, $1;", "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1
        )
    else:  # noqa: RET505 - the branch is resolved when compiling, and must not leave a second return behind
        return tl.sin(angle)


@triton.jit
def _cosine(angle):
    """As _sine."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "cos.approx.ftz.f32 $0, $1;", "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1
        )
    else:  # noqa: RET505
        return tl.cos(angle)


@triton.jit
def _decayed(x):
    """1 - exp(x) of fp32 x <= 0, to a few units in the last place however small x is."""
    series = 1.0 / 720 + x * (1.0 / 5040)
    series = 1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * series))
    return tl.where(x > -0.5, -x * (1.0 + x * (0.5 + x * series)), 1.0 - tl.exp(x))


@triton.jit
def _turn_heads(
    x,
    before,
    out,
    log_decay,
    x_batch,
    x_token,
    x_head,
    before_batch,
    before_token,
    before_head,
    batch,
    token,
    position,
    cosine,
    sine,
    mask,
    tokens,
    heads,
    width,
    NORMALISED: tl.constexpr,
    SILU: tl.constexpr,
    BACKWARD: tl.constexpr,
    EXACT: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    column = tl.arange(0, WIDTH)
    token = token.to(tl.int64)
    for head in range(heads):
        offset = batch * x_batch + token * x_token + head * x_head
        value = tl.load(x + offset[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if SILU and not BACKWARD:
            value *= sigmoid(value)
        if NORMALISED:
            decay = tl.load(log_decay + head)
            if EXACT:
                size = tl.sqrt((1.0 - tl.exp(decay)) / (1.0 - tl.exp(decay * (position + 1.0)))).to(tl.float32)
            else:
                first = _decayed(decay.to(tl.float32))
                size = tl.sqrt(first / _decayed((decay * (position + 1.0)).to(tl.float32)))
            value *= size[:, None]
        real, imaginary = _pairs(value, TOKENS, WIDTH)
        turned = tl.join(real * cosine - imaginary * sine, real * sine + imaginary * cosine)
        value = tl.reshape(turned, (TOKENS, WIDTH))
        if SILU and BACKWARD:
            offset = batch * before_batch + token * before_token + head * before_head
            raw = tl.load(before + offset[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
            open_ = sigmoid(raw)
            value *= open_ * (1.0 + raw * (1.0 - open_))
        offset = ((batch * tokens + token) * heads + head) * width
        tl.store(out + offset[:, None] + column[None, :], value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "programs", "scale"])
def _rotate(
    x,  # forward: the input; backward: the gradient of the result
    before,  # backward with an activation: the input of the forward
    out,
    also,  # as x, of the second tensor; read only with ALSO
    also_out,
    turns,  # [K/2] fp64: theta in turns per token
    log_decay,  # [H] fp64
    start,  # [] int64
    x_batch,
    x_token,
    x_head,
    before_batch,
    before_token,
    before_head,
    also_batch,
    also_token,
    also_head,
    tokens,
    heads,
    width,
    programs,  # for x; as many follow for the second tensor
    scale,
    STARTED: tl.constexpr,
    NORMALISED: tl.constexpr,
    SILU: tl.constexpr,
    BACKWARD: tl.constexpr,
    ALSO: tl.constexpr,
    EXACT: tl.constexpr,  # as exact as float32 results must be
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    blocks = tl.cdiv(tokens, TOKENS)
    program = tl.program_id(0) % programs
    batch = (program // blocks).to(tl.int64)
    token = (program % blocks) * TOKENS + tl.arange(0, TOKENS)
    half = tl.arange(0, WIDTH // 2)
    mask = (token < tokens)[:, None] & (tl.arange(0, WIDTH) < width)[None, :]
    position = token.to(tl.float64)
    if STARTED:
        position += tl.load(start).to(tl.float64)
    turn = position[:, None] * tl.load(turns + half, mask=half < width // 2, other=0.0)[None, :]
    angle = ((turn - tl.floor(turn + 0.5)) * 6.283185307179586).to(tl.float32)
    if EXACT:
        cosine = tl.cos(angle) * scale
        sine = tl.sin(angle) * scale
    else:
        cosine = _cosine(angle) * scale
        sine = _sine(angle) * scale
    if BACKWARD:
        sine = -sine
    if not ALSO or tl.program_id(0) < programs:
        _turn_heads(
            x, before, out, log_decay, x_batch, x_token, x_head, before_batch, before_token, before_head,
            batch, token, position, cosine, sine, mask, tokens, heads, width,
            NORMALISED, SILU, BACKWARD, EXACT, TOKENS, WIDTH,
        )  # fmt: skip
    else:
        _turn_heads(
            also, also, also_out, log_decay, also_batch, also_token, also_head, also_batch, also_token, also_head,
            batch, token, position, cosine, sine, mask, tokens, heads, width,
            False, False, BACKWARD, EXACT, TOKENS, WIDTH,
        )  # fmt: skip


def _tile(width: int) -> tuple[int, int, int]:
    """Tokens per program, padded width, warps: 2048 elements, 16 per thread of 4 warps."""
    block = max(power_of_2(width), 4)
    return max(1, 2048 // block), block, 4 if block <= 2048 else 8


@functools.cache
def _turns(width: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return angles(width, device) / (2 * math.pi)


class _Tensors(NamedTuple):
    """What one launch reads and writes; the second tensor is None where there is one only."""

    x: Tensor
    before: Tensor | None
    out: Tensor
    also: Tensor | None
    also_out: Tensor | None


def _launch(given: _Tensors, start: Tensor | None, options: dict[str, Any]) -> Launch:
    x, before, out, also, also_out = given
    _, tokens, heads, width = x.shape
    rows, block, warps = _tile(width)
    turns, decays = _turns(width, x.device), log_decays(heads, x.device)
    before, second = (x if before is None else before), (x if also is None else also)
    strides = (*x.stride()[:3], *before.stride()[:3], *second.stride()[:3])
    sizes = (tokens, heads, width, len(x) * cdiv(tokens, rows), options["scale"])
    flags = {
        "STARTED": start is not None,
        "NORMALISED": options["normaliser"] == "retention",
        "SILU": options["activation"] == "silu",
        "BACKWARD": options["BACKWARD"],
        "ALSO": also is not None,
        "EXACT": x.dtype == torch.float32,
    }
    pair = (second, out if also_out is None else also_out)
    tensors = (x, before, out, *pair, turns, decays, turns if start is None else start)
    return Launch(_rotate, (*tensors, *strides, *sizes), {**flags, "TOKENS": rows, "WIDTH": block, "num_warps": warps})


def _run(given: _Tensors, start: Tensor | None, options: dict[str, Any]) -> None:
    work = _launch(given, start, options)
    programs = work.arguments[-2] * (1 if given.also is None else 2)
    launch(work.kernel, programs, work.arguments, work.options)


def _empty(like: Tensor | None) -> Tensor | None:
    return None if like is None else torch.empty(like.shape, dtype=like.dtype, device=like.device)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, also: Tensor | None, start: Tensor | None, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        x, also = (t if t is None or t.stride(3) == 1 else t.contiguous() for t in (x, also))
        silu = options["activation"] == "silu"
        given = _Tensors(x, None, _empty(x), also, _empty(also))
        with torch.cuda.device_of(x):
            if any(ctx.needs_input_grad):
                _compile(given, silu, start, options)
            _run(given, start, {**options, "BACKWARD": False})
        ctx.save_for_backward(x if silu else None, start)
        ctx.options = options
        return given.out, given.also_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, also_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        before, start = ctx.saved_tensors
        grad, also_grad = (g if g is None else g.contiguous() for g in (grad, also_grad))
        given = _Tensors(grad, before, _empty(grad), also_grad, _empty(also_grad))
        with torch.cuda.device_of(grad):
            _run(given, start, {**ctx.options, "BACKWARD": True})
        return given.out, given.also_out, None, None


def _compile(given: _Tensors, silu: bool, start: Tensor | None, options: dict[str, Any]) -> None:
    """Both directions at once."""
    x, _, out, also, also_out = given
    back = _Tensors(out, x if silu else None, out, also_out, also_out)
    kinds = tuple(sorted(options.items(), key=str)), start is None, x.shape[2] == 1, x.shape[3] % 16, also is None
    pairs = ((given, {**options, "BACKWARD": False}), (back, {**options, "BACKWARD": True}))
    key = (_OPERATION, x.dtype, _tile(x.shape[3])[1], *kinds)
    compile_once(key, lambda: [_launch(tensors, start, choices) for tensors, choices in pairs])


def rotate(
    x: Tensor, also: Tensor | None, *, start: Tensor | None, normaliser: str, activation: str, scale: float
) -> Tensor | tuple[Tensor, Tensor]:
    """As the public function."""
    options = {"normaliser": normaliser, "activation": activation, "scale": scale}
    if also is not None and scale != 1:  # The kernel scales both.
        return rotate(x, None, start=start, **options), rotate(also, None, start=start, **_PLAIN)
    out, also_out = applied(_Rotate, x, also, start, options)
    return out if also is None else (out, also_out)


_PLAIN: dict[str, Any] = {"normaliser": "none", "activation": "none", "scale": 1.0}


def unsupported(x: Tensor, also: Tensor | None, **_: Any) -> str | None:
    """Why these arguments cannot run here, or None."""
    if x.dtype == torch.float64:
        return "computes in float32, got float64"
    if x.shape[3] > _WIDEST:
        return f"K must be at most {_WIDEST}, got {x.shape[3]}"
    return unsupported_place(x)


def _sm90_case(
    kind: str, width: int, dtype: str, started: str, normaliser: str, activation: str, also: str = ""
) -> Sm90Case:
    rows, block, warps = _tile(width)
    stream, table, size = f"*{dtype}:16", "*fp64:16", "i32:16"
    strides = (f"{name}_{place}" for name in ("x", "before", "also") for place in ("batch", "token", "head"))
    signature = dict.fromkeys(("x", "before", "out", "also", "also_out"), stream)
    signature |= {"turns": table, "log_decay": table, "start": "*i64:16"} | dict.fromkeys(strides, size)
    signature |= {"tokens": "i32", "heads": "i32", "width": size, "programs": "i32", "scale": "fp32"}
    flags = {
        "STARTED": started == "started",
        "NORMALISED": normaliser == "retention",
        "SILU": activation == "silu",
        "BACKWARD": kind == "backward",
        "ALSO": bool(also),
        "EXACT": dtype == "fp32",
    }
    name = f"{kind}{also}-{started}-{normaliser}-{activation}-{dtype}-w{block}"
    return Sm90Case(name, _rotate, signature, {**flags, "TOKENS": rows, "WIDTH": block}, warps, 3)


def sm90_cases() -> Iterator[Sm90Case]:
    """Queries and keys, training and decoding."""
    for kind in ("forward", "backward"):
        for width in (64, 384):
            yield _sm90_case(kind, width, "bf16", "first", "retention", "silu")
            yield _sm90_case(kind, width, "bf16", "first", "retention", "silu", "-both")
            yield _sm90_case(kind, width, "bf16", "first", "none", "none")
        yield _sm90_case(kind, 384, "fp32", "started", "retention", "none")
    yield _sm90_case("forward", 384, "bf16", "started", "retention", "silu", "-both")
