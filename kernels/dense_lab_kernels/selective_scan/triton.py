"""Selective scan on a GPU (Triton): launch rules and the autograd function around the kernels.

Between forward and backward live the inputs, y before its gate, and the states every KEPT tokens in float32: with
N = 16 half the memory of one [B, T, D] tensor in bfloat16. The backward restores the states every TILE tokens from
them, T / TILE states of [N, D], and frees them before it returns. Nothing is searched at the first call; all kernels
of a call are compiled at once, from a dry run on tensors without memory.

Letters: B batch, T tokens, D channels, N states padded to NP, G groups; m sources; stream 0 is the layer's own, 1 .. m
the sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dense_lab_kernels import _ahead
from dense_lab_kernels._triton import Launch, Sm90Case, applied, compile_once, processors, unsupported_place
from dense_lab_kernels.selective_scan import triton_backward as backward
from dense_lab_kernels.selective_scan import triton_forward as forward
from dense_lab_kernels.selective_scan import triton_gradients as gradients
from dense_lab_kernels.selective_scan import triton_plan as plans
from dense_lab_kernels.selective_scan.triton_plan import Plan

__all__ = ["selective_scan", "sm90_cases", "unsupported"]

_OPERATION = "selective_scan"
_MOST_STATES = 256


def unsupported(
    u: Tensor, dt: Tensor, A: Tensor, *rest: Tensor | None, sources: tuple[Any, ...] = (), **_: Any
) -> str | None:
    """Why Triton cannot run these (validated) arguments, or None."""
    place = unsupported_place(u)
    if place is not None:
        return place
    if u.dtype == torch.float64:
        return "states are float32, so float64 inputs would be rounded"
    if A.shape[1] > _MOST_STATES:
        return f"holds at most {_MOST_STATES} states per channel, got N={A.shape[1]}"
    return None


def _run(kernel: Any, grid: tuple[int, int, int], *arguments: Any, **options: Any) -> None:
    if _ahead.current() is None:
        kernel[grid](*arguments, **options)


class _Inputs(NamedTuple):
    """What the kernels read, made once per direction from the arguments; `run` launches a kernel."""

    run: Callable[..., None]
    u: tuple[Tensor, ...]
    dt: tuple[Tensor, ...]
    gates: tuple[Tensor, ...]
    z: Tensor | None
    A: Tensor  # [m + 1, N, D]
    bias: Tensor  # [m + 1, D]
    skip: Tensor
    shared: tuple[Tensor, ...]  # every B, and C: [B, T, own G, N] in float32


def _strides(tensors: tuple[Tensor, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((tensor.stride(0), tensor.stride(1)) for tensor in tensors)


def _rows(tensor: Tensor) -> Tensor:
    """[B, T, D] with neighbouring channels side by side."""
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def _shared_strides(tensors: tuple[Tensor, ...], groups: int) -> tuple[tuple[int, ...], ...]:
    """(batch, token, group) strides, and how many of the `groups` share one group of the tensor."""
    return tuple((*tensor.stride()[:3], groups // tensor.shape[2]) for tensor in tensors)


def _shared(tensor: Tensor) -> Tensor:
    """B or C in float32, in which the kernels broadcast it to channels, with neighbouring states side by side."""
    tensor = tensor.float()
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _walk(
    plan: Plan, inputs: _Inputs, entry: Tensor, outputs: dict[str, Tensor | None], *, segment: int, every: int
) -> None:
    """Launch `forward`; which of its results are wanted follows from which outputs are given."""
    output = outputs.get("out") is not None
    tokens = inputs.u + inputs.dt + inputs.gates + ((inputs.z,) if output and plan.gated else ())
    tables = inputs.shared if output else inputs.shared[:-1]
    grid = _walk_grid(plan, math.ceil(plan.tokens / segment))
    names = ("out", "raw", "kept", "last", "crossed", "spans")
    given = [outputs.get(name) if outputs.get(name) is not None else inputs.A for name in names]
    inputs.run(
        forward.forward, grid, tokens, _strides(tokens), tables, _shared_strides(tables, plan.groups),
        inputs.A, inputs.bias, inputs.skip, entry, *given,
        plan.tokens, plan.channels, plan.states, plan.channels // plan.groups, segment, every,
        **plan.flags(), HAS_Z=plan.gated and output, HAS_SKIP=plan.skip and output, OUTPUT=output,
        RAW=outputs.get("raw") is not None, KEEP=outputs.get("kept") is not None,
        SUMS=outputs.get("spans") is not None, M=plan.sources,
        BLOCK=plan.block, TILE=plan.tile, STAGES=plan.stages, num_warps=1,
    )  # fmt: skip


def _walk_grid(plan: Plan, segments: int) -> tuple[int, int, int]:
    return (plan.groups * math.ceil(plan.channels / plan.groups / plan.block), plan.batch, segments)


def _join(plan: Plan, inputs: _Inputs, states: Tensor, crossed: Tensor, spans: Tensor, first: Tensor, end: str) -> None:
    """Turn the segments' own contributions into the states they start from; `first` becomes what is left at the end."""
    width = 128
    segments = states.shape[2]
    grid = (math.ceil(plan.channels * plan.states / width), plan.batch, 1)
    flags = plan.flags()
    inputs.run(
        forward.join, grid, states, crossed, spans, inputs.A, first, plan.channels, plan.states, segments,
        CARRIED=flags["CARRIED"], BACKWARD=end == "backward", M=plan.sources, WIDTH=width, num_warps=4,
    )  # fmt: skip


def _run_forward(plan: Plan, inputs: _Inputs, first: Tensor, *, keep: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output, final states [m + 1, B, N, D] and what the backward needs."""
    device = first.device
    saved: dict[str, Tensor] = {}
    entry = first.unsqueeze(2)
    if plan.segments > 1:
        entry = torch.empty(plan.states_of(plan.segments), device=device)
        saved["spans"] = torch.empty((plan.sources + 1, plan.batch, plan.segments, plan.channels), device=device)
        saved["crossed"] = torch.empty((plan.sources, *entry.shape[1:]) if plan.carried else (0,), device=device)
        zeros = torch.zeros_like(entry)
        _walk(plan, inputs, zeros, {"last": entry, **saved}, segment=plan.segment, every=plans.KEPT)
        _join(plan, inputs, entry, saved["crossed"], saved["spans"], first.clone(), "forward")
    out = torch.empty(inputs.u[0].shape, dtype=inputs.u[0].dtype, device=device)
    last = torch.empty_like(entry)
    if keep:
        saved["kept"] = torch.empty(plan.states_of(plan.pieces), device=device)
        if plan.gated:
            saved["raw"] = torch.empty_like(out)
    results = {"out": out, "last": last, "kept": saved.get("kept"), "raw": saved.get("raw")}
    _walk(plan, inputs, entry, results, segment=plan.segment, every=plans.KEPT)
    return out, last[:, :, -1], saved


class _Passed(NamedTuple):
    """What the walk back leaves to `gradients`."""

    ends: Tensor  # [m + 1, B, tiles, N, D]: gradients of the states after every tile
    entry: Tensor  # [m + 1, B, segments, N, D]: what they lack, from the segments behind
    rest: Tensor  # [m + 1, B, tiles, D]: over how many steps


def _adjoint(
    plan: Plan, inputs: _Inputs, grad: Tensor, final: Tensor, saved: dict[str, Tensor], ends: Tensor
) -> tuple[Tensor | None, _Passed, Tensor]:
    """Gradients of z, of the states after every tile (into `ends`), and of the initial states.

    A walk from zero over each of several segments is enough: `gradients` adds to the end of a tile what enters its
    segment, decayed once. Streams that are coupled take a second walk, from what enters.
    """
    device, segments = grad.device, plan.states_of(plan.walks_back)
    dz = torch.empty(grad.shape, dtype=inputs.z.dtype, device=device) if plan.gated else None
    tokens = (*inputs.dt, *inputs.gates, grad, *((inputs.z, saved["raw"]) if plan.gated else ()))
    tables = inputs.shared[-1:]

    def walk(entry: Tensor, last: Tensor, output: bool, sums: tuple[Tensor, Tensor] | None = None) -> None:
        inputs.run(
            backward.adjoint, _walk_grid(plan, plan.walks_back),
            tokens, _strides(tokens), tables, _shared_strides(tables, plan.groups), inputs.A, inputs.bias,
            entry, dz if plan.gated else grad, ends, last, *(sums or (last, last)),
            plan.tokens, plan.channels, plan.states, plan.channels // plan.groups, plan.back,
            **plan.flags(), HAS_Z=plan.gated, OUTPUT=output, SUMS=sums is not None, M=plan.sources,
            BLOCK=plan.block, TILE=plan.tile, STAGES=plan.stages, num_warps=1,
        )  # fmt: skip

    if not plan.passed:
        entry = final.unsqueeze(2)
        if plan.walks_back > 1:
            entry = torch.empty(segments, device=device)
            walk(torch.zeros_like(entry), entry, False)
            _join(plan, inputs, entry, saved["crossed"], saved["spans"], final.clone(), "backward")
        last = torch.empty_like(entry)
        walk(entry, last, True)
        return dz, _Passed(ends, last, last), last[:, :, 0]
    last, initial = torch.empty(segments, device=device), final.clone()
    spans, rest = (
        torch.empty((plan.sources + 1, plan.batch, count, plan.channels), device=device)
        for count in (plan.walks_back, plan.tiles)
    )
    walk(torch.zeros_like(last), last, True, (spans, rest))
    _join(plan, inputs, last, last, spans, initial, "backward")
    return dz, _Passed(ends, last, rest), initial


def _room(shape: tuple[int, ...], spare: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """An empty tensor; and `spare` numbers behind it, to be zeros, that `gradients` fetches beyond its last tile."""
    size = math.prod(shape)
    room = torch.empty(size + spare, device=device)
    return room[:size].view(shape), room[size:]


class _Prepared(NamedTuple):
    """What `gradients` needs and the walk back does not."""

    kept: Tensor  # [m + 1, B, tiles, N, D]: states before every tile
    tables: Tensor  # [m + 2, B, G, N, T padded to whole tiles]: every B, and C, with the tokens side by side
    dA: Tensor  # [m + 1, spans * B, N, D], zeros


def _walked_both_ways(
    plan: Plan, inputs: _Inputs, grad: Tensor, final: Tensor, saved: dict[str, Tensor]
) -> tuple[tuple[Tensor | None, _Passed, Tensor], _Prepared]:
    """What `_adjoint` returns, and the rest of what `gradients` needs.

    The walk back has few programs, which wait most of the time: on a GPU all that it does not need is made beside it.
    """
    device, padded = grad.device, plan.tiles * plan.tile
    spare = gradients.SLOTS * plan.channels
    ends, ends_spare = _room(plan.states_of(plan.tiles), spare, device)
    kept, kept_spare = _room(plan.states_of(plan.tiles), spare, device)
    shape = (plan.sources + 2, plan.batch, plan.groups, plan.states, padded)
    tables, tables_spare = _room(shape, gradients.SLOTS * (padded + plans.TILE), device)
    dA = torch.empty((plan.sources + 1, plan.spans * plan.batch, plan.states, plan.channels), device=device)
    prepared = _Prepared(kept, tables, dA)

    def prepare() -> None:
        _walk(plan, inputs, saved["kept"], {"kept": kept}, segment=plans.KEPT, every=plan.tile)
        _fill(plan, inputs, prepared, (ends_spare, kept_spare, tables_spare))

    return _side_by_side(lambda: _adjoint(plan, inputs, grad, final, saved, ends), prepare, device), prepared


def _side_by_side(work: Callable[[], Any], other: Callable[[], None], device: torch.device) -> Any:
    """What `work` returns; `other` is done meanwhile, on a GPU in a stream of its own.

    other: writes to memory that is there before this call and is kept until it returns, and reads nothing that `work`
    makes. It is launched second: until then the host has nothing better to do than to give the slower one its start.
    """
    if device.type != "cuda":
        other()
        return work()
    main, side = torch.cuda.current_stream(device), _side_stream(device)
    begun = main.record_event()
    result = work()
    side.wait_event(begun)
    try:
        with torch.cuda.stream(side):
            other()
    finally:  # Its memory is not given back while it is written.
        main.wait_stream(side)
    return result


def _fill(plan: Plan, inputs: _Inputs, prepared: _Prepared, zeros: tuple[Tensor, ...]) -> None:
    for tensor in (*zeros, prepared.dA, prepared.tables[..., plan.tokens :]):
        tensor.zero_()
    for table, tensor in zip(prepared.tables, inputs.shared, strict=True):
        own = tensor.shape[2]
        by_token = table.unflatten(1, (own, plan.groups // own))[..., : plan.tokens]
        by_token.copy_(tensor.permute(0, 2, 3, 1).unsqueeze(2))


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all, and made once: a captured step then finds it there, if a step was run before."""
    return torch.cuda.Stream(device)


def _gradients(
    plan: Plan, inputs: _Inputs, tensors: tuple[Tensor | None, ...], grad: Tensor, passed: _Passed, prepared: _Prepared
) -> tuple[list[Tensor], ...]:
    """Gradients of every u, dt, A, B, dt_bias, of the gates; of C; of D."""
    tables, dA, device = prepared.tables, prepared.dA, grad.device
    rows = (*inputs.u, *inputs.dt, *inputs.gates)
    kind = rows[0].dtype if all(t.dtype == rows[0].dtype for t in rows) else torch.float32
    like = [tensors[3], *(tensors[12 + 7 * i] for i in range(plan.sources)), tensors[4]]
    # A program's sums over its channels are rounded to what is wanted where nothing follows but adding them up. Of n
    # programs' sums that is sqrt(n) roundings, where the total is by chance sqrt(n) as large as one: what rounding the
    # total costs, once more. (Sums that cancel to a tenth of that or less are off by more than `verify` allows.) Not to
    # float16: one program's sum may be beyond its range where the total is not.
    final = kind != torch.float16 and all(t.dtype == kind and t.shape[2] == plan.groups for t in like)
    streams, blocks = plan.sources + 1, math.ceil(plan.channels // plan.groups / plans.WARP)
    du, ddt = (torch.empty((streams, *grad.shape), dtype=kind, device=device) for _ in range(2))
    dgate = torch.empty((plan.sources, *grad.shape), dtype=kind, device=device)
    sums = torch.empty((streams + 1, blocks, *tables.shape[1:]), dtype=kind if final else torch.float32, device=device)
    dchannel = torch.empty((streams + 1, plan.spans * plan.batch, plan.channels), device=device)
    tokens = (*rows, grad, *((inputs.z,) if plan.gated else ()))
    flags = plan.flags()
    del flags["NP"]
    inputs.run(
        gradients.gradients, (plan.groups * blocks, plan.batch, plan.spans),
        tokens, _strides(tokens), tables, inputs.A, inputs.bias, inputs.skip, prepared.kept, *passed,
        du, ddt, dgate, sums, dA, dchannel, plan.tokens, plan.channels, plan.states, tables.shape[-1],
        plan.channels // plan.groups, plan.groups, plan.span, plan.spans_back,
        PASSED=plan.passed, HAS_Z=plan.gated, HAS_SKIP=plan.skip, M=plan.sources, BLOCK=plans.WARP, TILE=plan.tile,
        SLOTS=gradients.SLOTS, WHOLE=plan.channels // plan.groups % plans.WARP == 0, **flags,
        num_warps=1, maxnreg=None if kind == torch.float32 else plan.limit,
    )  # fmt: skip
    rates, by_channel = torch.empty_like(dA[:, 0]), torch.empty_like(dchannel[:, 0])

    def sum_spans() -> None:
        torch.sum(dA, 1, out=rates)
        torch.sum(dchannel, 1, out=by_channel)

    totals = _side_by_side(lambda: sums.sum(1), sum_spans, device)[..., : plan.tokens].permute(0, 1, 4, 2, 3)
    *dB, dC = (_regroup(total, tensor) for total, tensor in zip(totals, like, strict=True))  # [B, T, G, N]
    dD, *dbias = by_channel
    return list(du), list(ddt), list(rates.mT), dB, dbias, list(dgate), [dC], [dD]


def _regroup(total: Tensor, like: Tensor | None) -> Tensor:
    """[B, T, G, N] -> the gradient of a B or C with its own number of groups."""
    own, groups = like.shape[2], total.shape[2]
    if own != groups:
        total = total.unflatten(2, (own, groups // own)).sum(3)
    return total.to(like.dtype)


def _gather(
    plan: Plan, tensors: tuple[Tensor | None, ...], run: Callable[..., None] = _run, made: tuple[Tensor, ...] = ()
) -> _Inputs:
    """The kernels' inputs from the flat arguments; made: what `_made` says of a call before."""
    u, dt, A, B, C, D, z, bias = tensors[:8]
    sources = [tensors[9 + 7 * i : 16 + 7 * i] for i in range(plan.sources)]
    if not made:
        state = (plan.channels, plan.states)
        made = (
            _stack(plan, [A, *(s[2] for s in sources)], state, u.device),
            _stack(plan, [bias, *(s[4] for s in sources)], state[:1], u.device),
            *(_shared(t) for t in (B, *(s[3] for s in sources), C)),
        )
    return _Inputs(
        run=run,
        u=tuple(_rows(t) for t in (u, *(s[0] for s in sources))),
        dt=tuple(_rows(t) for t in (dt, *(s[1] for s in sources))),
        gates=tuple(_rows(s[5]) for s in sources),
        z=None if z is None else _rows(z),
        A=made[0],
        bias=made[1],
        skip=u if D is None else D.float().contiguous(),
        shared=made[2:],
    )


def _initial(plan: Plan, tensors: tuple[Tensor | None, ...]) -> Tensor:
    given = [tensors[8], *(tensors[15 + 7 * i] for i in range(plan.sources))]
    return _first_states(plan, given, tensors[0].device)


def _made(inputs: _Inputs) -> tuple[Tensor, ...]:
    """What forward and backward both need and only one of them makes."""
    return inputs.A, inputs.bias, *inputs.shared


def _stack(plan: Plan, given: list[Tensor | None], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Tensors [..., D, N] or [D] of every stream as one [m + 1, ..., N, D] or [m + 1, D]; zeros for None."""
    if all(tensor is None for tensor in given):
        return torch.zeros((plan.sources + 1, *shape[:-2], *shape[-2:][::-1]), device=device)
    filled = [torch.zeros(shape, device=device) if t is None else t.float() for t in given]
    if len(filled) == 1 and len(shape) == 1:
        return filled[0].contiguous()[None]
    return torch.stack([t.mT if t.dim() > 1 else t for t in filled])


def _first_states(plan: Plan, given: list[Tensor | None], device: torch.device) -> Tensor:
    """States [B, D, N] of every stream, or their gradients, as the kernels have them: [m + 1, B, N, D]."""
    return _stack(plan, given, (plan.batch, plan.channels, plan.states), device)


def _run_backward(
    plan: Plan, inputs: _Inputs, tensors: tuple[Tensor | None, ...], saved: dict[str, Tensor],
    grad: Tensor, finals: tuple[Tensor | None, ...],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of the flat arguments, from those of the output and the final states."""
    plan.check()
    final = _first_states(plan, list(finals), grad.device)
    (dz, passed, initial), prepared = _walked_both_ways(plan, inputs, grad, final, saved)
    du, ddt, dA, dB, dbias, dgate, (dC,), (dD,) = _gradients(plan, inputs, tensors, grad, passed, prepared)
    found = [du[0], ddt[0], dA[0], dB[0], dC, dD, dz, dbias[0], initial[0].mT]
    for i in range(1, plan.sources + 1):
        found += [du[i], ddt[i], dA[i], dB[i], dbias[i], dgate[i - 1], initial[i].mT]
    return found


def _launches(plan: Plan, tensors: tuple[Tensor | None, ...], *, training: bool) -> list[Launch]:
    """Every launch of a call, found by a dry run on tensors without memory."""
    found: list[Launch] = []

    def note(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        found.append(Launch(kernel, arguments, options))

    flat = tuple(
        None if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in tensors
    )
    inputs = _gather(plan, flat, note)
    out, _last, saved = _run_forward(plan, inputs, _initial(plan, flat), keep=training)
    if training:
        _run_backward(plan, inputs, flat, saved, out, (None,) * (plan.sources + 1))
    return found


class _SelectiveScan(torch.autograd.Function):
    """Arguments: the plan, then u, dt, A, B, C, D, z, dt_bias, initial state; per source its five, gate and state."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        training = any(ctx.needs_input_grad)
        key = (_OPERATION, plan, training, *(t if t is None else t.dtype for t in tensors))
        compile_once(key, lambda: _launches(plan, tensors, training=training))
        inputs = _gather(plan, tensors)
        out, last, saved = _run_forward(plan, inputs, _initial(plan, tensors), keep=training)
        ctx.plan, ctx.names, made = plan, tuple(saved), _made(inputs)
        ctx.counts = len(tensors), len(made)
        ctx.save_for_backward(*tensors, *made, *saved.values())
        ctx.set_materialize_grads(False)
        return out, *(last.mT if training else last.mT.contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *finals: Tensor | None) -> tuple[Tensor | None, ...]:
        given, made = ctx.counts
        tensors, kept = ctx.saved_tensors[:given], ctx.saved_tensors[given:]
        saved = dict(zip(ctx.names, kept[made:], strict=True))
        inputs = _gather(ctx.plan, tensors, made=kept[:made])
        grad = torch.zeros_like(tensors[0]) if grad is None else _rows(grad)
        found = _run_backward(ctx.plan, inputs, tensors, saved, grad, finals)
        needed = zip(found, tensors, ctx.needs_input_grad[1:], strict=True)
        return None, *(None if t is None or not wanted else g.to(t.dtype) for g, t, wanted in needed)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_activation: str = "softplus",
    initial_state: Tensor | None = None,
    sources: tuple[Any, ...] = (),
    gates: tuple[Tensor, ...] = (),
    site: str = "readout",
    source_states: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Output [B, T, D] in u's dtype, final state and source states [B, D, N]; arguments as in the public function."""
    groups = math.lcm(B.shape[2], *(source.B.shape[2] for source in sources))
    plan = plans.make_plan(
        u.shape, A.shape[1], groups, len(sources), processors(u.device),
        carried=site == "carried", softplus=dt_activation == "softplus", gated=z is not None, skip=D is not None,
    )  # fmt: skip
    states = source_states or (None,) * len(sources)
    extra = [t for s, gate, state in zip(sources, gates, states, strict=True) for t in (*s, gate, state)]
    out, final, *others = applied(_SelectiveScan, plan, u, dt, A, B, C, D, z, dt_bias, initial_state, *extra)
    return out, final, tuple(others)


def _signature(argument: Any) -> Any:
    """The Triton type of an argument as launches find it."""
    if isinstance(argument, tuple):
        return tuple(_signature(item) for item in argument)
    if isinstance(argument, Tensor):
        short = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[argument.dtype]
        return f"*{short}:16"
    return "i32:16" if argument % 16 == 0 else "i32"


def _sm90_case(name: str, launch: Launch) -> Sm90Case:
    options = dict(launch.options)
    warps = options.pop("num_warps")
    limit = options.pop("maxnreg", None)
    arguments = zip(launch.kernel.arg_names, launch.arguments, strict=False)
    plain = {param.name for param in launch.kernel.params if param.do_not_specialize}
    fixed = {param.name for param in launch.kernel.params if param.is_constexpr}
    given = dict(arguments)
    options |= {name: value for name, value in given.items() if name in fixed}
    signature = {n: "i32" if n in plain else _signature(value) for n, value in given.items() if n not in fixed}
    return Sm90Case(f"{name}-{launch.kernel.__name__}", launch.kernel, signature, options, warps, 3, limit=limit)


def _example(tokens: int, states: int, m: int, site: str, dtype: torch.dtype) -> tuple[Plan, tuple[Tensor | None, ...]]:
    """Plan and flat arguments, without memory, of B = 8 sequences of 2048 channels on 132 processors."""
    B, D = (8 if tokens <= 2048 else 1), 2048

    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    def stream() -> tuple[Tensor, ...]:
        return (
            empty(B, tokens, D),
            empty(B, tokens, D),
            empty(D, states, kind=torch.float32),
            empty(B, tokens, 1, states),
        )

    vector = empty(D, kind=torch.float32)
    flat: tuple[Tensor | None, ...] = (
        *stream(),
        empty(B, tokens, 1, states),
        vector,
        empty(B, tokens, D),
        vector,
        None,
    )
    for _ in range(m):
        flat += (*stream(), vector, empty(B, tokens, D), None)
    options = {"carried": site == "carried", "softplus": True, "gated": True, "skip": True}
    return plans.make_plan(torch.Size((B, tokens, D)), states, 1, m, 132, **options), flat


def sm90_cases() -> Iterator[Sm90Case]:
    """The launches of a training step with and without sources, with many states, and cut in segments."""
    bf16, fp32 = torch.bfloat16, torch.float32
    chosen = [
        ("plain", (2048, 16, 0, "readout", bf16), (0, 1, 2, 3)),
        ("plain-fp32", (2048, 16, 0, "readout", fp32), (0, 3)),
        ("states-64", (2048, 64, 0, "readout", bf16), (0, 3)),
        ("segments", (32768, 16, 0, "readout", bf16), (0, 1, 3, 4, 6)),
        ("readout-1", (2048, 16, 1, "readout", bf16), (3,)),
        ("segments-readout-1", (32768, 16, 1, "readout", bf16), (4, 6)),
        ("readout-2", (2048, 16, 2, "readout", bf16), (3,)),
        ("carried-1", (2048, 16, 1, "carried", bf16), (3,)),
        ("carried-2", (2048, 16, 2, "carried", bf16), (0, 1, 3)),
    ]
    for name, example, wanted in chosen:
        launches = _launches(*_example(*example), training=True)
        for i in wanted:
            yield _sm90_case(f"{name}-{i}", launches[i])
