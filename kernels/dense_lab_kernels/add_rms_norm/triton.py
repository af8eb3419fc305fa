"""Dropout, residual sum and RMSNorm in one pass forward and one pass backward (Triton).

A program owns whole rows. The forward keeps the sum, which is a result anyway, and one number per row (1 / rms); the
backward computes the dropout mask again. It is persistent: each program sums its share of the weight's gradient in
registers; a second, small reduction adds the shares, so that the result does not depend on scheduling.

Letters: W width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from dense_lab_kernels._triton import (
    Launch,
    Sm90Case,
    applied,
    cdiv,
    compile_once,
    launch,
    power_of_2,
    processors,
    sum_rows,
    sum_rows_launch,
    unsupported_place,
)
from dense_lab_kernels._tuned import chosen
from dense_lab_kernels.add_rms_norm.reference import LEVELS

__all__ = ["add_rms_norm", "sm90_cases", "unsupported"]

_OPERATION = "add_rms_norm"
_WIDEST = 16384  # one row must fit in the registers of one program


@triton.jit
def _mixed(x):
    """As in reference.py."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _factor(seed, place, limit, scale):
    """What dropout multiplies elements by: 0 or scale."""
    bits = _mixed(place.to(tl.uint32) + tl.load(seed).to(tl.uint32))
    bits = _mixed(bits ^ tl.load(seed + 1).to(tl.uint32))
    return tl.where((bits >> 8).to(tl.int32) >= limit, scale, 0.0)


@triton.jit(do_not_specialize=["limit", "scale", "rows"])
def _forward(
    x,
    y,
    weight,
    seed,
    total,
    normed,
    inverse_rms,  # [rows], fp32
    limit,
    scale,
    rows,
    width,
    eps,
    DROPOUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_WIDTH)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    value = tl.load(y + place, mask=mask, other=0.0).to(tl.float32)
    if DROPOUT:
        value *= _factor(seed, place, limit, scale)
    value += tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    rounded = value.to(total.dtype.element_ty)
    tl.store(total + place, rounded, mask=mask)
    value = rounded.to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / width + eps)
    tl.store(inverse_rms + row, inverse, mask=row < rows)
    value *= inverse[:, None] * tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    tl.store(normed + place, value.to(normed.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["limit", "scale", "rows"])
def _backward(
    d_total,  # read only with TOTAL
    d_normed,
    total,
    weight,
    seed,
    inverse_rms,
    d_x,
    d_y,
    d_weight,  # [programs, W], fp32: each program's share
    limit,
    scale,
    rows,
    width,
    TOTAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    column = tl.arange(0, BLOCK_WIDTH)
    inside = column < width
    share = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & inside[None, :]
        place = row[:, None] * width + column[None, :]
        slope = tl.load(d_normed + place, mask=mask, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_rms + row, mask=row < rows, other=0.0)[:, None]
        value = tl.load(total + place, mask=mask, other=0.0).to(tl.float32) * inverse
        share += slope * value
        slope *= factor[None, :]
        along = tl.sum(slope * value, axis=1) / width
        slope = (slope - value * along[:, None]) * inverse
        if TOTAL:
            slope += tl.load(d_total + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(d_x + place, slope.to(d_x.dtype.element_ty), mask=mask)
        if DROPOUT:
            slope *= _factor(seed, place, limit, scale)
        tl.store(d_y + place, slope.to(d_y.dtype.element_ty), mask=mask)
    tl.store(d_weight + tl.program_id(0).to(tl.int64) * width + column, tl.sum(share, axis=0), mask=inside)


class _Blocks(NamedTuple):
    """Launch choices of one kernel."""

    rows: int
    width: int
    warps: int
    stages: int = 1  # of the loop over rows: how many row blocks are under way at once
    programs: int = 0  # per processor, when each walks over many row blocks


def _forward_blocks(width: int) -> _Blocks:
    """Up to 16 elements per thread."""
    block = power_of_2(width)
    rule = _Blocks(max(1, 1024 // block), block, warps=4 if block <= 2048 else min(block // 512, 16))
    return chosen(_OPERATION, f"forward W{block}", rule, {"rows": (1, 2, 4), "warps": (2, 4, 8)})


def _backward_blocks(width: int) -> _Blocks:
    """As in rms_norm: few programs per processor, the next row block fetched while one is computed."""
    block = power_of_2(width)
    rows = max(1, 1024 // block)
    warps = {1024: 4, 2048: 8, 4096: 8, 8192: 16}.get(rows * block, 32)
    rule = _Blocks(rows, block, warps, 2 if block <= 4096 else 1, programs=max(1, 16 // warps))
    return chosen(_OPERATION, f"backward W{block}", rule, {"stages": (1, 2, 3), "programs": (1, 2, 4)})


class _Dropout(NamedTuple):
    """Probability, and the seed if it is not 0."""

    probability: float
    seed: Tensor | None

    @property
    def numbers(self) -> tuple[int, float]:
        """The kernels' `limit` and `scale`."""
        return round(self.probability * LEVELS), 1 / (1 - self.probability)

    def pointer(self, absent: Any) -> Any:
        """The seed, or what stands in for it."""
        return absent if self.seed is None else self.seed


def _forward_launch(x: Any, y: Any, weight: Any, dropout: _Dropout, results: tuple[Any, ...], eps: float) -> Launch:
    width = x.shape[-1]
    blocks = _forward_blocks(width)
    seed = dropout.pointer(weight)
    arguments = (x, y, weight, seed, *results, *dropout.numbers, x.numel() // width, width, eps)
    options = {"BLOCK_ROWS": blocks.rows, "BLOCK_WIDTH": blocks.width, "num_warps": blocks.warps}
    return Launch(_forward, arguments, {"DROPOUT": dropout.probability > 0, **options})


def _backward_launch(
    grads: tuple[Any, Any], saved: tuple[Any, ...], dropout: _Dropout, results: tuple[Any, ...]
) -> Launch:
    total, weight, inverse_rms = saved
    width = total.shape[-1]
    blocks = _backward_blocks(width)
    given = (total if grads[0] is None else grads[0], grads[1], total, weight, dropout.pointer(weight), inverse_rms)
    arguments = (*given, *results, *dropout.numbers, total.numel() // width, width)
    flags = {"TOTAL": grads[0] is not None, "DROPOUT": dropout.probability > 0}
    options = {"BLOCK_ROWS": blocks.rows, "BLOCK_WIDTH": blocks.width, "STAGES": blocks.stages}
    return Launch(_backward, arguments, {**flags, **options, "num_warps": blocks.warps})


def _backward_like(
    x: Tensor, y: Tensor, weight: Tensor, dropout: _Dropout, results: tuple[Tensor, ...]
) -> Iterator[Launch]:
    """The backward launches to come, with tensors of the same dtypes standing in for those that do not exist yet."""
    total, normed, inverse_rms = results
    for grad in (total, None):  # Nothing but the norm reads the last sum of a model.
        yield _backward_launch((grad, normed), (total, weight, inverse_rms), dropout, (x, y, inverse_rms))
    yield sum_rows_launch(inverse_rms, weight, 1, x.shape[-1])


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, weight: Tensor, dropout: _Dropout, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        x, y, weight = x.contiguous(), y.contiguous(), weight.contiguous()
        total = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, y.dtype), device=x.device)
        normed = torch.empty(x.shape, dtype=dtype, device=x.device)
        inverse_rms = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        first = _forward_launch(x, y, weight, dropout, (total, normed, inverse_rms), eps)
        blocks = first.options["BLOCK_ROWS"]
        with torch.cuda.device_of(x):
            if any(ctx.needs_input_grad):
                key = (_OPERATION, x.dtype, y.dtype, weight.dtype, dtype, x.shape[-1] % 16, *first.options.values())
                results = (total, normed, inverse_rms)
                compile_once(key, lambda: [first, *_backward_like(x, y, weight, dropout, results)])
            launch(first.kernel, cdiv(inverse_rms.numel(), blocks), first.arguments, first.options)
        ctx.save_for_backward(total, weight, inverse_rms, dropout.seed)
        ctx.set_materialize_grads(False)
        ctx.probability, ctx.dtypes = dropout.probability, (x.dtype, y.dtype, dtype)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor | None, d_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, inverse_rms, seed = ctx.saved_tensors
        x_dtype, y_dtype, dtype = ctx.dtypes
        width = total.shape[-1]
        rows, blocks = inverse_rms.numel(), _backward_blocks(width)
        programs = min(cdiv(rows, blocks.rows), processors(total.device) * blocks.programs)
        d_x, d_y = (torch.empty(total.shape, dtype=kind, device=total.device) for kind in (x_dtype, y_dtype))
        shares = torch.empty(programs, width, dtype=torch.float32, device=total.device)
        d_normed = torch.zeros_like(total, dtype=dtype) if d_normed is None else d_normed.contiguous()
        grads = (None if d_total is None else d_total.contiguous(), d_normed)
        saved = (total, weight, inverse_rms)
        work = _backward_launch(grads, saved, _Dropout(ctx.probability, seed), (d_x, d_y, shares))
        with torch.cuda.device_of(total):
            launch(work.kernel, programs, work.arguments, work.options)
            d_weight = sum_rows(shares, weight.dtype)
        return d_x, d_y, d_weight, None, None, None


def add_rms_norm(
    x: Tensor, y: Tensor, weight: Tensor, *, dropout: float, seed: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Sum and normalised sum; arguments as in the public function. Computes in fp32."""
    return applied(_AddRMSNorm, x, y, weight, _Dropout(dropout, seed if dropout else None), eps, dtype)


def unsupported(x: Tensor, *_: Any, **__: Any) -> str | None:
    """Why these arguments cannot run here, or None."""
    if x.dtype == torch.float64:
        return "computes in float32, got float64"
    if x.shape[-1] > _WIDEST:
        return f"width must be at most {_WIDEST}, got {x.shape[-1]}"
    return unsupported_place(x)


def _sm90_case(kind: str, width: int, x: str, y: str, dropout: str) -> Sm90Case:
    """`kind`: "forward", "backward" or "last" (a backward without a gradient of the sum)."""
    pointer, size = "*{}:16".format, "i32:16"
    seed = pointer("i64" if dropout == "dropout" else "fp32")
    numbers = {"limit": "i32", "scale": "fp32", "rows": "i32", "width": size}
    flags: dict[str, Any] = {"DROPOUT": dropout == "dropout"}
    if kind == "forward":
        blocks, kernel = _forward_blocks(width), _forward
        signature = {"x": pointer(x), "y": pointer(y), "weight": pointer("fp32"), "seed": seed, "total": pointer(x)}
        signature |= {"normed": pointer(y), "inverse_rms": pointer("fp32"), **numbers, "eps": "fp32"}
    else:
        blocks, kernel = _backward_blocks(width), _backward
        signature = {"d_total": pointer(x), "d_normed": pointer(y), "total": pointer(x), "weight": pointer("fp32")}
        signature |= {"seed": seed, "inverse_rms": pointer("fp32"), "d_x": pointer(x), "d_y": pointer(y)}
        signature |= {"d_weight": pointer("fp32"), **numbers}
        flags |= {"TOTAL": kind == "backward", "STAGES": blocks.stages}
    constexprs = {**flags, "BLOCK_ROWS": blocks.rows, "BLOCK_WIDTH": blocks.width}
    return Sm90Case(f"{kind}-{dropout}-{x}-{y}-w{blocks.width}", kernel, signature, constexprs, blocks.warps, 3)


def sm90_cases() -> Iterator[Sm90Case]:
    """Narrow, usual and widest rows, with and without dropout."""
    for kind in ("forward", "backward"):
        for width in (128, 256, 1536, 2560, _WIDEST):
            yield _sm90_case(kind, width, "fp32", "bf16", "dropout")
        yield _sm90_case(kind, 1536, "fp32", "bf16", "none")
        yield _sm90_case(kind, 1536, "bf16", "bf16", "none")
        yield _sm90_case(kind, 1536, "fp32", "fp32", "dropout")
    yield _sm90_case("last", 1536, "fp32", "bf16", "dropout")
