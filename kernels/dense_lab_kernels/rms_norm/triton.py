"""RMSNorm with a gate in one pass forward and one pass backward (Triton).

A program owns whole rows. The forward keeps one number per row (1 / rms); the backward reads its inputs again. With a
weight it is persistent: each program sums its share of the weight's gradient in registers, and a second, small
reduction adds the shares, so that the result does not depend on scheduling.

Letters: W width. Rows are addressed by two strides, since heads cut from a wider tensor are not evenly spaced.
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

__all__ = ["rms_norm", "sm90_cases", "unsupported"]

_OPERATION = "rms_norm"
_WIDEST = 16384  # one row must fit in the registers of one program


@triton.jit
def _read(pointer, outer, inner, row, heads, column, mask):
    offset = (row // heads) * outer + (row % heads) * inner
    return tl.load(pointer + offset[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _write(pointer, width, row, column, mask, value):
    tl.store(pointer + row[:, None] * width + column[None, :], value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x,
    weight,
    gate,
    out,
    inverse_rms,  # [rows], fp32
    x_outer,
    x_inner,
    gate_outer,
    gate_inner,
    rows,
    heads,
    width,
    eps,
    WEIGHT: tl.constexpr,
    GATE: tl.constexpr,  # "absent", "none" or "silu"
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_WIDTH)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    value = _read(x, x_outer, x_inner, row, heads, column, mask)
    inverse = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / width + eps)
    tl.store(inverse_rms + row, inverse, mask=row < rows)
    value *= inverse[:, None]
    if WEIGHT:
        value *= tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    if GATE != "absent":
        factor = _read(gate, gate_outer, gate_inner, row, heads, column, mask)
        if GATE == "silu":
            factor *= tl.sigmoid(factor)
        value *= factor
    _write(out, width, row, column, mask, value)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    grad,
    x,
    weight,
    gate,
    inverse_rms,
    d_x,
    d_weight,  # [programs, W], fp32: each program's share
    d_gate,
    x_outer,
    x_inner,
    gate_outer,
    gate_inner,
    rows,
    heads,
    width,
    WEIGHT: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    column = tl.arange(0, BLOCK_WIDTH)
    inside = column < width
    share = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    scale = tl.full([BLOCK_WIDTH], 1.0, tl.float32)
    if WEIGHT:
        scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & inside[None, :]
        d_out = tl.load(grad + row[:, None] * width + column[None, :], mask=mask, other=0.0).to(tl.float32)
        normed = _read(x, x_outer, x_inner, row, heads, column, mask)
        inverse = tl.load(inverse_rms + row, mask=row < rows, other=0.0)[:, None]
        normed *= inverse
        if GATE != "absent":
            factor = _read(gate, gate_outer, gate_inner, row, heads, column, mask)
            slope = tl.full([BLOCK_ROWS, BLOCK_WIDTH], 1.0, tl.float32)
            if GATE == "silu":
                open_ = tl.sigmoid(factor)
                slope = open_ * (1.0 + factor * (1.0 - open_))
                factor *= open_
            _write(d_gate, width, row, column, mask, d_out * normed * scale[None, :] * slope)
            d_out *= factor
        if WEIGHT:
            share += d_out * normed
            d_out *= scale[None, :]
        along = tl.sum(d_out * normed, axis=1) / width
        _write(d_x, width, row, column, mask, (d_out - normed * along[:, None]) * inverse)
    if WEIGHT:
        tl.store(d_weight + tl.program_id(0).to(tl.int64) * width + column, tl.sum(share, axis=0), mask=inside)


class _Blocks(NamedTuple):
    """Launch choices of one kernel."""

    rows: int
    width: int
    warps: int
    stages: int = 1  # of the loop over rows: how many row blocks are under way at once
    programs: int = 0  # per processor, when each walks over many row blocks


def _forward_blocks(width: int) -> _Blocks:
    """16 elements per thread, as in dense_fuse."""
    block = power_of_2(width)
    rows = max(1, 2048 // block)
    rule = _Blocks(rows, block, warps=max(4, rows * block // 512) if block <= 8192 else 16)
    return chosen(_OPERATION, f"forward W{block}", rule, {"rows": (1, 2, 4), "warps": (2, 4, 8)})


def _backward_blocks(width: int) -> _Blocks:
    """As in dense_fuse: few programs per processor, the next row block fetched while one is computed."""
    block = power_of_2(width)
    rows = max(1, 1024 // block)
    warps = {1024: 4, 2048: 8, 4096: 8, 8192: 16}.get(rows * block, 32)
    rule = _Blocks(rows, block, warps, 2 if block <= 4096 else 1, programs=max(1, 16 // warps))
    return chosen(_OPERATION, f"backward W{block}", rule, {"stages": (1, 2, 3), "programs": (1, 2, 4)})


class _Problem(NamedTuple):
    """The tensors as rows [outer, heads, W], and what is done with them."""

    x: Tensor
    weight: Tensor | None
    gate: Tensor | None
    activation: str

    @property
    def flags(self) -> dict[str, Any]:
        """What the kernels are specialised for."""
        return {"WEIGHT": self.weight is not None, "GATE": "absent" if self.gate is None else self.activation}

    @property
    def sizes(self) -> tuple[int, ...]:
        """Strides and sizes, in the order of the kernels' arguments."""
        outer, heads, width = self.x.shape
        gate = (0, 0) if self.gate is None else self.gate.stride()[:2]
        return (*self.x.stride()[:2], *gate, outer * heads, heads, width)

    @property
    def key(self) -> tuple[Any, ...]:
        """What decides the compiled code; a key too coarse costs one compilation later, nothing else."""
        width, heads = self.x.shape[2], self.x.shape[1]
        dtypes = tuple(t if t is None else t.dtype for t in self[:3])
        return _OPERATION, self.activation, dtypes, power_of_2(width), width % 16 == 0, heads == 1


def _problem(x: Tensor, weight: Tensor | None, gate: Tensor | None, activation: str) -> _Problem:
    even = x.ndim < 3 or (x.is_contiguous() and (gate is None or gate.is_contiguous()))
    weight = None if weight is None else weight.contiguous()
    return _Problem(_as_rows(x, even), weight, None if gate is None else _as_rows(gate, even), activation)


def _as_rows(tensor: Tensor, even: bool) -> Tensor:
    """[..., W] as [outer, heads, W] with neighbouring columns; one head when rows follow each other evenly.

    Heads cut from a wider tensor need no copy.
    """
    rows = tensor.reshape(-1, 1, tensor.shape[-1]) if even else tensor.flatten(0, -3)
    return rows if rows.stride(2) == 1 else rows.contiguous()


def _forward_launch(problem: _Problem, out: Any, inverse_rms: Any, eps: float) -> Launch:
    blocks = _forward_blocks(problem.x.shape[2])
    arguments = (*problem[:3], out, inverse_rms, *problem.sizes, eps)
    options = {"BLOCK_ROWS": blocks.rows, "BLOCK_WIDTH": blocks.width, "num_warps": blocks.warps}
    return Launch(_forward, arguments, {**problem.flags, **options})


def _backward_launch(problem: _Problem, grad: Any, inverse_rms: Any, results: tuple[Any, ...]) -> Launch:
    blocks = _backward_blocks(problem.x.shape[2])
    arguments = (grad, *problem[:3], inverse_rms, *results, *problem.sizes)
    options = {"BLOCK_ROWS": blocks.rows, "BLOCK_WIDTH": blocks.width, "STAGES": blocks.stages}
    return Launch(_backward, arguments, {**problem.flags, **options, "num_warps": blocks.warps})


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        gate: Tensor | None,
        activation: str,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        problem = _problem(x, weight, gate, activation)
        outer, heads, _ = problem.x.shape
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        inverse_rms = torch.empty(outer * heads, dtype=torch.float32, device=x.device)
        first = _forward_launch(problem, out, inverse_rms, eps)
        with torch.cuda.device_of(x):
            if any(ctx.needs_input_grad):
                shares = inverse_rms if weight is not None else None
                backward = _backward_launch(problem, out, inverse_rms, (problem.x, shares, problem.gate))
                summing = [] if weight is None else [sum_rows_launch(inverse_rms, problem.weight, 1, x.shape[-1])]
                compile_once((*problem.key, dtype), lambda: [first, backward, *summing])
            launch(first.kernel, cdiv(outer * heads, first.options["BLOCK_ROWS"]), first.arguments, first.options)
        ctx.save_for_backward(x, weight, gate, inverse_rms)
        ctx.activation = activation
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gate, inverse_rms = ctx.saved_tensors
        problem = _problem(x, weight, gate, ctx.activation)
        outer, heads, width = problem.x.shape
        blocks = _backward_blocks(width)
        programs = min(cdiv(outer * heads, blocks.rows), processors(x.device) * blocks.programs)
        d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        d_gate = None if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=x.device)
        shares = None if weight is None else torch.empty(programs, width, dtype=torch.float32, device=x.device)
        work = _backward_launch(problem, grad.contiguous(), inverse_rms, (d_x, shares, d_gate))
        with torch.cuda.device_of(x):
            launch(work.kernel, programs, work.arguments, work.options)
            d_weight = None if shares is None else sum_rows(shares, weight.dtype)
        return d_x, d_weight, d_gate, None, None, None


def rms_norm(
    x: Tensor, weight: Tensor | None, gate: Tensor | None, *, activation: str, eps: float, dtype: torch.dtype
) -> Tensor:
    """[..., W] in `dtype`; arguments as in the public function. Computes in fp32."""
    return applied(_RMSNorm, x, weight, gate, activation, eps, dtype)


def unsupported(x: Tensor, weight: Tensor | None, gate: Tensor | None, **_: Any) -> str | None:
    """Why these arguments cannot run here, or None."""
    if x.dtype == torch.float64:
        return "computes in float32, got float64"
    if x.shape[-1] > _WIDEST:
        return f"width must be at most {_WIDEST}, got {x.shape[-1]}"
    return unsupported_place(x)


def _sm90_case(kind: str, width: int, x: str, out: str, weight: str | None, gate: str) -> Sm90Case:
    """`kind`: "forward" or "backward"; `gate`: "absent", "none" or "silu"."""
    pointer, size, absent = "*{}:16".format, "i32:16", "constexpr"
    gates = absent if gate == "absent" else pointer("bf16")
    weights = absent if weight is None else pointer(weight)
    flags: dict[str, Any] = {"WEIGHT": weight is not None, "GATE": gate}
    tensors = {"x": pointer(x), "weight": weights, "gate": gates}
    strides = dict.fromkeys(("x_outer", "x_inner", "gate_outer", "gate_inner"), size)
    sizes = {**strides, "rows": "i32", "heads": "i32", "width": size}
    if kind == "forward":
        blocks, kernel = _forward_blocks(width), _forward
        signature = {**tensors, "out": pointer(out), "inverse_rms": pointer("fp32"), **sizes, "eps": "fp32"}
    else:
        blocks, kernel = _backward_blocks(width), _backward
        shares = absent if weight is None else pointer("fp32")
        results = {"inverse_rms": pointer("fp32"), "d_x": pointer(x), "d_weight": shares, "d_gate": gates}
        signature = {"grad": pointer(out), **tensors, **results, **sizes}
        flags["STAGES"] = blocks.stages
    missing = [name for name, type_ in signature.items() if type_ == absent]
    constexprs = {**flags, "BLOCK_ROWS": blocks.rows, "BLOCK_WIDTH": blocks.width, **dict.fromkeys(missing)}
    signature = {name: type_ for name, type_ in signature.items() if name not in missing}
    name = f"{kind}-{gate}-{'weight' if weight else 'plain'}-{x}-{out}-w{blocks.width}"
    return Sm90Case(name, kernel, signature, constexprs, blocks.warps, 3)


def sm90_cases() -> Iterator[Sm90Case]:
    """Norms of the residual stream, of heads with a gate, and the widest row."""
    for kind in ("forward", "backward"):
        for width in (128, 1536, _WIDEST):
            yield _sm90_case(kind, width, "fp32", "bf16", "fp32", "absent")
        for width in (64, 512, 1536):
            yield _sm90_case(kind, width, "bf16", "bf16", "fp32", "silu")
            yield _sm90_case(kind, width, "bf16", "bf16", None, "silu")
        yield _sm90_case(kind, 512, "bf16", "bf16", None, "none")
        yield _sm90_case(kind, 1536, "fp32", "fp32", "fp32", "absent")
