"""All gradients of the selective scan, tile by tile, from the states before and the states' gradients after every tile.

Tiles do not wait for each other: `forward` has restored the states before them, `adjoint` has walked the states'
gradients back to their ends. A program is one warp with 32 channels of one batch element, one to a lane, and takes
`span` tiles in turn. What a tile's tokens share over the states (steps, the output's gradient, sums over states) stays
in registers; the states are taken one after the other: replayed, walked back, and done with. So few numbers live at a
time that several warps share a scheduler, and nothing is computed alike in two lanes. Sums over channels (B, C) go
through tensor cores within the warp, and over programs afterwards; sums over tokens (A) are added to in memory, by one
program each and so in one order: the result does not depend on scheduling.

Letters as in the forward; K = TILE tokens of a tile; P tokens, padded to whole tiles.
"""

# ruff: noqa: RUF005 - Triton knows no unpacking inside a tuple

from __future__ import annotations

from collections.abc import Callable

import triton
import triton.language as tl

from dense_lab_kernels._triton import ASSEMBLY, sigmoid
from dense_lab_kernels.selective_scan.triton_forward import (
    LOG2_E,
    activate,
    exp,
    exp2,
    own_channels,
    pick,
)

_LN_2 = tl.constexpr(0.6931471805599453)
_NUMBERS = 16  # sums over channels that one exchange makes
SLOTS = 4  # of shared memory: states at work or on their way
# Tensor cores cut the operands to 10 bits of mantissa: on average a factor 1 - 3.5e-4, which is put back.
_UNCUT = tl.constexpr(1.00035)


def _warp_sums(numbers: list[str], ones: list[str], ready: list[int], lane: str) -> list[str]:
    """PTX: up to 16 numbers of every thread, summed over the warp; lane l finds the sum of `summed(l)` in v0.

    The four lanes of a quad are summed on tensor cores, 16 x 8 against a matrix of ones and zeros that puts the sums
    of four numbers at a time into columns of their own; then the eight quads in steps that halve what is left.
    ones: that matrix, eight numbers of every thread: number i is one in the four lanes from 4 i on. ready: the fours
    that there are, in the order in which they are computed; the last one alone is waited for. lane: 4 l.
    """
    numbers = numbers + ["z"] * (_NUMBERS - len(numbers))
    code = [".reg .b32 t, s<8>, x<16>; .reg .pred p; .reg .f32 v<4>, u, w, o, z; mov.f32 z, 0f00000000;"]
    code += [f"mov.b32 s{i}, {one};" for i, one in enumerate(ones)]
    code += [f"mov.b32 x{i}, {number};" for i, number in enumerate(numbers)]
    for i in ready:
        given = ", ".join(f"x{4 * i + k}" for k in (0, 2, 1, 3))
        before = "z, z, z, z" if i == ready[0] else "v0, v1, v2, v3"
        code.append(
            f"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {{v0, v1, v2, v3}}, {{{given}}}, "
            f"{{s{2 * i}, s{2 * i + 1}}}, {{{before}}};"
        )
    for left, mask in ((2, 16), (1, 8)):
        code.append(f"and.b32 t, {lane}, {4 * mask}; setp.ne.u32 p, t, 0;")
        for k in range(left):
            code.append(f"selp.f32 u, v{k}, v{k + left}, p; selp.f32 w, v{k + left}, v{k}, p;")
            code.append(f"shfl.sync.bfly.b32 o, u, {mask}, 31, -1; add.f32 v{k}, w, o;")
    return [*code, "shfl.sync.bfly.b32 o, v0, 4, 31, -1; add.f32 v0, v0, o;"]


@triton.jit
def summed(lane):
    """Which of the numbers of `_warp_sums` a lane finds; lanes l and l ^ 4 find the same."""
    return lane % 4 * 4 + lane // 8


def _operands(K: int, M: int, *, passed: bool) -> tuple[dict[str, int], int]:
    """First operand of every group of K of `_one_state`, results before the others; how many groups are results."""
    streams = range(M + 1)
    names = [f"flow{i}" for i in streams] + [f"lost{i}" for i in streams] + [f"dgate{i}" for i in range(M)]
    results = [*names, "sums", "number"]
    given = ["ones", *(["more_ones"] if K == 4 else []), "grad"]
    given += [f"{name}{i}" for name in ("step", "taken") for i in streams] + [f"gate{i}" for i in range(M)]
    given += [f"rest{i}" for i in streams if passed] + [f"{name}_" for name in names]
    return {name: K * i for i, name in enumerate([*results, *given, "slot", "lane"])}, len(results)


def _one_state(K: int, M: int, *, carried: bool, passed: bool) -> tuple[str, str]:
    """PTX and operand types of `one_state` for a thread: one state, K tokens, M sources; operands in groups of K.

    Results: flow and lost of every stream, the gradients of the gates; sums of A (one a stream), sum over channels.
    Operands: what `_warp_sums` needs; gradient of y; steps and step u of every stream; gates; passed: what is left of
    the segment in steps of every stream; the results so far; then, K times each, the slot of shared memory where
    `_fetch` has put the rest, and four times the lane (asking the machine for it costs more than a register).
    """
    place, results = _operands(K, M, passed=passed)

    def at(name: str, k: int = 0) -> str:
        return f"${place[name] + k}"

    code = [*_read(K, M, at, passed=passed), *_replay(K, M, at, carried=carried)]
    code += _walk_back(K, M, at, carried=carried)
    ones = [at("ones", i) if i < K else at("more_ones", i - K) for i in range(8)]
    fours = K // 4
    ready = [*range((M + 1) * fours, (M + 2) * fours)]  # C before the walk back, then B, last token first
    ready += [i * fours + k for i in range(M + 1) for k in reversed(range(fours))]
    numbers = [f"dB{i}_{k}" for i in range(M + 1) for k in range(K)] + [f"dC_{k}" for k in range(K)]
    code += _warp_sums(numbers, ones, ready, at("lane"))
    code += [f"mov.f32 {at('sums', k)}, {f'A{k}' if k <= M else '0f80000000'};" for k in range(K)]
    code += [f"mov.f32 {at('number', k)}, {'0f80000000' if k else 'v0'};" for k in range(K)]
    types = ["=&f"] * (K * results) + ["f"] * (K * (len(place) - results - 2)) + ["r"] * (2 * K)
    return "{ " + " ".join(code) + " }", ",".join(types)


def _channels(M: int, passed: bool) -> list[str]:
    """What a slot holds once a channel, in order."""
    return [f"{x}{i}" for i in range(M + 1) for x in ("h", "s", "rate", *(["entry"] if passed else []))]


def _read(K: int, M: int, at: Callable[..., str], *, passed: bool) -> list[str]:
    """State, what comes back, rate, and rows of B and C from shared memory; decays a and inflows b of every token."""
    streams, channels = range(M + 1), _channels(M, passed)
    code = [f".reg .b32 mine; add.u32 mine, {at('lane')}, {at('slot')};"]
    for i, name in enumerate(channels):
        code.append(f".reg .f32 {name}; ld.shared.f32 {name}, [mine+{128 * i}];")
    for i, name in enumerate([*(f"B{i}" for i in streams), "C"]):
        code.append(f".reg .f32 {', '.join(f'{name}_{k}' for k in range(K))};")
        for k in range(0, K, 4):
            row = ", ".join(f"{name}_{k + j}" for j in range(4))
            code.append(f"ld.shared.v4.f32 {{{row}}}, [{at('slot')}+{128 * len(channels) + 4 * (K * i + k)}];")
    for i in streams:
        code.append(f"mul.f32 rate{i}, rate{i}, 0f3FB8AA3B;")  # to base 2
        if passed:
            code.append(f".reg .f32 r{i}; mul.f32 r{i}, rate{i}, {at(f'rest{i}')}; ex2.approx.ftz.f32 r{i}, r{i};")
            code.append(f"fma.rn.f32 s{i}, r{i}, entry{i}, s{i};")
        code.append(
            f".reg .f32 {', '.join(f'{x}{i}_{k}' for x in ('a', 'b', 'h', 'dB') for k in range(K))}, A{i}, e{i};"
        )
        for k in range(K):
            code.append(f"mul.f32 a{i}_{k}, rate{i}, {at(f'step{i}', k)}; ex2.approx.ftz.f32 a{i}_{k}, a{i}_{k};")
            code.append(f"mul.f32 b{i}_{k}, B{i}_{k}, {at(f'taken{i}', k)};")
    code.append(f".reg .f32 {', '.join(f'{x}_{k}' for x in ('in', 'dC', 'out') for k in range(K))}, f;")
    return code


def _before(i: int, k: int) -> str:
    return f"h{i}_{k - 1}" if k else f"h{i}"


def _replay(K: int, M: int, at: Callable[..., str], *, carried: bool) -> list[str]:
    """The states after every token, sources first, and every token's gradient of C."""
    code = []
    for i in [*range(1, M + 1), 0]:
        for k in range(K):
            if i == 0 and carried and M:
                code.append(f"add.f32 b0_{k}, b0_{k}, in_{k};")
            code.append(f"fma.rn.f32 h{i}_{k}, a{i}_{k}, {_before(i, k)}, b{i}_{k};")
            if i == 1:
                code.append(f"mul.f32 in_{k}, {at('gate0', k)}, h1_{k};")
            elif i > 1:
                code.append(f"fma.rn.f32 in_{k}, {at(f'gate{i - 1}', k)}, h{i}_{k}, in_{k};")
    for k in range(K):
        if M and not carried:
            code.append(f"add.f32 f, h0_{k}, in_{k}; mul.f32 dC_{k}, f, {at('grad', k)};")
        else:
            code.append(f"mul.f32 dC_{k}, h0_{k}, {at('grad', k)};")
    return code


def _walk_back(K: int, M: int, at: Callable[..., str], *, carried: bool) -> list[str]:
    """The states' gradients, last token first, and all sums that they are part of."""
    code = []
    for i in range(M + 1):
        code.append(f"mov.f32 e{i}, s{i}; mov.f32 A{i}, 0f00000000;")
        for k in reversed(range(K)):
            if i == 0:
                if M and not carried:
                    code.append(f"mul.f32 out_{k}, C_{k}, {at('grad', k)}; add.f32 f, out_{k}, e0;")
                else:
                    code.append(f"fma.rn.f32 f, C_{k}, {at('grad', k)}, e0;")
                if M and carried:
                    code.append(f"mov.f32 out_{k}, f;")
            else:
                code.append(f"fma.rn.f32 {at(f'dgate{i - 1}', k)}, out_{k}, h{i}_{k}, {at(f'dgate{i - 1}_', k)};")
                code.append(f"fma.rn.f32 f, {at(f'gate{i - 1}', k)}, out_{k}, e{i};")
            code.append(f"mul.f32 dB{i}_{k}, f, {at(f'taken{i}', k)};")
            code.append(f"fma.rn.f32 {at(f'flow{i}', k)}, f, B{i}_{k}, {at(f'flow{i}_', k)};")
            code.append(f"mul.f32 e{i}, a{i}_{k}, f; mul.f32 f, e{i}, {_before(i, k)};")
            code.append(f"fma.rn.f32 {at(f'lost{i}', k)}, f, rate{i}, {at(f'lost{i}_', k)};")
            code.append(f"fma.rn.f32 A{i}, f, {at(f'step{i}', k)}, A{i};")
    return code


def _fetch(K: int, M: int, *, passed: bool) -> str:
    """PTX: copy to a slot of shared memory, without waiting, what one state of a tile needs.

    Operands: a number that is left alone; the slot; four times the lane; addresses of the states before the tile, what
    the tokens behind it pass back, the rates and (passed) what enters the segment from behind, of every stream, each
    lane its own; and where the 16 bytes of every B and of C begin that this lane (of the first ones) copies.
    """
    count = len(_channels(M, passed))
    code = [".reg .b32 a; .reg .pred p; add.u32 a, $2, $1;"]
    code += [f"cp.async.ca.shared.global [a+{128 * i}], [${3 + i}], 4;" for i in range(count)]
    code += [f"mad.lo.u32 a, $2, 4, $1; setp.lt.u32 p, $2, {(M + 2) * K};"]
    code += [f"@p cp.async.cg.shared.global [a+{128 * count}], [${3 + count}], 16; cp.async.commit_group;"]
    return "{ " + " ".join([*code, "mov.b32 $0, 0;"]) + " }"


def _tokens(M: int) -> int:
    """Of a tile that `one_state` works on."""
    return 8 if M == 0 else 4


def _slot_bytes(M: int, passed: bool) -> int:
    return 128 * len(_channels(M, passed)) + 4 * _tokens(M) * (M + 2)


def _ring(M: int, passed: bool) -> str:
    """PTX: shared memory of a program's slots, and its address."""
    return f".shared .align 16 .b8 scan_slots[{SLOTS * _slot_bytes(M, passed)}]; mov.u32 $0, scan_slots;"


# By 2 M + PASSED, for up to two sources: PTX, operand types, sizes.
_FORMS = [(m, p) for m in range(3) for p in (False, True)]
_PLAIN = [_one_state(_tokens(m), m, carried=False, passed=p) for m, p in _FORMS]
_STATES, _STATE_TYPES = (tl.constexpr(tuple(form[i] for form in _PLAIN)) for i in range(2))
_COUPLED = tl.constexpr(tuple(_one_state(_tokens(m), m, carried=m > 0, passed=False)[0] for m, _p in _FORMS))
_FETCHES = tl.constexpr(tuple(_fetch(_tokens(m), m, passed=p) for m, p in _FORMS))
_FETCH_TYPES = tl.constexpr(tuple(",".join(["=r", "r", "r", *["l"] * (len(_channels(*form)) + 1)]) for form in _FORMS))
_SLOTS = tl.constexpr(tuple(_slot_bytes(*form) for form in _FORMS))
_RINGS = tl.constexpr(tuple(_ring(*form) for form in _FORMS))
_ALL_ARRIVED = tl.constexpr("cp.async.wait_all; mov.b32 $0, 0;")
_ARRIVED = tl.constexpr(f"cp.async.wait_group {SLOTS - 2}; bar.warp.sync -1; mov.b32 $0, 0;")


@triton.jit
def fetch(slot, lane, ahead, stride, table_size, entries, M: tl.constexpr, PASSED: tl.constexpr):
    """Begin to copy to a slot what the state that `ahead` points to needs; lane: four times that."""
    given = (slot, lane)
    for i in tl.static_range(M + 1):
        given = given + ((ahead[0] + i * stride).to(tl.int64), (ahead[1] + i * stride).to(tl.int64))
        given = given + ((ahead[2] + i * table_size).to(tl.int64),)
        if PASSED:
            given = given + ((ahead[3] + i * entries).to(tl.int64),)
    given = given + (ahead[4].to(tl.int64),)
    text: tl.constexpr = _FETCHES[2 * M + PASSED]
    types: tl.constexpr = _FETCH_TYPES[2 * M + PASSED]
    tl.inline_asm_elementwise(text, types, given, dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def advanced(ahead, N, D, P, TILE: tl.constexpr):
    """Pointers (states before the tile, gradients behind it, rates, what enters the segment, shared rows; which state)
    to the next state.

    After a tile's last state comes the next tile's first one.
    """
    n = ahead[5] + 1
    wrapped = n == N
    rate, line = tl.where(wrapped, D - N * D, D), ahead[4] + tl.where(wrapped, TILE + P - N * P, P)
    return ahead[0] + D, ahead[1] + D, ahead[2] + rate, ahead[3] + rate, line, tl.where(wrapped, 0, n)


@triton.jit
def one_state(given, M: tl.constexpr, CARRIED: tl.constexpr, PASSED: tl.constexpr):
    """The operands and results of `_one_state`, each [K, BLOCK], with up to two sources."""
    text: tl.constexpr = _COUPLED[2 * M] if CARRIED else _STATES[2 * M + PASSED]
    types: tl.constexpr = _STATE_TYPES[2 * M + PASSED]
    if M == 0:
        return tl.inline_asm_elementwise(
            text, types, given, dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=False, pack=8
        )
    elif M == 1:  # noqa: RET505 - resolved when compiling
        return tl.inline_asm_elementwise(
            text, types, given,
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=False, pack=4,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            text, types, given,
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32,
                   tl.float32, tl.float32),
            is_pure=False, pack=4,
        )  # fmt: skip


@triton.jit
def replay(a, b, h, j, TILE: tl.constexpr):
    """One state before and after every token of a tile, [TILE, BLOCK]."""
    before, after = b, b
    for k in tl.static_range(TILE):
        here = (j == k)[:, None]
        before = tl.where(here, h[None, :], before)
        h = pick(a, here, 0) * h + pick(b, here, 0)
        after = tl.where(here, h[None, :], after)
    return before, after


@triton.jit
def walk_back(a, inflow, s, j, TILE: tl.constexpr):
    """Gradients of one state after every token of a tile; s: what the tokens behind the tile pass to the last one."""
    grads = inflow
    for k in tl.static_range(TILE):
        here = (j == TILE - 1 - k)[:, None]
        own = s + pick(inflow, here, 0)
        s = pick(a, here, 0) * own
        grads = tl.where(here, own[None, :], grads)
    return grads


@triton.jit
def decay_of(rate, step, raw):
    """exp(rate step) of one state, [TILE, BLOCK], as exact as `decays`."""
    if raw.dtype == tl.float32:
        return exp(rate[None, :] * step)
    else:  # noqa: RET505 - resolved when compiling
        return exp2((rate * LOG2_E)[None, :] * step)


@triton.jit
def one_state_plainly(grad, step, taken, gates, h, s, rate, raw, tables, j, TILE: tl.constexpr, M: tl.constexpr,
                      CARRIED: tl.constexpr):  # fmt: skip
    """What one state adds to flow and lost of every stream and to the gates' gradients; its sums of A; and what is to
    be summed over channels. tables: [TILE] of every B and of C."""
    a, before, after = (), (), ()
    inflow = tl.zeros_like(grad)
    for i in tl.static_range(M + 1):
        a = a + (decay_of(rate[i], step[i], raw[i]),)
    for i in tl.static_range(1, M + 1):
        earlier, later = replay(a[i], tables[i][:, None] * taken[i], h[i], j, TILE)
        before, after = before + (earlier,), after + (later,)
        inflow += gates[i - 1] * later
    b = tables[0][:, None] * taken[0]
    if CARRIED:
        b += inflow
    earlier, fused = replay(a[0], b, h[0], j, TILE)
    if not CARRIED:
        fused += inflow
    before = (earlier,) + before
    outflow = tables[M + 1][:, None] * grad
    flows, losts, gate_grads, sums, parts = (), (), (), (), ()
    for i in tl.static_range(M + 1):
        if i == 0:
            dh = walk_back(a[0], outflow, s[0], j, TILE)
            if CARRIED:
                outflow = dh
        else:
            gate_grads = gate_grads + (outflow * after[i - 1],)
            dh = walk_back(a[i], gates[i - 1] * outflow, s[i], j, TILE)
        lost = a[i] * dh * before[i]
        flows, losts = flows + (dh * tables[i][:, None],), losts + (lost * rate[i][None, :],)
        sums, parts = sums + (tl.sum(lost * step[i], axis=0),), parts + (dh * taken[i],)
    return flows, losts, gate_grads, sums, parts + (fused * grad,)


@triton.jit
def added(sums, more):
    result = ()
    for i in tl.static_range(len(sums)):
        result = result + (sums[i] + more[i],)
    return result


@triton.jit
def place_of(row, stride, channel):
    """Offsets [TILE, BLOCK] of rows whose channels neighbouring threads shall take, one each (see `state_offsets`)."""
    return tl.multiple_of(tl.max_contiguous(row[:, None] * stride + channel[None, :], [1, 2]), [1, 1])


@triton.jit
def rows_of(tokens, strides, batch, start, row, channel, COUNT: tl.constexpr):
    """Tokens start + row of the first COUNT tensors, [TILE, BLOCK], still in their own types."""
    result = ()
    for i in tl.static_range(COUNT):
        base = tokens[i] + (batch * strides[i][0] + start.to(tl.int64) * strides[i][1])
        result = result + (tl.load(base + place_of(row, strides[i][1], channel)),)
    return result


@triton.jit
def to_gradients(raw, bias, u, step, flow, lost, inside, SOFTPLUS: tl.constexpr):
    """Gradients of dt and of u from the sums over states, [TILE, BLOCK]."""
    ddt = flow * u + lost
    if SOFTPLUS:
        ddt *= sigmoid(raw + bias[None, :])
    return tl.where(inside, ddt, 0.0), flow * step


@triton.jit
def one_state_loaded(
    kept, ends, stride, place, A, entry, rate_place, rates, entries, rest, channel, tables, table, shelf, line, t, j,
    M: tl.constexpr, PASSED: tl.constexpr,
):  # fmt: skip
    """One state before a tile, what the tokens behind the tile pass back to it, its rate; rows of every B and of C."""
    h, s, rate, lines = (), (), (), ()
    for i in tl.static_range(M + 1):
        h = h + (tl.load(kept + (i * stride + place)),)
        rate = rate + (tl.load(A + (i * rates + rate_place) + channel),)
        back = tl.load(ends + (i * stride + place))
        if PASSED:
            back += exp(rate[i] * rest[i]) * tl.load(entry + (i * entries + rate_place))
        s = s + (back,)
    for i in tl.static_range(M + 2):
        lines = lines + (tl.load(tables + (i * table + shelf + line + t) + j),)
    return h, s, rate, lines


@triton.jit
def rows_stored(
    du, ddt, dgate, dskip, dbias, rows, biases, skip, channel, grad, step, flow, lost, gate_grads, inside,
    batch, batches, start, place, T, D,
    UNIT: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_SKIP: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Store what a tile's sums over states make of u, dt and gates; the sums for the skip and every bias with it.

    UNIT: of `lost`, the logarithm of the decays' base.
    """
    biases_new = ()
    for i in tl.static_range(M + 1):
        at = ((i * batches + batch) * T + start) * D
        scaled = lost[i]
        if UNIT != 1.0:
            scaled = lost[i] * UNIT
        u = rows[i].to(tl.float32)
        x_grad, u_grad = to_gradients(
            rows[M + 1 + i].to(tl.float32), biases[i], u, step[i], flow[i], scaled, inside, SOFTPLUS
        )
        if i == 0:
            dskip += tl.sum(grad * u, axis=0)
            if HAS_SKIP:
                u_grad += tl.load(skip + channel)[None, :] * grad
        biases_new = biases_new + (dbias[i] + tl.sum(x_grad, axis=0),)
        tl.store(du + at + place, u_grad.to(du.dtype.element_ty), mask=inside)
        tl.store(ddt + at + place, x_grad.to(ddt.dtype.element_ty), mask=inside)
        if i > 0:
            at = (((i - 1) * batches + batch) * T + start) * D
            tl.store(dgate + at + place, gate_grads[i - 1].to(dgate.dtype.element_ty), mask=inside)
    return dskip, biases_new


@triton.jit(do_not_specialize=["T", "span", "spans", "groups"])
def gradients(
    tokens, strides,  # [B, T, D] each: u of every stream, dt of every stream, the gates, the output's gradient, z
    tables,  # [m + 2, B, G, N, P] float32: every B, and C
    A, bias, skip,  # [m + 1, N, D], [m + 1, D] and [D], float32
    kept, ends,  # [m + 1, B, tiles, N, D]: states before every tile, their gradients after it
    entry, rest,  # PASSED: ends lack what `entry` [m + 1, B, segments, N, D] becomes over `rest` [m + 1, B, tiles, D]
    du, ddt, dgate,  # [m + 1, B, T, D], the same, [m, B, T, D]
    sums,  # [m + 2, blocks, B, G, N, P]: sums over one block of channels
    dA,  # [m + 1, spans, B, N, D] float32, zeros: sums over the tokens of one span of tiles
    dchannel,  # [m + 2, spans, B, D] float32: skip, and the bias of every stream
    T, D, N, P, per_group, groups, span, spans,
    PASSED: tl.constexpr, CARRIED: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_Z: tl.constexpr, HAS_SKIP: tl.constexpr,
    M: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, SLOTS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """All gradients of `span` tiles, for BLOCK channels of one batch element; grid (channel blocks, B, spans).

    spans: programs to a segment of the walk back.
    """
    channel, exists, group = own_channels(per_group, BLOCK)
    nearest = tl.minimum(channel, group * per_group + per_group - 1)  # is read where no channel exists
    batch, batches = tl.program_id(1).to(tl.int64), tl.num_programs(1).to(tl.int64)
    tiles, first, j = tl.cdiv(T, TILE), tl.program_id(2) * span, tl.arange(0, TILE)
    home = tl.program_id(2) * batches + batch
    blocks = tl.num_programs(0) // groups
    table = batches * groups * N * P.to(tl.int64)  # from one table to the next
    shelf = (batch * groups + group) * N * P
    FAST: tl.constexpr = (
        ASSEMBLY and M <= 2 and (8 if M == 0 else 4) == TILE and BLOCK == 32
        and tokens[0].dtype.element_ty != tl.float32 and tokens[M + 1].dtype.element_ty != tl.float32
    )  # fmt: skip
    number = summed(tl.arange(0, BLOCK))
    part = (number // TILE * blocks + tl.program_id(0) % blocks) * table + shelf + number % TILE
    ones = ((tl.arange(0, BLOCK)[None, :] // 4 == j[:, None]).to(tl.float32),)
    if TILE == 4:
        ones = ones + ((tl.arange(0, BLOCK)[None, :] // 4 == j[:, None] + 4).to(tl.float32),)
    biases, dbias = (), ()
    for i in tl.static_range(M + 1):
        biases = biases + (tl.load(bias + i * D + nearest),)
        dbias = dbias + (tl.zeros([BLOCK], tl.float32),)
    dskip = tl.zeros([BLOCK], tl.float32)
    stride = batches * tiles * N * D
    home_place = (batch * tiles + first) * N * D + nearest
    segments = tl.cdiv(tl.num_programs(2), spans)
    entry += (batch * segments + tl.program_id(2) // spans) * N * D + nearest
    entries = batches * segments * N * D
    if FAST:
        lane = tl.arange(0, BLOCK) * 4
        own_tables = tables + (tl.minimum(lane // TILE, M + 1) * table + shelf + lane % TILE + first * TILE)
        SLOT: tl.constexpr = _SLOTS[2 * M + PASSED]
        RING: tl.constexpr = _RINGS[2 * M + PASSED]
        ring = tl.inline_asm_elementwise(RING, "=r,r", [span], dtype=tl.int32, is_pure=False, pack=1)
        read, write = ring, ring + (SLOTS - 1) * SLOT
        ahead = (kept + home_place, ends + home_place, A + nearest, entry, own_tables, 0)
        for i in tl.static_range(SLOTS - 1):
            fetch(ring + i * SLOT, lane, ahead, stride, N * D, entries, M, PASSED)
            ahead = advanced(ahead, N, D, P, TILE)
    for tile in range(first, tl.minimum(first + span, tiles)):
        t = tile * TILE + j
        inside = (t < T)[:, None] & exists[None, :]
        start, row = first * TILE, tl.minimum(t, T - 1) - first * TILE
        rows = rows_of(tokens, strides, batch, start, row, nearest, 3 * M + 3 + HAS_Z)
        grad = rows[3 * M + 2].to(tl.float32)
        if HAS_Z:
            z = rows[3 * M + 3].to(tl.float32)
            grad *= z * sigmoid(z)
        grad = tl.where(inside, grad, 0.0)
        step, taken, gates, flow, lost, gate_grads, left = (), (), (), (), (), (), ()
        for i in tl.static_range(M + 1):
            if PASSED:
                left = left + (tl.load(rest + (((i * batches + batch) * tiles + tile) * D + nearest)),)
            x = activate(rows[M + 1 + i].to(tl.float32) + biases[i][None, :], SOFTPLUS)
            step = step + (tl.where(inside, x, 0.0),)
            taken = taken + (step[i] * rows[i].to(tl.float32),)
            flow, lost = flow + (tl.zeros_like(grad),), lost + (tl.zeros_like(grad),)
        for i in tl.static_range(M):
            gates = gates + (tl.where(inside, rows[2 * M + 2 + i].to(tl.float32), 0.0),)
            gate_grads = gate_grads + (tl.zeros_like(grad),)
        sums_here, dA_here = sums + part + tile * TILE, dA + home * N * D + channel
        for n in range(N):
            if FAST:
                tl.inline_asm_elementwise(_ARRIVED, "=r,r", [read], dtype=tl.int32, is_pure=False, pack=1)
                fetch(write, lane, ahead, stride, N * D, entries, M, PASSED)
                ahead = advanced(ahead, N, D, P, TILE)
                given = ones + (grad,) + step + taken + gates
                for i in tl.static_range(len(left)):
                    given = given + (left[i][None, :],)
                given = given + flow + lost + gate_grads + (read, lane[None, :])
                write = read
                read = tl.where(read == ring + (SLOTS - 1) * SLOT, ring, read + SLOT)
                found = one_state(given, M, CARRIED, PASSED)
                flow, lost = found[: M + 1], found[M + 1 : 2 * M + 2]
                gate_grads = found[2 * M + 2 : 3 * M + 2]
                new_sums = ()
                for i in tl.static_range(M + 1):
                    new_sums = new_sums + (pick(found[3 * M + 2], (j == i)[:, None], 0),)
                total = pick(found[3 * M + 3], (j == 0)[:, None], 0) * _UNCUT
                tl.store(sums_here, total.to(sums.dtype.element_ty), mask=number < (M + 2) * TILE)
                sums_here += P
            else:
                h, s, rate, lines = one_state_loaded(
                    kept + home_place, ends + home_place, stride, ((tile - first) * N + n) * D,
                    A, entry, n * D, N * D, entries, left, nearest, tables, table, shelf, n * P, tile * TILE, j,
                    M, PASSED,
                )  # fmt: skip
                flows, losts, more, new_sums, parts = one_state_plainly(
                    grad, step, taken, gates, h, s, rate, rows[M + 1 : 2 * M + 2], lines, j, TILE, M, CARRIED
                )
                flow, lost, gate_grads = added(flow, flows), added(lost, losts), added(gate_grads, more)
                for i in tl.static_range(M + 2):
                    place = (i * blocks + tl.program_id(0) % blocks) * table + shelf + n * P
                    tl.store(sums + place + t, tl.sum(parts[i], axis=1).to(sums.dtype.element_ty))
            for i in tl.static_range(M + 1):
                place = dA_here + i * batches * tl.num_programs(2) * N * D
                if WHOLE:
                    tl.atomic_add(place, new_sums[i], sem="relaxed")
                else:
                    tl.atomic_add(place, new_sums[i], mask=exists, sem="relaxed")
            dA_here += D
        place = place_of(t - start, D, channel)
        rows = rows_of(tokens, strides, batch, start, row, nearest, 2 * M + 2)
        dskip, dbias = rows_stored(
            du, ddt, dgate, dskip, dbias, rows, biases, skip, nearest, grad, step, flow, lost, gate_grads, inside,
            batch, batches, start, place, T, D, _LN_2 if FAST else 1.0, SOFTPLUS, HAS_SKIP, M,
        )  # fmt: skip
    if FAST:  # What was fetched beyond the last tile is let arrive before the shared memory is given up.
        tl.inline_asm_elementwise(_ALL_ARRIVED, "=r,r", [span], dtype=tl.int32, is_pure=False, pack=1)
    row = tl.num_programs(2) * batches.to(tl.int64)
    tl.store(dchannel + home * D + channel, dskip, mask=exists)
    for i in tl.static_range(M + 1):
        tl.store(dchannel + (home + (i + 1) * row) * D + channel, dbias[i], mask=exists)
