"""Causal depthwise convolution as a walk over time (Triton).

A program owns a block of channels and a segment of tokens and walks through it with the last W-1 inputs in registers:
every input is read once, plus W-1 per segment. Tokens are taken UNROLL at a time, so that their loads are under way
together. The backward is the same walk: it recomputes the filter's output before the activation, keeps the last W-1
gradients beside the last W-1 inputs, and adds up the gradients of the taps, one share per segment.

Letters: B batch, T tokens, D channels, W filter width.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from dense_lab_kernels._triton import (
    Launch,
    Sm90Case,
    cdiv,
    compile_once,
    launch,
    power_of_2,
    processors,
    sigmoid,
    sum_rows,
    sum_rows_launch,
    unsupported_place,
)

__all__ = ["causal_conv1d", "sm90_cases", "unsupported"]

_OPERATION = "causal_conv1d"
_WIDEST = 8  # the window lives in registers


@triton.jit
def _taps(weight, channel, mask, WIDTH: tl.constexpr):
    """The W taps of every channel, oldest first."""
    taps = ()
    for j in tl.static_range(WIDTH):
        taps += (tl.load(weight + channel * WIDTH + j, mask=mask, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def _below(mask, at, high):
    """The mask if at < high (scalars). Compared as blocks: the interpreter cannot mix a scalar bool in."""
    return mask & (tl.zeros(mask.shape, tl.int32) + at < high)


@triton.jit
def _span(mask, low, at, high):
    """The mask if low <= at < high."""
    return _below(mask, at, high) & (tl.zeros(mask.shape, tl.int32) + at >= low)


@triton.jit
def _input(x, token_stride, state, position, tokens, channel, mask, WIDTH: tl.constexpr, HAS_STATE: tl.constexpr):
    """Input at an int64 position of the sequence x points to; the state holds the W-1 positions before 0."""
    inside = _span(mask, 0, position, tokens)
    value = tl.load(x + position * token_stride + channel, mask=inside, other=0.0).to(tl.float32)
    if HAS_STATE:
        before = state + channel * (WIDTH - 1) + position + (WIDTH - 1)
        value += tl.load(before, mask=_span(mask, 1 - WIDTH, position, 0), other=0.0).to(tl.float32)
    return value


@triton.jit
def _place(tokens, channels, segment, BLOCK: tl.constexpr):
    """Batch row and first token (int64), channels and their mask, and the share's number of this program."""
    blocks = tl.cdiv(channels, BLOCK)
    segments = tl.cdiv(tokens, segment)
    share = tl.program_id(0) // blocks
    channel = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    return (
        (share // segments).to(tl.int64),
        (share % segments).to(tl.int64) * segment,
        channel,
        channel < channels,
        share,
    )


@triton.jit(do_not_specialize=["tokens", "segment"])
def _forward(
    x,
    weight,
    bias,
    state,
    out,
    final_state,
    x_batch_stride,
    x_token_stride,
    tokens,
    channels,
    segment,  # tokens per program
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    HAS_STATE: tl.constexpr = state is not None
    batch, start, channel, mask, _share = _place(tokens, channels, segment, BLOCK)
    x += batch * x_batch_stride
    if HAS_STATE:
        state += batch * channels * (WIDTH - 1)
    taps = _taps(weight, channel, mask, WIDTH)
    base = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        base = tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32)
    window = ()
    for j in tl.static_range(WIDTH - 1):
        at = start + (j + 1 - WIDTH)
        window += (_input(x, x_token_stride, state, at, tokens, channel, mask, WIDTH, HAS_STATE),)

    count = tl.minimum(segment, tokens - start).to(tl.int32)
    here = x + start * x_token_stride + channel
    there = out + (batch * tokens + start) * channels + channel
    for first in range(0, count, UNROLL):
        fresh = ()
        for j in tl.static_range(UNROLL):
            t = first + j
            fresh += (tl.load(here + t * x_token_stride, mask=_below(mask, t, count), other=0.0),)
        for j in tl.static_range(UNROLL):
            t = first + j
            window += (fresh[j].to(tl.float32),)
            value = base
            for i in tl.static_range(WIDTH):
                value += taps[i] * window[i]
            if SILU:
                value = value * sigmoid(value)
            tl.store(there + t * channels, value.to(out.dtype.element_ty), mask=_below(mask, t, count))
            window = window[1:]

    if start + count >= tokens:
        for j in tl.static_range(WIDTH - 1):
            at = start + count + (j + 1 - WIDTH)
            value = _input(x, x_token_stride, state, at, tokens, channel, mask, WIDTH, HAS_STATE)
            place = final_state + (batch * channels + channel) * (WIDTH - 1) + j
            tl.store(place, value.to(final_state.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "segment", "before"])
def _backward(
    grad,
    x,
    weight,
    bias,
    state,
    d_x,  # [B, before + tokens, D]: from the state's first token on, if there is a state
    d_taps,  # [shares, D W + D], fp32: the taps' gradients, then the bias's
    grad_batch_stride,
    grad_token_stride,
    x_batch_stride,
    x_token_stride,
    tokens,
    channels,
    segment,
    before,  # W-1 with a state, else 0
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    HAS_STATE: tl.constexpr = state is not None
    batch, start, channel, mask, share = _place(tokens, channels, segment, BLOCK)
    x += batch * x_batch_stride
    if HAS_STATE:
        state += batch * channels * (WIDTH - 1)
    taps = _taps(weight, channel, mask, WIDTH)
    base = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        base = tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32)
    zero = tl.zeros([BLOCK], tl.float32)
    window = ()  # inputs of the last W-1 tokens
    slopes = ()  # gradients of the filter's output there; those before this segment serve other programs only
    sums = (zero,)
    for j in tl.static_range(WIDTH - 1):
        at = start + (j + 1 - WIDTH)
        window += (_input(x, x_token_stride, state, at, tokens, channel, mask, WIDTH, HAS_STATE),)
        slopes += (zero,)
        sums += (zero,)
    d_base = zero

    count = tl.minimum(segment, tokens - start).to(tl.int32)
    reach = tl.minimum(segment + (WIDTH - 1), tokens - start).to(tl.int32)  # later outputs saw these inputs too
    here = x + start * x_token_stride + channel
    above = grad + batch * grad_batch_stride + start * grad_token_stride + channel
    there = d_x + (batch * (before + tokens) + before + start) * channels + channel
    lowest = tl.where(start == 0, -before, 0)
    for first in range(0, count + (WIDTH - 1), UNROLL):
        fresh = ()
        upstream = ()
        for j in tl.static_range(UNROLL):
            t = first + j
            fresh += (tl.load(here + t * x_token_stride, mask=_below(mask, t, reach), other=0.0),)
            upstream += (tl.load(above + t * grad_token_stride, mask=_below(mask, t, reach), other=0.0),)
        for j in tl.static_range(UNROLL):
            t = first + j
            window += (fresh[j].to(tl.float32),)
            slope = upstream[j].to(tl.float32)
            if SILU:
                value = base
                for i in tl.static_range(WIDTH):
                    value += taps[i] * window[i]
                gate = sigmoid(value)
                slope *= gate * (1.0 + value * (1.0 - gate))
            slopes += (slope,)
            own = tl.where(_below(mask, t, count), slope, 0.0)  # the next segment counts the rest
            d_base += own
            grown = ()
            for i in tl.static_range(WIDTH):
                grown += (sums[i] + own * window[i],)
            sums = grown

            # The input W-1 tokens back has now met all its taps.
            d_value = zero
            for i in tl.static_range(WIDTH):
                d_value += taps[WIDTH - 1 - i] * slopes[i]
            s = t - (WIDTH - 1)
            tl.store(there + s * channels, d_value.to(d_x.dtype.element_ty), mask=_span(mask, lowest, s, count))
            window = window[1:]
            slopes = slopes[1:]

    row = d_taps + share.to(tl.int64) * (WIDTH + 1) * channels
    for i in tl.static_range(WIDTH):
        tl.store(row + channel * WIDTH + i, sums[i], mask=mask)
    tl.store(row + channels * WIDTH + channel, d_base, mask=mask)


class _Blocks(NamedTuple):
    """Launch choices: channels per program, tokens taken together, tokens per program."""

    channels: int
    unroll: int
    segment: int


_PROGRAMS = 32  # per processor, when there is work for as many: enough for an even last wave


def _blocks(shape: tuple[int, int, int], count: int, overlap: int | None = None) -> _Blocks:
    """One-warp programs on `count` processors: 128 channels wide, 16 tokens together; the backward, 64 and 8.

    Segments are long (what a segment costs beyond its tokens is then least) while enough programs remain. A backward
    segment walks over `overlap` further tokens (None: forward), and is shorter by them, so that it ends with a full
    block of tokens.
    """
    batch, tokens, channels = shape
    widest, together = (128, 16) if overlap is None else (64, 8)
    block = min(widest, max(32, power_of_2(channels)))
    wanted = max(1, count * _PROGRAMS // (batch * cdiv(channels, block)))
    segment = min(256, max(32, power_of_2(cdiv(tokens, wanted))))
    return _Blocks(block, 1 if tokens == 1 else together, segment - (overlap or 0))


class _Problem(NamedTuple):
    """One call's tensors, as the kernels take them."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    state: Tensor | None
    activation: str

    def forward_blocks(self) -> _Blocks:
        """Launch choices of the forward."""
        return _blocks(self.x.shape, processors(self.x.device))

    def backward_blocks(self) -> _Blocks:
        """Launch choices of the backward, which walks into the next segment."""
        return _blocks(self.x.shape, processors(self.x.device), self.weight.shape[1] - 1)

    def shares(self, blocks: _Blocks) -> int:
        """Programs along batch and time."""
        return self.x.shape[0] * cdiv(self.x.shape[1], blocks.segment)

    def programs(self, blocks: _Blocks) -> int:
        """Channel blocks vary fastest: neighbouring programs read neighbouring memory."""
        return self.shares(blocks) * cdiv(self.x.shape[2], blocks.channels)

    def options(self, blocks: _Blocks) -> dict[str, Any]:
        """What the kernels are specialised for."""
        flags = {"WIDTH": self.weight.shape[1], "SILU": self.activation == "silu"}
        return {**flags, "BLOCK": blocks.channels, "UNROLL": blocks.unroll, "num_warps": 1}

    def forward(self, blocks: _Blocks, out: Tensor, final_state: Tensor) -> Launch:
        """The launch that fills both results."""
        x, weight, bias, state, _ = self
        sizes = (*x.stride()[:2], *x.shape[1:], blocks.segment)
        return Launch(_forward, (x, weight, bias, state, out, final_state, *sizes), self.options(blocks))

    @property
    def before(self) -> int:
        """Tokens of the state."""
        return 0 if self.state is None else self.weight.shape[1] - 1

    def backward(self, blocks: _Blocks, grad: Tensor, d_x: Tensor, d_taps: Tensor) -> Launch:
        """The launch that fills the results."""
        x, weight, bias, state, _ = self
        tensors = (grad, x, weight, bias, state, d_x, d_taps)
        sizes = (*grad.stride()[:2], *x.stride()[:2], *x.shape[1:], blocks.segment, self.before)
        return Launch(_backward, (*tensors, *sizes), self.options(blocks))

    def compile(self, out: Tensor) -> None:
        """Compile all kernels together; what does not exist yet is stood in for by tensors of the same dtype."""
        dtypes = tuple(None if t is None else t.dtype for t in self[:4])
        ahead, back = self.forward_blocks(), self.backward_blocks()
        key = (_OPERATION, self.activation, dtypes, self.weight.shape, ahead[:2], back[:2])
        taps = torch.empty(0, dtype=torch.float32, device=out.device)
        launches = (
            self.forward(ahead, out, out),
            self.backward(back, out, out, taps),
            sum_rows_launch(taps, taps.to(self.sum_dtype), 1, self.weight.numel() + self.x.shape[2]),
        )
        compile_once(key, lambda: launches)

    @property
    def sum_dtype(self) -> torch.dtype:
        """In which the gradients of weight and bias are added up together."""
        same = self.bias is None or self.bias.dtype == self.weight.dtype
        return self.weight.dtype if same else torch.float32


def _neighbours(tensor: Tensor) -> Tensor:
    """[B, T, D] with neighbouring channels; a half of a split needs no copy."""
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def _problem(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, activation: str) -> _Problem:
    bias, state = (None if t is None else t.contiguous() for t in (bias, state))
    return _Problem(_neighbours(x), weight.contiguous(), bias, state, activation)


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, activation: str
    ) -> tuple[Tensor, Tensor]:
        problem = _problem(x, weight, bias, state, activation)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        final_state = torch.empty(x.shape[0], x.shape[2], weight.shape[1] - 1, dtype=x.dtype, device=x.device)
        blocks = problem.forward_blocks()
        work = problem.forward(blocks, out, final_state)
        with torch.cuda.device_of(x):
            if any(ctx.needs_input_grad):
                problem.compile(out)
            launch(work.kernel, problem.programs(blocks), work.arguments, work.options)
        ctx.save_for_backward(x, weight, bias, state)
        ctx.activation = activation
        ctx.set_materialize_grads(False)
        return out, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, state = ctx.saved_tensors
        problem = _problem(x, weight, bias, state, ctx.activation)
        grad = torch.zeros_like(problem.x) if grad is None else _neighbours(grad)
        channels, width = weight.shape
        # The state is a sequence's first tokens: their gradients are written, and handed out, as a part of its own.
        d_x = torch.empty(x.shape[0], problem.before + x.shape[1], channels, dtype=x.dtype, device=x.device)
        blocks = problem.backward_blocks()
        shares = torch.empty(problem.shares(blocks), channels * (width + 1), dtype=torch.float32, device=x.device)
        work = problem.backward(blocks, grad, d_x, shares)
        with torch.cuda.device_of(x):
            launch(work.kernel, problem.programs(blocks), work.arguments, work.options)
            d_weight, d_bias = sum_rows(shares, problem.sum_dtype).split([channels * width, channels])
        if d_final is not None and width > 1:
            last = min(width - 1, d_x.shape[1])
            d_x[:, -last:] += d_final[..., -last:].mT
        d_state = None if state is None else d_x[:, : problem.before].mT.to(state.dtype)
        d_weight = d_weight.view(channels, width).to(weight.dtype)
        d_bias = None if bias is None else d_bias.to(bias.dtype)
        return d_x[:, problem.before :], d_weight, d_bias, d_state, None


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, D] and final state [B, D, W-1] in x's dtype; arguments as in the public function. fp32 inside."""
    return _CausalConv1d.apply(x, weight, bias, initial_state, activation)


def unsupported(x: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any) -> str | None:
    """Why these arguments cannot run here, or None."""
    if x.dtype == torch.float64:
        return "computes in float32, got float64"
    if weight.shape[1] > _WIDEST:
        return f"filter width must be at most {_WIDEST}, got {weight.shape[1]}"
    return unsupported_place(x)


def _sm90_case(kind: str, width: int, dtype: str = "bf16", channels: int = 2048, tokens: int = 2048) -> Sm90Case:
    """`kind`: "forward", "backward" or either with "-state" (an initial state is given)."""
    stream, size, state = f"*{dtype}:16", "i32:16", "constexpr"
    if kind.endswith("-state"):
        state = stream
    given = {"x": stream, "weight": stream, "bias": stream, "state": state}
    sizes = {"x_batch_stride": size, "x_token_stride": size, "tokens": "i32", "channels": size, "segment": "i32"}
    if kind.startswith("forward"):
        kernel, signature = _forward, {**given, "out": stream, "final_state": stream, **sizes}
    else:
        results = {"d_x": stream, "d_taps": "*fp32:16"}
        strides = {"grad_batch_stride": size, "grad_token_stride": size}
        kernel, signature = _backward, {"grad": stream, **given, **results, **strides, **sizes, "before": "i32"}
    absent = [name for name, type_ in signature.items() if type_ == "constexpr"]
    blocks = _blocks((8, tokens, channels), 132, None if kind.startswith("forward") else width - 1)
    constexprs = {"WIDTH": width, "SILU": True, "BLOCK": blocks.channels, "UNROLL": blocks.unroll}
    name = f"{kind}-width{width}-{dtype}-block{blocks.channels}-unroll{blocks.unroll}"
    signature = {name: type_ for name, type_ in signature.items() if name not in absent}
    return Sm90Case(name, kernel, signature, {**constexprs, **dict.fromkeys(absent)}, num_warps=1, num_stages=3)


def sm90_cases() -> Iterator[Sm90Case]:
    """Both kernels over filter widths, dtypes, narrow models, states and single tokens."""
    for kind in ("forward", "backward"):
        for width, dtype in product((2, 4, _WIDEST), ("bf16", "fp32")):
            yield _sm90_case(kind, width, dtype)
        yield _sm90_case(f"{kind}-state", 4)
        yield _sm90_case(kind, 4, channels=32)
    yield _sm90_case("forward-state", 4, tokens=1)
