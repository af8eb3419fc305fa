"""The backward walk of the selective scan: all gradients of all streams in one pass over the tokens, last first.

A program owns 32 channels, one to a lane, and each of its WARPS four of the states: enough warps for the processor to
have something to do while others wait. They walk a segment back tile by tile, replay a tile's states from the state
before it, walk back with their gradients, and add up over states (du, ddt, the gates; through shared memory) and over
channels (B and C; on tensor cores, within the warp; other programs' parts are added afterwards). The states'
gradients and the sums of A stay in registers from tile to tile. No atomics.

Letters as in the forward; states of a tile are [TILE, HELD, WARPS, BLOCK]:
a thread of warp w holds the HELD states from w HELD on.
"""

# ruff: noqa: RUF005 - Triton knows no unpacking inside a tuple

from __future__ import annotations

import triton
import triton.language as tl

from dense_lab_kernels._triton import INTERPRETED, sigmoid
from dense_lab_kernels.selective_scan.triton_backward import slope
from dense_lab_kernels.selective_scan.triton_forward import (
    LOG2_E,
    activate,
    exp,
    exp2,
    fetch,
    load_states,
    own_channels,
    pick,
    piece_offset,
)

_TENSOR_CORES = tl.constexpr(not INTERPRETED)
# Tensor cores cut the operands to 10 bits of mantissa: on average a factor 1 - 3.5e-4, which is put back.
_UNCUT = tl.constexpr(1.00035)


def _warp_sums(count: int) -> str:
    """PTX: operands count .. 2 count - 1 hold `count` numbers of every thread, summed over the warp into operand 0.

    Thread l receives the sum of number e(l) (`warp_sum_index`); the other results are zero. The four lanes of a
    quad are summed on tensor cores, 16 x 8 against a matrix of ones and zeros that puts the sums of four numbers at
    a time into columns of their own; then the eight quads in steps that halve what is left.
    """
    code = [".reg .b32 l, g, t, x<32>, s<8>; .reg .pred q<8>, p; .reg .f32 v<8>, a, b, o, z;"]
    code += ["mov.u32 l, %laneid; shr.u32 g, l, 2; mov.f32 z, 0f00000000;"]
    code += [f"setp.eq.u32 q{i}, g, {i}; selp.b32 s{i}, 0x3F800000, 0, q{i};" for i in range(8)]
    code += [f"mov.b32 x{i}, ${count + i};" for i in range(count)]
    for i in range(count // 4):
        first, slot = i // 4 * 4, i % 4
        out = ", ".join(f"v{first + k}" for k in range(4))
        given = ", ".join(f"x{4 * i + k}" for k in (0, 2, 1, 3))
        code.append(
            f"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {{{out}}}, {{{given}}}, "
            f"{{s{2 * slot}, s{2 * slot + 1}}}, {{{out if slot else 'z, z, z, z'}}};"
        )
    left = count // 4
    for mask in (16, 8, 4):
        code.append(f"and.b32 t, l, {mask}; setp.ne.u32 p, t, 0;")
        if left == 1:
            code.append(f"shfl.sync.bfly.b32 o, v0, {mask}, 31, -1; add.f32 v0, v0, o;")
            continue
        left //= 2
        for k in range(left):
            code.append(f"selp.f32 a, v{k}, v{k + left}, p; selp.f32 b, v{k + left}, v{k}, p;")
            code.append(f"shfl.sync.bfly.b32 o, a, {mask}, 31, -1; add.f32 v{k}, b, o;")
    code += ["mov.f32 $0, v0;", *(f"mov.f32 ${i}, z;" for i in range(1, count))]
    return "{ " + " ".join(code) + " }"


_SUMS_32, _SUMS_16 = tl.constexpr(_warp_sums(32)), tl.constexpr(_warp_sums(16))
_TYPES_32, _TYPES_16 = (tl.constexpr(",".join(["=f"] * k + ["f"] * k)) for k in (32, 16))


def _steps(tokens: int, states: int, *, back: bool) -> tuple[str, str]:
    """PTX and operand types of `replayed` (or, back, of `walked_back`) for the numbers of one thread."""
    count = tokens * states
    code = [".reg .f32 h, t;"]
    for n in range(states):
        order = [k * states + n for k in range(tokens)]
        if back:  # results: gradients, passed on; operands: a, C, gradient of y, s
            code.append(f"mov.f32 h, ${5 * count + n};")
            for i in reversed(order):
                code.append(f"fma.rn.f32 ${i}, ${3 * count + i}, ${4 * count + i}, h;")
                code.append(f"mul.f32 ${count + i}, ${2 * count + i}, ${i}; mov.f32 h, ${count + i};")
        else:  # results: states before and after; operands: a, b, h
            code.append(f"mov.f32 h, ${4 * count + n};")
            for i in order:
                code.append(f"mov.f32 ${i}, h; fma.rn.f32 h, ${2 * count + i}, h, ${3 * count + i};")
                code.append(f"mov.f32 ${count + i}, h;")
    types = ["=&f"] * (2 * count) + ["f"] * ((4 if back else 3) * count)
    return "{ " + " ".join(code) + " }", ",".join(types)


_REPLAY_32, _REPLAY_TYPES_32 = (tl.constexpr(x) for x in _steps(8, 4, back=False))
_REPLAY_16, _REPLAY_TYPES_16 = (tl.constexpr(x) for x in _steps(4, 4, back=False))
_BACK_32, _BACK_TYPES_32 = (tl.constexpr(x) for x in _steps(8, 4, back=True))
_BACK_16, _BACK_TYPES_16 = (tl.constexpr(x) for x in _steps(4, 4, back=True))


@triton.jit
def replayed(a, b, h, j, TILE: tl.constexpr, HELD: tl.constexpr):
    """The states before and after every token of a tile, h_t = a_t h_{t-1} + b_t."""
    if _TENSOR_CORES and TILE == 8 and HELD == 4:
        before, after = tl.inline_asm_elementwise(
            _REPLAY_32, _REPLAY_TYPES_32, [a, b, h[None, :, :, :]],
            dtype=(tl.float32, tl.float32), is_pure=True, pack=32,
        )  # fmt: skip
    elif _TENSOR_CORES and TILE == 4 and HELD == 4:
        before, after = tl.inline_asm_elementwise(
            _REPLAY_16, _REPLAY_TYPES_16, [a, b, h[None, :, :, :]],
            dtype=(tl.float32, tl.float32), is_pure=True, pack=16,
        )  # fmt: skip
    else:
        before, after = b, b
        for k in tl.static_range(TILE):
            here = (j == k)[:, None, None, None]
            before = tl.where(here, h[None, :, :, :], before)
            h = pick(a, here, 0) * h + pick(b, here, 0)
            after = tl.where(here, h[None, :, :, :], after)
    return before, after


@triton.jit
def walked_back(a, C, grad, s, j, TILE: tl.constexpr, HELD: tl.constexpr):
    """Gradients dh_t = a_{t+1} dh_{t+1} + C_t grad_t of the states after every token; a dh; the tile's first a dh.

    s: what the tokens behind the tile pass to its last state.
    """
    if _TENSOR_CORES and TILE == 8 and HELD == 4:
        dh, passed = tl.inline_asm_elementwise(
            _BACK_32, _BACK_TYPES_32, [a, C, grad, s[None, :, :, :]],
            dtype=(tl.float32, tl.float32), is_pure=True, pack=32,
        )  # fmt: skip
        s = pick(passed, (j == 0)[:, None, None, None], 0)
    elif _TENSOR_CORES and TILE == 4 and HELD == 4:
        dh, passed = tl.inline_asm_elementwise(
            _BACK_16, _BACK_TYPES_16, [a, C, grad, s[None, :, :, :]],
            dtype=(tl.float32, tl.float32), is_pure=True, pack=16,
        )  # fmt: skip
        s = pick(passed, (j == 0)[:, None, None, None], 0)
    else:
        inflow = C * grad
        dh = inflow
        for k in tl.static_range(TILE):
            here = (j == TILE - 1 - k)[:, None, None, None]
            own = s + pick(inflow, here, 0)
            s = pick(a, here, 0) * own
            dh = tl.where(here, own[None, :, :, :], dh)
        passed = a * dh
    return dh, passed, s


@triton.jit
def add_channels(out, x, live, N: tl.constexpr, TILE: tl.constexpr, HELD: tl.constexpr, WARPS: tl.constexpr,
                 BLOCK: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """Sums of x [TILE, HELD, WARPS, BLOCK] over its channels into out[t, n], t < live, n < N."""
    j, i, w = tl.arange(0, TILE), tl.arange(0, HELD), tl.arange(0, WARPS)
    if _TENSOR_CORES and not EXACT and (TILE * HELD == 32 or TILE * HELD == 16):
        lane = tl.arange(0, BLOCK)
        if TILE * HELD == 32:
            y = tl.inline_asm_elementwise(_SUMS_32, _TYPES_32, [x], dtype=tl.float32, is_pure=False, pack=32)
            index = lane // 16 * 16 + lane % 4 * 4 + lane // 4 % 4
        else:
            y = tl.inline_asm_elementwise(_SUMS_16, _TYPES_16, [x], dtype=tl.float32, is_pure=False, pack=16)
            index = lane % 4 * 4 + lane // 8
        y = pick(pick(y, (j == 0)[:, None, None, None], 0), (i == 0)[:, None, None], 0) * _UNCUT
        t = (index // HELD)[None, :]
        n = w[:, None] * HELD + (index % HELD)[None, :]
        tl.store(out + t * N + n, y, mask=(t < live) & (n < N))
    else:
        t, n = j[:, None, None], (w[None, :] * HELD + i[:, None])[None, :, :]
        tl.store(out + t * N + n, tl.sum(x, axis=3), mask=(t < live) & (n < N))


@triton.jit
def _add_two(a, b, c, d):
    return a + c, b + d


@triton.jit
def state_place(channel, n, D):
    """Offsets [HELD, WARPS, BLOCK] of one token's states in [N, D], a channel to a thread (see `state_offsets`)."""
    return tl.multiple_of(tl.max_contiguous(n[:, :, None] * D + channel[None, None, :], [1, 2, 4]), [1, 1, 1])


@triton.jit
def fetch_held(tables, strides, batch, group, t, n, mask):
    """Tokens t of every B and C, [TILE, HELD, WARPS]; zeros where masked."""
    result = ()
    for i in tl.static_range(len(tables)):
        row = tables[i] + batch * strides[i][0] + (group // strides[i][3]) * strides[i][2]
        place = t.to(tl.int64)[:, None, None] * strides[i][1] + n[None, :, :]
        result = result + (tl.load(row + place, mask=mask, other=0.0).to(tl.float32),)
    return result


@triton.jit
def to_all(x, to_lane, SHARED: tl.constexpr):
    """[TILE, BLOCK] as [TILE, 1, 1, BLOCK], for every warp.

    SHARED: a gather of each channel from its own place, which the compiler does not move: a mere broadcast would have
    every warp compute x itself.
    """
    if SHARED:
        x = tl.gather(x, to_lane, 1)
    return x[:, None, None, :]


@triton.jit
def gated(grad, z, y, to, mask):
    """The gradient of y from that of y silu(z); that of z is stored."""
    open_ = sigmoid(z)
    tl.store(to, (grad * y * open_ * (1.0 + z * (1.0 - open_))).to(to.dtype.element_ty), mask=mask)
    return grad * z * open_


@triton.jit
def store_ends(grads, dA, dbias, stream, home, s, A_sums, bias_sums, offsets, channel, mask, exists, D, N):
    """What a walk of one stream ends with; home: which of all (segment, batch) it was."""
    tl.store(grads + piece_offset(stream, tl.program_id(2), tl.num_programs(2), D, N) + offsets, s, mask=mask)
    row = stream * tl.num_programs(1) * tl.num_programs(2) + home
    tl.store(dA + row * D * N + offsets, A_sums, mask=mask)
    tl.store(dbias + row * D + channel, tl.sum(bias_sums, axis=0), mask=exists)


@triton.jit(do_not_specialize=["T", "segment", "groups"])
def gradients(
    tokens, strides,  # [B, T, D] each: u of every stream, dt of every stream, the gates, the gradient, z and raw if any
    tables, table_strides,  # [B, T, G, N] each: B of every stream, C
    A, bias, skip,  # [m + 1, N, D], [m + 1, D] and [D], float32
    kept,  # [m + 1, B, tiles, N, D]: the states before every tile
    grads,  # [m + 1, B, segments, N, D]: the states' gradients at the end of every segment; becomes: at its start
    du, ddt, dgate, dz,  # [m + 1, B, T, D], the same, [m, B, T, D] and [B, T, D]
    sums,  # [m + 2, blocks, B, G, T, N] float32: the gradients of every B, and of C, of one block of channels
    dA, dchannel,  # [m + 1, B segments, N, D]; [m + 2, B segments, D]: skip, and the bias of every stream
    T, D, N: tl.constexpr, per_group, groups, segment,
    CARRIED: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_Z: tl.constexpr, HAS_SKIP: tl.constexpr, M: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, HELD: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    """Walk one segment back for BLOCK channels of one batch element; grid (channel blocks, B, segments)."""
    channel, exists, group = own_channels(per_group, BLOCK)
    n, j = tl.arange(0, WARPS)[None, :] * HELD + tl.arange(0, HELD)[:, None], tl.arange(0, TILE)
    offsets = state_place(channel, n, D)
    mask = exists[None, None, :] & (n < N)[:, :, None]
    to_lane = tl.zeros([TILE, BLOCK], tl.int32) + tl.arange(0, BLOCK)[None, :]
    batch, batches = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    piece, segments = tl.program_id(2), tl.num_programs(2)
    begin = piece * segment
    end = tl.minimum(begin + segment, T)
    tiles = tl.cdiv(T, TILE)
    home = piece * batches + batch
    blocks = tl.num_programs(0) // groups
    part = ((tl.program_id(0) % blocks) * batches + batch) * groups + group
    parts = blocks * batches * groups
    EXACT: tl.constexpr = tokens[0].dtype.element_ty == tl.float32
    s, rate, biases, dbias, A_sums = (), (), (), (), ()
    for i in tl.static_range(M + 1):
        s = s + (load_states(grads + piece_offset(i, piece, segments, D, N), offsets, mask),)
        rate = rate + (load_states(A + i * D * N, offsets, mask),)
        biases = biases + (tl.load(bias + i * D + channel, mask=exists, other=0.0),)
        dbias = dbias + (tl.zeros([TILE, BLOCK], tl.float32),)
        A_sums = A_sums + (tl.zeros([HELD, WARPS, BLOCK], tl.float32),)
    dskip = tl.zeros([TILE, BLOCK], tl.float32)
    skips = biases[0]
    if HAS_SKIP:
        skips = tl.load(skip + channel, mask=exists, other=0.0)
    count = tl.cdiv(end - begin, TILE)
    for walked in tl.range(0, count, num_stages=STAGES):
        tile = begin // TILE + count - 1 - walked
        t = tile * TILE + j
        live = (t < end)[:, None]
        inside = live & exists[None, :]
        rows = fetch(tokens, strides, batch, t, channel, inside)
        shared = fetch_held(tables, table_strides, batch, group, t, n, (t < end)[:, None, None] & (n < N)[None, :, :])
        h = ()
        for i in tl.static_range(M + 1):
            h = h + (load_states(kept + piece_offset(i, tile, tiles, D, N), offsets, mask),)
        place = (batch * T + t.to(tl.int64))[:, None] * D + channel[None, :]
        grad = rows[3 * M + 2].to(tl.float32)
        if HAS_Z:
            grad = gated(grad, rows[3 * M + 3].to(tl.float32), rows[3 * M + 4].to(tl.float32), dz + place, inside)
        step, steps, taken, gates, a, before, after = (), (), (), (), (), (), ()
        grad_of_y = to_all(grad, to_lane, SHARED)
        for i in tl.static_range(M + 1):
            x = rows[M + 1 + i].to(tl.float32) + biases[i][None, :]
            step = step + (tl.where(live, activate(x, SOFTPLUS), 0.0),)
            steps = steps + (to_all(step[i], to_lane, SHARED),)
            taken = taken + (to_all(step[i] * rows[i].to(tl.float32), to_lane, SHARED),)
            if EXACT:
                a = a + (exp(rate[i][None, :, :, :] * steps[i]),)
            else:
                a = a + (exp2((rate[i] * LOG2_E)[None, :, :, :] * steps[i]),)
        for i in tl.static_range(M):
            gates = gates + (rows[2 * M + 2 + i].to(tl.float32)[:, None, None, :],)
        inflow = tl.zeros([TILE, HELD, WARPS, BLOCK], tl.float32)
        for i in tl.static_range(1, M + 1):
            earlier, later = replayed(a[i], shared[i][:, :, :, None] * taken[i], h[i], j, TILE, HELD)
            before, after = before + (earlier,), after + (later,)
            inflow += gates[i - 1] * later
        b = shared[0][:, :, :, None] * taken[0]
        if CARRIED:
            b += inflow
        earlier, fused = replayed(a[0], b, h[0], j, TILE, HELD)
        if M > 0 and not CARRIED:
            fused += inflow
        before = (earlier,) + before
        table = (part + (M + 1) * parts) * T + tile * TILE
        add_channels(sums + table * N, fused * grad_of_y, end - tile * TILE, N, TILE, HELD, WARPS, BLOCK, EXACT)
        C = shared[M + 1][:, :, :, None]
        source_flow = C * grad_of_y
        starts, A_new, dbias_new = (), (), ()
        for i in tl.static_range(M + 1):
            stream = i * batches.to(tl.int64) * T * D
            if i > 0:
                gate_grad = tl.sum(tl.sum(source_flow * after[i - 1], axis=1), axis=1)
                gate_place = dgate + ((i - 1) * batches.to(tl.int64) * T * D + place)
                tl.store(gate_place, gate_grad.to(dgate.dtype.element_ty), mask=inside)
                dh, fade, start = walked_back(a[i], source_flow, gates[i - 1], s[i], j, TILE, HELD)
            else:
                dh, fade, start = walked_back(a[i], C, grad_of_y, s[i], j, TILE, HELD)
                if CARRIED:
                    source_flow = dh
            table = (part + i * parts) * T + tile * TILE
            add_channels(sums + table * N, dh * taken[i], end - tile * TILE, N, TILE, HELD, WARPS, BLOCK, EXACT)
            faded = fade * before[i]
            flow, lost = tl.sum(dh * shared[i][:, :, :, None], axis=1), tl.sum(faded * rate[i][None, :, :, :], axis=1)
            flow, lost = tl.reduce((flow, lost), 1, _add_two)
            starts = starts + (start,)
            A_new = A_new + (A_sums[i] + tl.sum(faded * steps[i], axis=0),)
            value = rows[i].to(tl.float32)
            x = rows[M + 1 + i].to(tl.float32) + biases[i][None, :]
            x_grad = tl.where(live, (flow * value + lost) * slope(x, SOFTPLUS), 0.0)
            value_grad = flow * step[i]
            if HAS_SKIP and i == 0:
                value_grad += skips[None, :] * grad
                dskip += grad * value
            tl.store(du + stream + place, value_grad.to(du.dtype.element_ty), mask=inside)
            tl.store(ddt + stream + place, x_grad.to(ddt.dtype.element_ty), mask=inside)
            dbias_new = dbias_new + (dbias[i] + x_grad,)
        s, A_sums, dbias = starts, A_new, dbias_new
    if HAS_SKIP:
        tl.store(dchannel + home * D + channel, tl.sum(dskip, axis=0), mask=exists)
    rows_of_biases = dchannel + batches * segments * D
    for i in tl.static_range(M + 1):
        store_ends(grads, dA, rows_of_biases, i, home, s[i], A_sums[i], dbias[i], offsets, channel, mask, exists, D, N)
