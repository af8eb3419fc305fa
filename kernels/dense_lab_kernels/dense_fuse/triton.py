"""Dense fusion in one pass forward and one pass backward (Triton).

The forward keeps one number per row (1 / rms); the backward reads its inputs again and recomputes the rest. A program
owns whole rows. The backward is persistent: each program walks over many rows and holds its share of the weight's
gradient in registers; a second, small reduction adds the shares, so that the result does not depend on scheduling.

Letters: W width, m sources. With one gate for all sources their gradients are equal: one tensor is written and returned
for all of them; without a gate it is the gradient of `own` itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    sum_rows,
    sum_rows_launch,
    unsupported_place,
)

__all__ = ["dense_fuse", "sm90_cases", "unsupported"]

_OPERATION = "dense_fuse"
_WIDEST = 16384  # one row must fit in the registers of one program
_MOST_SOURCES = 16  # the kernels are unrolled over the sources


@triton.jit
def _read(pointer, stride, row, column, mask):
    return tl.load(pointer + row[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _write(pointer, width, row, column, mask, value):
    tl.store(pointer + row[:, None] * width + column[None, :], value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _activate(gate, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        gate = gate * tl.sigmoid(gate)
    elif ACTIVATION == "sigmoid":
        gate = tl.sigmoid(gate)
    return gate


@triton.jit
def _activate_slope(gate, ACTIVATION: tl.constexpr):
    """The activation and its derivative."""
    value = gate
    slope = tl.full(gate.shape, 1.0, tl.float32)
    if ACTIVATION == "silu":
        open_ = tl.sigmoid(gate)
        value = gate * open_
        slope = open_ + value * (1.0 - open_)
    elif ACTIVATION == "sigmoid":
        value = tl.sigmoid(gate)
        slope = value * (1.0 - value)
    return value, slope


@triton.jit(do_not_specialize=["rows"])
def _forward(
    own,
    sources,  # m pointers
    gates,  # None, 1 or m pointers
    weight,
    out,
    inverse_rms,  # [rows], fp32
    own_stride,
    source_strides,
    gate_strides,
    rows,
    width,
    eps,
    GATES: tl.constexpr,  # "none", "shared" or "each"
    ACTIVATION: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_WIDTH)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    fused = _read(own, own_stride, row, column, mask)
    if GATES == "each":
        for i in tl.static_range(len(sources)):
            gate = _activate(_read(gates[i], gate_strides[i], row, column, mask), ACTIVATION)
            fused += gate * _read(sources[i], source_strides[i], row, column, mask)
    else:
        total = _read(sources[0], source_strides[0], row, column, mask)
        for i in tl.static_range(1, len(sources)):
            total += _read(sources[i], source_strides[i], row, column, mask)
        if GATES == "shared":
            total *= _activate(_read(gates[0], gate_strides[0], row, column, mask), ACTIVATION)
        fused += total
    if NORM:
        inverse = 1.0 / tl.sqrt(tl.sum(fused * fused, axis=1) / width + eps)
        tl.store(inverse_rms + row, inverse, mask=row < rows)
        scale = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
        fused = fused * inverse[:, None] * scale[None, :]
    _write(out, width, row, column, mask, fused)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    grad,
    own,
    sources,
    gates,
    weight,
    inverse_rms,
    d_own,  # written only with NORM; without it, it is grad
    d_sources,  # like gates
    d_gates,
    d_weight,  # [programs, W], fp32: each program's share
    grad_stride,
    own_stride,
    source_strides,
    gate_strides,
    rows,
    width,
    GATES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    column = tl.arange(0, BLOCK_WIDTH)
    inside = column < width
    share = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    scale = tl.zeros([BLOCK_WIDTH], tl.float32)
    if NORM:
        scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & inside[None, :]
        d_fused = _read(grad, grad_stride, row, column, mask)
        total = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
        gate = total
        slope = total
        if GATES == "shared":
            gate, slope = _activate_slope(_read(gates[0], gate_strides[0], row, column, mask), ACTIVATION)
        if GATES == "shared" or (GATES == "none" and NORM):
            for i in tl.static_range(len(sources)):
                total += _read(sources[i], source_strides[i], row, column, mask)
        if NORM:
            normed = _read(own, own_stride, row, column, mask)
            if GATES == "shared":
                normed += gate * total
            elif GATES == "none":
                normed += total
            else:
                for i in tl.static_range(len(sources)):
                    each = _activate(_read(gates[i], gate_strides[i], row, column, mask), ACTIVATION)
                    normed += each * _read(sources[i], source_strides[i], row, column, mask)
            inverse = tl.load(inverse_rms + row, mask=row < rows, other=0.0)[:, None]
            normed *= inverse
            share += d_fused * normed
            d_normed = d_fused * scale[None, :]
            along = tl.sum(d_normed * normed, axis=1) / width
            d_fused = (d_normed - normed * along[:, None]) * inverse
            _write(d_own, width, row, column, mask, d_fused)
        if GATES == "shared":
            _write(d_sources[0], width, row, column, mask, d_fused * gate)
            _write(d_gates[0], width, row, column, mask, d_fused * total * slope)
        if GATES == "each":
            # Read a second time (from cache) rather than hold 2 m tiles in registers.
            for i in tl.static_range(len(sources)):
                source = _read(sources[i], source_strides[i], row, column, mask)
                each, each_slope = _activate_slope(_read(gates[i], gate_strides[i], row, column, mask), ACTIVATION)
                _write(d_sources[i], width, row, column, mask, d_fused * each)
                _write(d_gates[i], width, row, column, mask, d_fused * source * each_slope)
    if NORM:
        tl.store(d_weight + tl.program_id(0).to(tl.int64) * width + column, tl.sum(share, axis=0), mask=inside)


class _Blocks(NamedTuple):
    """Launch choices of one kernel."""

    rows: int
    width: int
    warps: int
    stages: int = 1  # of the loop over rows: how many row blocks are under way at once
    programs: int = 0  # per processor, when each walks over many row blocks
    registers: int | None = None  # most per thread, so that as many programs fit


def _forward_blocks(width: int) -> _Blocks:
    """Four warps up to 4096 columns: many small programs keep more loads under way than few large ones."""
    block = power_of_2(width)
    return _Blocks(max(1, 1024 // block), block, warps=4 if block <= 4096 else block // 1024)


def _backward_blocks(width: int, row_bytes: int, gates: str) -> _Blocks:
    """Registers allow few programs per processor, so the next row blocks are fetched while one is computed.

    row_bytes: read per row from all streams together. Three stages while two row blocks fit shared memory (two stages
    are slower than one); with one gate per source the streams are many, and read twice, so that they fill the memory
    pipeline without.
    """
    block = power_of_2(width)
    rows = max(1, 1024 // block)
    warps = {1024: 4, 2048: 8, 4096: 8, 8192: 16}.get(rows * block, 32)
    programs = {1024: 5, 2048: 2}.get(rows * block, 1)
    fetched = 2 * rows * row_bytes * block // width * programs
    stages = 3 if gates != "each" and fetched <= 160 * 1024 else 1
    if stages == 1 and rows * block == 4096:
        programs = 2
    return _Blocks(rows, block, warps, stages, programs, registers=96 if programs == 5 else None)


class _Problem(NamedTuple):
    """The streams as matrices of rows, and what is done with them."""

    own: Tensor
    sources: tuple[Tensor, ...]
    gates: tuple[Tensor, ...]
    weight: Tensor | None
    activation: str

    @property
    def flags(self) -> dict[str, Any]:
        """What the kernels are specialised for."""
        kind = "none" if not self.gates else "shared" if len(self.gates) == 1 else "each"
        return {"GATES": kind, "ACTIVATION": self.activation, "NORM": self.weight is not None}

    def backward_blocks(self) -> _Blocks:
        """Launch choices of the backward, whose gradient comes in the dtype of own."""
        width = self.own.shape[1]
        row_bytes = width * sum(t.element_size() for t in (self.own, self.own, *self.sources, *self.gates))
        return _backward_blocks(width, row_bytes, self.flags["GATES"])

    @property
    def strides(self) -> tuple[Any, ...]:
        """Row strides and sizes, in the order of the kernels' arguments."""
        return (
            self.own.stride(0),
            tuple(t.stride(0) for t in self.sources),
            tuple(t.stride(0) for t in self.gates) or None,
            *self.own.shape,
        )


def _as_rows(tensor: Tensor) -> Tensor:
    """[..., W] as [rows, W] with neighbouring columns; a half of a split needs no copy."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _problem(
    own: Tensor, sources: Sequence[Tensor], gates: Sequence[Tensor], weight: Tensor | None, activation: str
) -> _Problem:
    return _Problem(
        _as_rows(own),
        tuple(map(_as_rows, sources)),
        tuple(map(_as_rows, gates)),
        None if weight is None else weight.contiguous(),
        activation,
    )


def _forward_launch(problem: _Problem, out: Any, inverse_rms: Any, eps: float) -> Launch:
    own, sources, gates, weight, _ = problem
    blocks = _forward_blocks(own.shape[1])
    arguments = (own, sources, gates or None, weight, out, inverse_rms, *problem.strides, eps)
    options = {"BLOCK_ROWS": blocks.rows, "BLOCK_WIDTH": blocks.width, "num_warps": blocks.warps}
    return Launch(_forward, arguments, {**problem.flags, **options})


def _backward_launch(problem: _Problem, grad: Any, inverse_rms: Any, results: tuple[Any, ...]) -> Launch:
    own, sources, gates, weight, _ = problem
    blocks = problem.backward_blocks()
    stride = grad.stride(0) if isinstance(grad, Tensor) else own.shape[1]
    results = tuple(result or None if isinstance(result, tuple) else result for result in results)
    arguments = (grad, own, sources, gates or None, weight, inverse_rms, *results, stride, *problem.strides)
    options = {
        "BLOCK_ROWS": blocks.rows,
        "BLOCK_WIDTH": blocks.width,
        "STAGES": blocks.stages,
        "num_warps": blocks.warps,
        "maxnreg": blocks.registers,
    }
    return Launch(_backward, arguments, {**problem.flags, **options})


def _backward_like(problem: _Problem, out: Tensor, inverse_rms: Tensor | None) -> Iterator[Launch]:
    """The backward launches to come, with tensors of the same dtypes standing in for those that do not exist yet."""
    results = (out, problem.sources[: len(problem.gates)], problem.gates, inverse_rms)
    yield _backward_launch(problem, _as_rows(out), inverse_rms, results)
    if problem.weight is not None:
        yield sum_rows_launch(inverse_rms, problem.weight, *problem.own.shape)


def _key(problem: _Problem) -> tuple[Any, ...]:
    """What decides the compiled code; a key too coarse costs one compilation later, nothing else."""
    own, sources, gates, weight, activation = problem
    width = own.shape[1]
    dtypes = tuple(t.dtype for t in (own, *sources, *gates, *(() if weight is None else (weight,))))
    return _OPERATION, activation, len(sources), dtypes, power_of_2(width), width % 16 == 0


class _DenseFuse(torch.autograd.Function):
    """Streams travel as one flat list: m sources, then the gates."""

    @staticmethod
    def forward(
        ctx: Any, own: Tensor, weight: Tensor | None, activation: str, eps: float, m: int, *streams: Tensor
    ) -> Tensor:
        problem = _problem(own, streams[:m], streams[m:], weight, activation)
        out = torch.empty_like(own, memory_format=torch.contiguous_format)
        rows, width = problem.own.shape
        inverse_rms = None if weight is None else torch.empty(rows, dtype=torch.float32, device=own.device)
        blocks = _forward_blocks(width)
        first = _forward_launch(problem, out, inverse_rms, eps)
        with torch.cuda.device_of(own):
            if any(ctx.needs_input_grad):
                compile_once(_key(problem), lambda: [first, *_backward_like(problem, out, inverse_rms)])
            launch(first.kernel, cdiv(rows, blocks.rows), first.arguments, first.options)
        ctx.save_for_backward(own, weight, inverse_rms, *streams)
        ctx.activation, ctx.m = activation, m
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        own, weight, inverse_rms, *streams = ctx.saved_tensors
        if weight is None and len(streams) == ctx.m:
            return grad, None, None, None, None, *(grad.to(s.dtype) for s in streams)
        problem = _problem(own, streams[: ctx.m], streams[ctx.m :], weight, ctx.activation)
        return _run_backward(problem, grad, inverse_rms, own, streams)


def _run_backward(
    problem: _Problem, grad: Tensor, inverse_rms: Tensor | None, own: Tensor, streams: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Gradients of own, weight, the three plain arguments (None) and the streams."""
    rows, width = problem.own.shape
    m, gates, norm = len(problem.sources), problem.gates, problem.weight is not None
    blocks = problem.backward_blocks()
    programs = min(cdiv(rows, blocks.rows), processors(own.device) * blocks.programs)
    d_own = torch.empty_like(own, memory_format=torch.contiguous_format) if norm else grad
    d_sources = tuple(_empty_rows(s) for s in problem.sources[: len(gates)])
    d_gates = tuple(_empty_rows(g) for g in gates)
    shares = torch.empty(programs, width, dtype=torch.float32, device=own.device) if norm else None
    work = _backward_launch(problem, _as_rows(grad), inverse_rms, (d_own, d_sources, d_gates, shares))
    with torch.cuda.device_of(own):
        launch(work.kernel, programs, work.arguments, work.options)
        d_weight = None if shares is None else sum_rows(shares, problem.weight.dtype)
    written = d_sources or (d_own,)
    each = [written[i % len(written)] for i in range(m)] + list(d_gates)
    return d_own, d_weight, None, None, None, *(d.view(s.shape).to(s.dtype) for d, s in zip(each, streams, strict=True))


def _empty_rows(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def dense_fuse(
    own: Tensor,
    sources: tuple[Tensor, ...],
    gate: Tensor | tuple[Tensor, ...] | None = None,
    weight: Tensor | None = None,
    *,
    activation: str = "none",
    eps: float = 1e-6,
) -> Tensor:
    """[..., W] in own's dtype; arguments as in the public function. Computes in fp32."""
    gates = () if gate is None else (gate,) if isinstance(gate, Tensor) else gate
    return _DenseFuse.apply(own, weight, activation, eps, len(sources), *sources, *gates)


def unsupported(
    own: Tensor,
    sources: tuple[Tensor, ...],
    gate: Tensor | tuple[Tensor, ...] | None = None,
    weight: Tensor | None = None,
    **_: Any,
) -> str | None:
    """Why these arguments cannot run here, or None."""
    if own.dtype == torch.float64:
        return "computes in float32, got float64"
    if own.shape[-1] > _WIDEST:
        return f"width must be at most {_WIDEST}, got {own.shape[-1]}"
    if len(sources) > _MOST_SOURCES:
        return f"at most {_MOST_SOURCES} sources, got {len(sources)}"
    return unsupported_place(own)


def _sm90_case(
    kind: str, gates: str, width: int, m: int = 1, dtype: str = "bf16", norm: bool = True, activation: str = "silu"
) -> Sm90Case:
    """`kind`: "forward" or "backward"."""
    stream, size = f"*{dtype}:16", "i32:16"
    n = {"none": 0, "shared": 1, "each": m}[gates]
    weight, scratch = (stream, "*fp32:16") if norm else ("constexpr", "constexpr")
    gate = (stream,) * n or "constexpr"
    streams = {"own": stream, "sources": (stream,) * m, "gates": gate, "weight": weight}
    strides = {"own_stride": size, "source_strides": (size,) * m, "gate_strides": (size,) * n or "constexpr"}
    flags: dict[str, Any] = {"GATES": gates, "ACTIVATION": activation, "NORM": norm}
    if kind == "forward":
        blocks, kernel = _forward_blocks(width), _forward
        signature = {**streams, "out": stream, "inverse_rms": scratch, **strides, "rows": "i32", "width": size}
        signature["eps"] = "fp32"
    else:
        row_bytes = width * (2 + m + n) * (4 if dtype == "fp32" else 2)
        blocks, kernel = _backward_blocks(width, row_bytes, gates), _backward
        results = {"d_own": stream, "d_sources": gate, "d_gates": gate, "d_weight": scratch}
        sizes = {"grad_stride": size, **strides, "rows": "i32", "width": size}
        signature = {"grad": stream, **streams, "inverse_rms": scratch, **results, **sizes}
        flags["STAGES"] = blocks.stages
    absent = [name for name, kind in signature.items() if kind == "constexpr"]
    constexprs = {**flags, "BLOCK_ROWS": blocks.rows, "BLOCK_WIDTH": blocks.width, **dict.fromkeys(absent)}
    signature = {name: kind for name, kind in signature.items() if name not in absent}
    name = f"{kind}-{gates}{m}-{activation}-{'norm' if norm else 'plain'}-{dtype}-w{blocks.width}"
    return Sm90Case(name, kernel, signature, constexprs, blocks.warps, 3)


def sm90_cases() -> Iterator[Sm90Case]:
    """Both kernels over widths, numbers of sources, gate forms and dtypes."""
    for kind in ("forward", "backward"):
        for width, m in product((32, 256, 768, 3072, _WIDEST), (1, 2)):
            yield _sm90_case(kind, "shared", width, m)
        for gates in ("none", "each"):
            yield _sm90_case(kind, gates, 3072, 4)
        yield _sm90_case(kind, "shared", 3072, dtype="fp32")
        yield _sm90_case(kind, "shared", 3072, activation="sigmoid")
        yield _sm90_case(kind, "each", 3072, 2, norm=False)
