"""Dense fusion in one pass forward and one pass backward (Triton).

The forward keeps one number per row (1 / rms); the backward reads its inputs again and recomputes the rest. A program
owns whole rows. The backward is persistent: each program walks over many rows and holds its share of the weight's
gradient in registers; a second, small reduction adds the shares, so that the result does not depend on scheduling.

Letters: W width, m sources, R width of a gate's bottleneck. Where the gradients of all sources are equal (one gate or
none, no activation of the streams), one tensor is written and returned for all of them; without a gate it is the
gradient of `own` itself.

A gate given as a bottleneck is multiplied out before the pass. Large ones are let go and multiplied out again in the
backward: a product over a few dozen columns costs less than the memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
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
from dense_lab_kernels.dense_fuse.reference import Bottleneck
from dense_lab_kernels.dense_fuse.triton_kernels import backward_kernel, forward_kernel, step_kernel
from dense_lab_kernels.rms_norm.triton import rms_norm

__all__ = ["dense_fuse", "sm90_cases", "unsupported"]

_OPERATION = "dense_fuse"
_WIDEST = 16384  # one row must fit in the registers of one program
_MOST_SOURCES = 16  # the kernels are unrolled over the sources
_FEW_ROWS = 64  # up to here launches cost more than work
_KEPT_GATE = 2**23  # elements of a gate that is kept for the backward rather than multiplied out again


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
    rule = _Blocks(max(1, 1024 // block), block, warps=4 if block <= 4096 else block // 1024)
    return chosen(_OPERATION, f"forward W{block}", rule, {"rows": (1, 2, 4), "warps": (1, 2, 4, 8)})


def _backward_blocks(width: int, row_bytes: int, gates: str, stream: str = "none") -> _Blocks:
    """Registers allow few programs per processor, so the next row blocks are fetched while one is computed.

    row_bytes: read per row from all streams together. Three stages while two row blocks fit shared memory (two stages
    are slower than one); with one gate per source the streams are many, and read twice, so that they fill the memory
    pipeline without.
    """
    block = power_of_2(width)
    rows = max(1, 1024 // block)
    warps = {1024: 4, 2048: 8, 4096: 8, 8192: 16}.get(rows * block, 32)
    programs = {1024: 5 if stream == "none" else 4, 2048: 2}.get(rows * block, 1)  # Slopes of streams take registers.
    fetched = 2 * rows * row_bytes * block // width * programs
    stages = 3 if gates != "each" and fetched <= 160 * 1024 else 1
    if stages == 1 and rows * block == 4096:
        programs = 2
    rule = _Blocks(rows, block, warps, stages, programs, registers={5: 96, 4: 128}.get(programs))
    return chosen(
        _OPERATION,
        f"backward W{block}, gates {gates}, streams {stream}",
        rule,
        {"stages": (1, 2, 3), "programs": (1, 2, 4)},
    )


class _Options(NamedTuple):
    """What is done with the streams besides adding them."""

    activation: str
    stream: str
    scale: float
    eps: float


class _Problem(NamedTuple):
    """The streams as matrices of rows, and what is done with them."""

    own: Tensor
    sources: tuple[Tensor, ...]
    gates: tuple[Tensor, ...]
    weight: Tensor | None
    options: _Options

    @property
    def flags(self) -> dict[str, Any]:
        """What the kernels are specialised for."""
        kind = "none" if not self.gates else "shared" if len(self.gates) == 1 else "each"
        options = self.options
        return {
            "GATES": kind,
            "ACTIVATION": options.activation,
            "STREAM": options.stream,
            "NORM": self.weight is not None,
        }

    def backward_blocks(self) -> _Blocks:
        """Launch choices of the backward, whose gradient comes in the dtype of own."""
        width = self.own.shape[1]
        row_bytes = width * sum(t.element_size() for t in (self.own, self.own, *self.sources, *self.gates))
        return _backward_blocks(width, row_bytes, self.flags["GATES"], self.options.stream)

    def source_gradients(self, read: bool) -> int:
        """How many of them are written; `read`: own is read by later layers too, so that its gradient is another."""
        if self.options.stream != "none" or len(self.gates) > 1:
            return len(self.sources)
        return 1 if self.gates or read else 0

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
    own: Tensor, sources: Sequence[Tensor], gates: Sequence[Tensor], weight: Tensor | None, options: _Options
) -> _Problem:
    return _Problem(
        _as_rows(own),
        tuple(map(_as_rows, sources)),
        tuple(map(_as_rows, gates)),
        None if weight is None else weight.contiguous(),
        options,
    )


def _forward_launch(problem: _Problem, out: Any, inverse_rms: Any) -> Launch:
    own, sources, gates, weight, options = problem
    blocks = _forward_blocks(own.shape[1])
    arguments = (own, sources, gates or None, weight, out, inverse_rms, *problem.strides, options.eps, options.scale)
    sizes = {"BLOCK_ROWS": blocks.rows, "BLOCK_WIDTH": blocks.width, "num_warps": blocks.warps}
    return Launch(forward_kernel, arguments, {**problem.flags, **sizes})


def _backward_launch(problem: _Problem, grads: tuple[Any, Any], inverse_rms: Any, results: tuple[Any, ...]) -> Launch:
    """grads: of the result, and of own as later layers read it, or None."""
    own, sources, gates, weight, options = problem
    blocks = problem.backward_blocks()
    stride = grads[0].stride(0)
    results = tuple(result or None if isinstance(result, tuple) else result for result in results)
    grads, read = (grads[0], own if grads[1] is None else grads[1]), int(grads[1] is not None)
    streams = (*grads, own, sources, gates or None, weight, inverse_rms, *results)
    sizes = {
        "BLOCK_ROWS": blocks.rows,
        "BLOCK_WIDTH": blocks.width,
        "STAGES": blocks.stages,
        "num_warps": blocks.warps,
        "maxnreg": blocks.registers,
    }
    return Launch(
        backward_kernel, (*streams, stride, *problem.strides, options.scale, read), {**problem.flags, **sizes}
    )


def _backward_like(problem: _Problem, out: Tensor, inverse_rms: Tensor | None, read: bool) -> Iterator[Launch]:
    """The backward launches to come, with tensors of the same dtypes standing in for those that do not exist yet."""
    out = _as_rows(out)
    d_own = out if _writes_own(problem, read) else None
    results = (d_own, problem.sources[: problem.source_gradients(read)], problem.gates, inverse_rms)
    yield _backward_launch(problem, (out, None), inverse_rms, results)
    if problem.weight is not None:
        yield sum_rows_launch(inverse_rms, problem.weight, *problem.own.shape)


def _writes_own(problem: _Problem, read: bool) -> bool:
    """Whether the gradient of own is another tensor than that of the result."""
    options = problem.options
    return problem.weight is not None or options.stream != "none" or options.scale != 1 or read


def _key(problem: _Problem, read: bool) -> tuple[Any, ...]:
    """What decides the compiled code; a key too coarse costs one compilation later, nothing else."""
    own, sources, gates, weight, options = problem
    width = own.shape[1]
    dtypes = tuple(t.dtype for t in (own, *sources, *gates, *(() if weight is None else (weight,))))
    kinds = options.activation, options.stream, read
    return _OPERATION, kinds, len(sources), dtypes, power_of_2(width), width % 16 == 0


class _Streams(NamedTuple):
    """How the flat list of tensors that travels through autograd is cut: m sources, then gates or a bottleneck."""

    sources: int
    gate: str  # "factors", or "bottleneck": its hidden numbers and its weight
    own: str  # "read" by later layers, or "unread"


class _DenseFuse(torch.autograd.Function):
    """Results: what is fused, and own once more, for later layers."""

    @staticmethod
    def forward(
        ctx: Any, own: Tensor, weight: Tensor | None, options: _Options, cut: _Streams, *streams: Tensor
    ) -> tuple[Tensor, Tensor]:
        gates, narrow = streams[cut.sources :], None
        if cut.gate == "bottleneck":
            narrow = torch.nn.functional.silu(_as_rows(gates[0]))
            factors = (narrow @ gates[1].t(),)
        problem = _problem(own, streams[: cut.sources], gates if narrow is None else factors, weight, options)
        out = torch.empty_like(own, memory_format=torch.contiguous_format)
        rows = len(problem.own)
        inverse_rms = None if weight is None else torch.empty(rows, dtype=torch.float32, device=own.device)
        first, read = _forward_launch(problem, out, inverse_rms), cut.own == "read"
        with torch.cuda.device_of(own):
            if any(ctx.needs_input_grad):
                compile_once(_key(problem, read), lambda: [first, *_backward_like(problem, out, inverse_rms, read)])
            launch(first.kernel, cdiv(rows, first.options["BLOCK_ROWS"]), first.arguments, first.options)
        kept = problem.gates[0] if narrow is not None and own.numel() <= _KEPT_GATE else None
        ctx.save_for_backward(own, weight, inverse_rms, narrow, kept, *streams)
        ctx.options, ctx.cut = options, cut
        ctx.set_materialize_grads(False)
        return out, own.view_as(own)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, own_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        own, weight, inverse_rms, narrow, factors, *streams = ctx.saved_tensors
        sources, gates = streams[: ctx.cut.sources], streams[ctx.cut.sources :]
        if grad is None:
            return own_grad, *(None,) * (3 + len(streams))
        if narrow is not None:
            gates = [narrow @ gates[1].t() if factors is None else factors]
        problem = _problem(own, sources, gates, weight, ctx.options)
        d_own, d_weight, each, d_gates = _run_backward(problem, (grad, own_grad), inverse_rms, own)
        if narrow is not None:
            hidden, weight = streams[-2:]
            d_narrow = torch.ops.aten.silu_backward(d_gates[0] @ weight, _as_rows(hidden)).view(hidden.shape)
            d_gates = [d_narrow, d_gates[0].t() @ narrow]
        found = (d.view(s.shape).to(s.dtype) for d, s in zip([*each, *d_gates], streams, strict=True))
        return d_own, d_weight, None, None, *found


def _run_backward(
    problem: _Problem, grads: tuple[Tensor, Tensor | None], inverse_rms: Tensor | None, own: Tensor
) -> tuple[Tensor, Tensor | None, list[Tensor], list[Tensor]]:
    """Gradients of own, weight, sources and gates."""
    rows, width = problem.own.shape
    gates, norm, read = problem.gates, problem.weight is not None, grads[1] is not None
    if not _writes_own(problem, read) and not gates:
        return grads[0], None, [grads[0]] * len(problem.sources), []
    blocks = problem.backward_blocks()
    programs = min(cdiv(rows, blocks.rows), processors(own.device) * blocks.programs)
    d_own = torch.empty_like(own, memory_format=torch.contiguous_format) if _writes_own(problem, read) else None
    d_sources = tuple(_empty_rows(s) for s in problem.sources[: problem.source_gradients(read)])
    d_gates = tuple(_empty_rows(g) for g in gates)
    shares = torch.empty(programs, width, dtype=torch.float32, device=own.device) if norm else None
    upstream = (_as_rows(grads[0]), None if grads[1] is None else grads[1].contiguous())
    work = _backward_launch(problem, upstream, inverse_rms, (d_own, d_sources, d_gates, shares))
    with torch.cuda.device_of(own):
        launch(work.kernel, programs, work.arguments, work.options)
        d_weight = None if shares is None else sum_rows(shares, problem.weight.dtype)
    d_own = grads[0] if d_own is None else d_own
    written = d_sources or (d_own,)
    return d_own, d_weight, [written[i % len(written)] for i in range(len(problem.sources))], list(d_gates)


def _empty_rows(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def dense_fuse(
    own: Tensor,
    sources: tuple[Tensor, ...],
    gate: Tensor | tuple[Tensor, ...] | Bottleneck | None = None,
    weight: Tensor | None = None,
    *,
    activation: str = "none",
    stream_activation: str = "none",
    scale: float = 1.0,
    eps: float = 1e-6,
    returning: str = "fused",
) -> Tensor | tuple[Tensor, Tensor]:
    """As the public function. Computes in fp32; a bottleneck's gate is rounded to its dtype."""
    options = _Options(activation, stream_activation, scale, eps)
    if isinstance(gate, Bottleneck) and _is_step(own, sources, gate, weight):
        fused, own = _step(own, sources, gate, weight, options), own
    else:
        gates = () if gate is None else (gate,) if isinstance(gate, Tensor) else gate
        kind = "bottleneck" if isinstance(gate, Bottleneck) else "factors"
        cut = _Streams(len(sources), kind, "read" if returning == "fused and own" else "unread")
        fused, own = applied(_DenseFuse, own, weight, options, cut, *sources, *gates)
    return (fused, own) if returning == "fused and own" else fused


def _is_step(own: Tensor, sources: Sequence[Tensor], gate: Bottleneck, weight: Tensor | None) -> bool:
    """Whether these are few rows, with contiguous columns, that no gradient is wanted for."""
    given = (own, *sources, *gate, *(() if weight is None else (weight,)))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return False
    return own.numel() <= _FEW_ROWS * own.shape[-1] and gate.hidden.shape[-1] <= 256


def _step_blocks(inner: int) -> tuple[int, int]:
    """Columns of a program, and of the bottleneck: 8192 weights, 64 per thread of 4 warps."""
    inner = max(power_of_2(inner), 16)
    return 8192 // inner, inner


def _step(own: Tensor, sources: Sequence[Tensor], gate: Bottleneck, weight: Tensor | None, options: _Options) -> Tensor:
    """Sums in one launch, their norm in another."""
    flat, hidden = _as_rows(own), _as_rows(gate.hidden)
    streams = tuple(map(_as_rows, sources))
    (rows, width), inner = flat.shape, hidden.shape[1]
    block, block_inner = _step_blocks(inner)
    out = torch.empty(own.shape, dtype=own.dtype if weight is None else torch.float32, device=own.device)
    strides = (flat.stride(0), tuple(s.stride(0) for s in streams), hidden.stride(0))
    arguments = (flat, streams, hidden, gate.weight.contiguous(), out, *strides, rows, width, inner, options.scale)
    flags = {"ACTIVATION": options.activation, "STREAM": options.stream}
    sizes = {"BLOCK_WIDTH": block, "BLOCK_INNER": block_inner, "num_warps": 4}
    with torch.cuda.device_of(own):
        launch(step_kernel, rows * cdiv(width, block), arguments, {**flags, **sizes})
    if weight is None:
        return out
    return rms_norm(out, weight, None, activation="none", eps=options.eps, dtype=own.dtype)


def unsupported(
    own: Tensor,
    sources: tuple[Tensor, ...],
    gate: Tensor | tuple[Tensor, ...] | Bottleneck | None = None,
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
    if isinstance(gate, Bottleneck) and gate.hidden.dtype != gate.weight.dtype:
        return f"a bottleneck's numbers and weight must be of one type, got {gate.hidden.dtype} and {gate.weight.dtype}"
    return unsupported_place(own)


def _sm90_case(
    kind: str,
    gates: str,
    width: int,
    m: int = 1,
    dtype: str = "bf16",
    norm: bool = True,
    activation: str = "silu",
    stream: str = "none",
) -> Sm90Case:
    """`kind`: "forward" or "backward"."""
    pointer, size, absent = f"*{dtype}:16", "i32:16", "constexpr"
    n = {"none": 0, "shared": 1, "each": m}[gates]
    weight, scratch = (pointer, "*fp32:16") if norm else (absent, absent)
    gate = (pointer,) * n or absent
    streams = {"own": pointer, "sources": (pointer,) * m, "gates": gate, "weight": weight}
    strides = {"own_stride": size, "source_strides": (size,) * m, "gate_strides": (size,) * n or absent}
    flags: dict[str, Any] = {"GATES": gates, "ACTIVATION": activation, "STREAM": stream, "NORM": norm}
    sizes = {**strides, "rows": "i32", "width": size}
    if kind == "forward":
        blocks, kernel = _forward_blocks(width), forward_kernel
        signature = {**streams, "out": pointer, "inverse_rms": scratch, **sizes, "eps": "fp32", "scale": "fp32"}
    else:
        row_bytes = width * (2 + m + n) * (4 if dtype == "fp32" else 2)
        blocks, kernel = _backward_blocks(width, row_bytes, gates, stream), backward_kernel
        d_own = pointer if norm or stream != "none" else absent
        d_sources = (pointer,) * m if stream != "none" or n > 1 else gate
        results = {"d_own": d_own, "d_sources": d_sources, "d_gates": gate, "d_weight": scratch}
        grads = {"grad": pointer, "own_grad": pointer}
        signature = {**grads, **streams, "inverse_rms": scratch, **results, "grad_stride": size, **sizes}
        signature |= {"scale": "fp32", "read": "i32"}
        flags["STAGES"] = blocks.stages
    missing = [name for name, type_ in signature.items() if type_ == absent]
    constexprs = {**flags, "BLOCK_ROWS": blocks.rows, "BLOCK_WIDTH": blocks.width, **dict.fromkeys(missing)}
    signature = {name: type_ for name, type_ in signature.items() if name not in missing}
    raw = "" if stream == "none" else f"-{stream}streams"
    name = f"{kind}-{gates}{m}-{activation}{raw}-{'norm' if norm else 'plain'}-{dtype}-w{blocks.width}"
    return Sm90Case(name, kernel, signature, constexprs, blocks.warps, 3)


def _sm90_step(inner: int) -> Sm90Case:
    block, block_inner = _step_blocks(inner)
    pointer, size = "*bf16:16", "i32:16"
    tensors = {"own": pointer, "sources": (pointer,), "hidden": pointer, "gate_weight": pointer, "out": "*fp32:16"}
    signature = tensors | {"own_stride": size, "source_strides": (size,), "hidden_stride": size}
    signature |= {"rows": "i32", "width": size, "inner": size, "scale": "fp32"}
    constexprs = {"ACTIVATION": "silu", "STREAM": "silu", "BLOCK_WIDTH": block, "BLOCK_INNER": block_inner}
    return Sm90Case(f"step-r{block_inner}", step_kernel, signature, constexprs, 4, 3)


def sm90_cases() -> Iterator[Sm90Case]:
    """Every kernel over widths, numbers of sources, gate forms and dtypes."""
    for kind in ("forward", "backward"):
        for width, m in product((32, 256, 768, 3072, _WIDEST), (1, 2)):
            yield _sm90_case(kind, "shared", width, m)
        for gates in ("none", "each"):
            yield _sm90_case(kind, gates, 3072, 4)
        yield _sm90_case(kind, "shared", 3072, dtype="fp32")
        yield _sm90_case(kind, "shared", 3072, activation="sigmoid")
        yield _sm90_case(kind, "each", 3072, 2, norm=False)
        for width, m in ((768, 1), (3072, 1), (3072, 2)):
            yield _sm90_case(kind, "shared", width, m, stream="silu")
    for inner in (8, 48):
        yield _sm90_step(inner)
