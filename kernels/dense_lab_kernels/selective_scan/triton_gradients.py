"""The backward walk of the selective scan: all gradients of all streams in one pass over the tokens, last first.

A thread owns a channel. It walks a segment back tile by tile, and passes over the states of a tile a few at a time
(CHUNK): it replays them from the state before the tile, walks back with their gradients, and adds to the sums over
states (du, ddt, the gates). What depends on a token and a channel alone is computed once. The gradients of B and C,
sums over channels, are reduced over the warp for every tile; other programs' parts are added afterwards. No atomics.

Letters as in the forward; states of a chunk are [TILE, CHUNK, BLOCK].
"""

# ruff: noqa: RUF005 - Triton knows no unpacking inside a tuple

from __future__ import annotations

import triton
import triton.language as tl

from dense_lab_kernels._triton import INTERPRETED, sigmoid
from dense_lab_kernels.selective_scan.triton_backward import replay, slope, walk_back
from dense_lab_kernels.selective_scan.triton_forward import (
    activate,
    decays,
    fetch_shared,
    load_states,
    own_channels,
    pick,
    piece_offset,
    state_offsets,
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


@triton.jit
def add_channels(out, x, first, live, n_last, TILE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
                 EXACT: tl.constexpr):  # fmt: skip
    """Sums of x [TILE, CHUNK, BLOCK] over its channels into out[t, first + n], t < live, n < n_last."""
    j, c = tl.arange(0, TILE), tl.arange(0, CHUNK)
    if _TENSOR_CORES and not EXACT and BLOCK == 32 and (TILE * CHUNK == 32 or TILE * CHUNK == 16):
        lane = tl.arange(0, BLOCK)
        if TILE * CHUNK == 32:
            y = tl.inline_asm_elementwise(_SUMS_32, _TYPES_32, [x], dtype=tl.float32, is_pure=False, pack=32)
            index = lane // 16 * 16 + lane % 4 * 4 + lane // 4 % 4
        else:
            y = tl.inline_asm_elementwise(_SUMS_16, _TYPES_16, [x], dtype=tl.float32, is_pure=False, pack=16)
            index = lane % 4 * 4 + lane // 8
        total = pick(pick(y, (j == 0)[:, None, None], 0), (c == 0)[:, None], 0) * _UNCUT
        t, n = index // CHUNK, first + index % CHUNK
        tl.store(out + t * n_last + n, total, mask=(t < live) & (n < n_last))
    else:
        t, n = j[:, None], (first + c)[None, :]
        tl.store(out + t * n_last + n, tl.sum(x, axis=2), mask=(t < live) & (n < n_last))


@triton.jit
def rows_from(pointer, stride, channel, TILE: tl.constexpr):
    """Pointers [TILE, BLOCK] to `channel` of the rows from `pointer` on.

    Channel first, then the row: one addition per row, the same for all threads, instead of an offset for each.
    """
    return (pointer + channel[None, :]) + tl.arange(0, TILE).to(tl.int64)[:, None] * stride


@triton.jit
def fetch_rows(tokens, strides, batch, t, channel, mask, TILE: tl.constexpr):
    """TILE tokens from t on of every tensor [B, T, D]; zeros where masked."""
    result = ()
    for i in tl.static_range(len(tokens)):
        row = tokens[i] + (batch * strides[i][0] + t.to(tl.int64) * strides[i][1])
        result = result + (tl.load(rows_from(row, strides[i][1], channel, TILE), mask=mask, other=0.0),)
    return result


@triton.jit
def chunk_states(A, kept, grads, dA, tile, tiles, piece, segments, home, fresh, offsets, mask, D, N, M: tl.constexpr):
    """Of every stream: rates, states before the tile, gradients of those after it, the gradient of A so far."""
    rate, h, s, old = (), (), (), ()
    for i in tl.static_range(M + 1):
        rate = rate + (load_states(A + i * D * N, offsets, mask),)
        h = h + (load_states(kept + piece_offset(i, tile, tiles, D, N), offsets, mask),)
        s = s + (load_states(grads + piece_offset(i, piece, segments, D, N), offsets, mask),)
        own = dA + (i * tl.num_programs(1) * segments + home).to(tl.int64) * D * N
        old = old + (tl.load(own + offsets, mask=mask & (offsets * 0 + fresh < 1), other=0.0),)
    return rate, h, s, old


@triton.jit(do_not_specialize=["T", "D", "per_group", "segment", "groups"])
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
    NP: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Walk one segment back for BLOCK channels of one batch element; grid (channel blocks, B, segments)."""
    channel, exists, group = own_channels(per_group, BLOCK)
    c, j = tl.arange(0, CHUNK), tl.arange(0, TILE)
    batch = tl.program_id(1).to(tl.int64)
    batches = tl.num_programs(1)
    piece, segments = tl.program_id(2), tl.num_programs(2)
    begin = piece * segment
    end = tl.minimum(begin + segment, T)
    tiles = tl.cdiv(T, TILE)
    home = piece * batches + batch
    blocks = tl.num_programs(0) // groups
    part = ((tl.program_id(0) % blocks) * batches + batch) * groups + group
    biases, dbias = (), ()
    for i in tl.static_range(M + 1):
        biases = biases + (tl.load(bias + i * D + channel, mask=exists, other=0.0),)
        dbias = dbias + (tl.zeros([BLOCK], tl.float32),)
    dskip = tl.zeros([BLOCK], tl.float32)
    skips = dskip
    if HAS_SKIP:
        skips = tl.load(skip + channel, mask=exists, other=0.0)

    count = tl.cdiv(end - begin, TILE)
    for walked in range(count):
        tile = begin // TILE + count - 1 - walked
        t = tile * TILE + j
        live = (t < end)[:, None]
        inside = live & exists[None, :]
        rows = fetch_rows(tokens, strides, batch, tile * TILE, channel, inside, TILE)
        row = (batch * T + tile * TILE) * D
        grad = rows[3 * M + 2].to(tl.float32)
        if HAS_Z:
            z = rows[3 * M + 3].to(tl.float32)
            open_ = sigmoid(z)
            z_grad = grad * rows[3 * M + 4].to(tl.float32) * open_ * (1.0 + z * (1.0 - open_))
            tl.store(rows_from(dz + row, D, channel, TILE), z_grad.to(dz.dtype.element_ty), mask=inside)
            grad = grad * z * open_
        step, taken, flow, lost, gates, gate_grads = (), (), (), (), (), ()
        for i in tl.static_range(M + 1):
            x = rows[M + 1 + i].to(tl.float32) + biases[i][None, :]
            step = step + (tl.where(live, activate(x, SOFTPLUS), 0.0),)
            taken = taken + (step[i] * rows[i].to(tl.float32),)
            flow = flow + (tl.zeros([TILE, BLOCK], tl.float32),)
            lost = lost + (tl.zeros([TILE, BLOCK], tl.float32),)
        for i in tl.static_range(M):
            gates = gates + (rows[2 * M + 2 + i].to(tl.float32),)
            gate_grads = gate_grads + (tl.zeros([TILE, BLOCK], tl.float32),)
        for first in tl.range(0, NP, CHUNK, loop_unroll_factor=UNROLL):
            n = first + c
            mask, shared_mask = exists[None, :], live
            if N != NP:
                mask, shared_mask = (n < N)[:, None] & mask, (n < N)[None, :] & live
            offsets = state_offsets(channel, n, D)
            shared = fetch_shared(tables, table_strides, batch, group, t, n, shared_mask)
            rate, h, s, old = chunk_states(
                A, kept, grads, dA, tile, tiles, piece, segments, home, walked == 0, offsets, mask, D, N, M
            )
            inflow = tl.zeros([TILE, CHUNK, BLOCK], tl.float32)
            a, before, after = (decays(rate[0], step[0], rows[M + 1]),), (), ()
            for i in tl.static_range(1, M + 1):
                a = a + (decays(rate[i], step[i], rows[M + 1 + i]),)
                b = shared[i].to(tl.float32)[:, :, None] * taken[i][:, None, :]
                earlier, later = replay(a[i], b, h[i], j, TILE)
                before, after = before + (earlier,), after + (later,)
                inflow += gates[i - 1][:, None, :] * later
            b = shared[0].to(tl.float32)[:, :, None] * taken[0][:, None, :]
            if CARRIED:
                b += inflow
            earlier, fused = replay(a[0], b, h[0], j, TILE)
            if M > 0 and not CARRIED:
                fused += inflow
            before = (earlier,) + before
            live_tokens = end - tile * TILE
            table = (part + (M + 1) * blocks * batches * groups) * T + tile * TILE
            add_channels(sums + table * N, fused * grad[:, None, :], first, live_tokens, N,
                         TILE, CHUNK, BLOCK, rows[0].dtype == tl.float32)  # fmt: skip
            passed = shared[M + 1].to(tl.float32)[:, :, None] * grad[:, None, :]
            new_flow, new_lost, new_gate = (), (), ()
            source_flow = passed
            for i in tl.static_range(M + 1):
                if i > 0:
                    new_gate = new_gate + (gate_grads[i - 1] + tl.sum(source_flow * after[i - 1], axis=1),)
                    passed = gates[i - 1][:, None, :] * source_flow
                dh, start = walk_back(a[i], passed, s[i], j, TILE, False)
                if CARRIED and i == 0:
                    source_flow = dh
                tl.store(grads + piece_offset(i, piece, segments, D, N) + offsets, start, mask=mask)
                table = (part + i * blocks * batches * groups) * T + tile * TILE
                add_channels(sums + table * N, dh * taken[i][:, None, :], first, live_tokens, N,
                             TILE, CHUNK, BLOCK, rows[0].dtype == tl.float32)  # fmt: skip
                new_flow = new_flow + (flow[i] + tl.sum(dh * shared[i].to(tl.float32)[:, :, None], axis=1),)
                faded = a[i] * dh * before[i]
                new_lost = new_lost + (lost[i] + tl.sum(faded * rate[i][None, :, :], axis=1),)
                own = dA + (i * batches * segments + home).to(tl.int64) * D * N
                tl.store(own + offsets, old[i] + tl.sum(faded * step[i][:, None, :], axis=0), mask=mask)
            flow, lost, gate_grads = new_flow, new_lost, new_gate
        added = ()
        for i in tl.static_range(M + 1):
            value = rows[i].to(tl.float32)
            x = rows[M + 1 + i].to(tl.float32) + biases[i][None, :]
            x_grad = tl.where(live, (flow[i] * value + lost[i]) * slope(x, SOFTPLUS), 0.0)
            value_grad = flow[i] * step[i]
            if HAS_SKIP and i == 0:
                value_grad += skips[None, :] * grad
                dskip += tl.sum(grad * value, axis=0)
            first_row = (i * batches * T).to(tl.int64) * D + row
            tl.store(rows_from(du + first_row, D, channel, TILE), value_grad.to(du.dtype.element_ty), mask=inside)
            tl.store(rows_from(ddt + first_row, D, channel, TILE), x_grad.to(ddt.dtype.element_ty), mask=inside)
            added = added + (dbias[i] + tl.sum(x_grad, axis=0),)
        dbias = added
        for i in tl.static_range(M):
            first_row = (i * batches * T).to(tl.int64) * D + row
            place = rows_from(dgate + first_row, D, channel, TILE)
            tl.store(place, gate_grads[i].to(dgate.dtype.element_ty), mask=inside)
    rows_of = batches * segments
    if HAS_SKIP:
        tl.store(dchannel + home.to(tl.int64) * D + channel, dskip, mask=exists)
    for i in tl.static_range(M + 1):
        tl.store(dchannel + ((i + 1) * rows_of + home).to(tl.int64) * D + channel, dbias[i], mask=exists)
