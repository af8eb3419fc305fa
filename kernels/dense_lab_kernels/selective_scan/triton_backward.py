"""Backward kernels of the selective scan: the states' gradients walk back in time, then every tile is on its own.

Two steps. `adjoint` walks the tokens backwards with the gradients of the states in registers, as the forward does with
the states, and keeps them at the end of every tile of TILE tokens (the states at the start of every tile come from a
forward walk). `own_gradients` and `source_gradients` then take each tile alone: they replay its states into registers,
walk back and give all gradients. Since tiles no longer wait for each other, a program can stay at a tile and pass over
many channels: the gradients of B and C, sums over channels, grow in registers and leave them once; those of A, sums
over tokens, grow in a buffer that only this program touches. No atomics: the result does not depend on scheduling.

Letters as in the forward; states of a tile are [TILE, NP, BLOCK].
"""

# ruff: noqa: RUF005 - Triton knows no unpacking inside a tuple

from __future__ import annotations

import triton
import triton.language as tl

from dense_lab_kernels._triton import sigmoid
from dense_lab_kernels.selective_scan.triton_forward import (
    activate,
    decays,
    fetch,
    fetch_shared,
    keep,
    load_states,
    own_channels,
    pick,
    piece_offset,
    state_offsets,
)


@triton.jit
def walk_back(a, inflow, s, j, TILE: tl.constexpr, REVERSED: tl.constexpr):
    """Gradients of the states of a tile, [TILE, NP, BLOCK], and that of the state before it.

    s: what the tokens behind the tile pass to its last state. REVERSED: the tile's tokens are listed last first.
    """
    grads = inflow
    for i in tl.static_range(TILE):
        here = (j == (i if REVERSED else TILE - 1 - i))[:, None, None]
        own = s + pick(inflow, here, 0)
        s = pick(a, here, 0) * own
        grads = tl.where(here, own[None, :, :], grads)
    return grads, s


@triton.jit
def replay(a, b, h, j, TILE: tl.constexpr):
    """The states before and after every token of a tile, [TILE, NP, BLOCK]."""
    before, after = b, b
    for i in tl.static_range(TILE):
        here = (j == i)[:, None, None]
        before = tl.where(here, h[None, :, :], before)
        h = pick(a, here, 0) * h + pick(b, here, 0)
        after = tl.where(here, h[None, :, :], after)
    return before, after


@triton.jit(do_not_specialize=["T", "segment"])
def adjoint(
    tokens, strides,  # [B, T, D] each: dt of every stream, the gates, the output's gradient, z and raw if gated
    tables, table_strides,  # C, as in `forward`
    A, bias,  # [m + 1, N, D] and [m + 1, D], float32
    entry,  # [m + 1, B, segments, N, D]: the states' gradients at the end of every segment
    dz,  # [B, T, D]
    kept,  # [m + 1, B, ceil(T / TILE), N, D]: the states' gradients at the end of every tile
    last,  # [m + 1, B, segments, N, D]: the states' gradients at the start of every segment
    spans,  # [m + 1, B, segments, D]: sums of dt
    T, D, N, per_group, segment,
    CARRIED: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_Z: tl.constexpr, OUTPUT: tl.constexpr, SUMS: tl.constexpr,
    M: tl.constexpr, NP: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walk one segment back for BLOCK channels of one batch element; grid (channel blocks, B, segments)."""
    channel, exists, group = own_channels(per_group, BLOCK)
    n = tl.arange(0, NP)
    j = tl.arange(0, TILE)
    offsets = state_offsets(channel, n, D)
    tile_mask = (n < N)[:, None] & exists[None, :]
    batch = tl.program_id(1).to(tl.int64)
    piece, segments = tl.program_id(2), tl.num_programs(2)
    begin = piece * segment
    end = tl.minimum(begin + segment, T)

    s, rate, biases, sums = (), (), (), ()
    for i in tl.static_range(M + 1):
        sums = sums + (tl.zeros([BLOCK], tl.float32),)
        s = s + (load_states(entry + piece_offset(i, piece, segments, D, N), offsets, tile_mask),)
        rate = rate + (load_states(A + i * D * N, offsets, tile_mask),)
        biases = biases + (tl.load(bias + i * D + channel, mask=exists, other=0.0),)

    count = tl.cdiv(end - begin, TILE)
    for walked in tl.range(0, count, num_stages=STAGES):
        tile = begin // TILE + count - 1 - walked
        t = tile * TILE + TILE - 1 - j
        live = (t < end)[:, None]
        rows = fetch(tokens, strides, batch, t, channel, live & exists[None, :])
        C = fetch_shared(tables, table_strides, batch, group, t, n, live & (n < N)[None, :])[0].to(tl.float32)
        grad = rows[2 * M + 1].to(tl.float32)
        if HAS_Z:
            z = rows[2 * M + 2].to(tl.float32)
            open_ = sigmoid(z)
            if OUTPUT:
                dz_tile = grad * rows[2 * M + 3].to(tl.float32) * open_ * (1.0 + z * (1.0 - open_))
                place = (batch * T + t.to(tl.int64))[:, None] * D + channel[None, :]
                tl.store(dz + place, dz_tile.to(dz.dtype.element_ty), mask=live & exists[None, :])
            grad = grad * z * open_
        if OUTPUT:
            keep(kept, s, tile, tl.cdiv(T, TILE), offsets, tile_mask, D, N)
        inflow = C[:, :, None] * grad[:, None, :]
        step = tl.where(live, activate(rows[0].to(tl.float32) + biases[0][None, :], SOFTPLUS), 0.0)
        own, own_start = walk_back(decays(rate[0], step, rows[0]), inflow, s[0], j, TILE, True)
        if CARRIED:
            inflow = own
        starts, totals = (own_start,), (sums[0] + tl.sum(step, axis=0),)
        for i in tl.static_range(1, M + 1):
            gate = rows[M + i].to(tl.float32)[:, None, :]
            other_step = tl.where(live, activate(rows[i].to(tl.float32) + biases[i][None, :], SOFTPLUS), 0.0)
            other_a = decays(rate[i], other_step, rows[i])
            _gradients, start = walk_back(other_a, gate * inflow, s[i], j, TILE, True)
            starts = starts + (start,)
            totals = totals + (sums[i] + tl.sum(other_step, axis=0),)
        s, sums = starts, totals
    for i in tl.static_range(M + 1):
        tl.store(last + piece_offset(i, piece, segments, D, N) + offsets, s[i], mask=tile_mask)
        if SUMS:
            span = ((i * tl.num_programs(1) + batch) * segments + piece) * D
            tl.store(spans + span + channel, sums[i], mask=exists)


@triton.jit
def slope(x, SOFTPLUS: tl.constexpr):
    """Derivative of `activate`."""
    if SOFTPLUS:
        return sigmoid(x)
    else:  # noqa: RET505 - resolved when compiling
        return x * 0.0 + 1.0


@triton.jit
def opened(rows, i: tl.constexpr, HAS_Z: tl.constexpr):
    """The gradient of y from that of the output, rows[i], and z, rows[i + 1]."""
    grad = rows[i].to(tl.float32)
    if HAS_Z:
        z = rows[i + 1].to(tl.float32)
        grad = grad * z * sigmoid(z)
    return grad


@triton.jit
def so_far(pointer, offsets, fresh, mask):
    """What a buffer that this program alone uses holds; zeros if it is `fresh`: nothing is there yet.

    Loaded with a block's inputs: behind its first store, a load is not moved forward and is waited for.
    """
    return tl.load(pointer + offsets, mask=mask & (offsets * 0 + fresh < 1), other=0.0)


@triton.jit
def own_share(per_group, splits, BLOCK: tl.constexpr):
    """Group, split and first and last + 1 channel, within the group, of a replaying program."""
    group, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    share = tl.cdiv(tl.cdiv(per_group, BLOCK), splits) * BLOCK
    return group, split, split * share, tl.minimum(split * share + share, per_group)


@triton.jit
def store_shared(out, split, group, groups, t, n, T, NP: tl.constexpr, sums):
    """Sums over channels [TILE, NP] into [splits, B, G, T, NP]."""
    row = ((split * tl.num_programs(1) + tl.program_id(1)) * groups + group).to(tl.int64) * T
    tl.store(out + (row + t)[:, None] * NP + n[None, :], sums, mask=(t < T)[:, None] & (n >= 0)[None, :])


@triton.jit(do_not_specialize=["T", "span", "splits", "groups"])
def own_gradients(
    tokens, strides,  # [B, T, D] each: u of every stream, dt of every stream, the gates, the output's gradient, z
    tables, table_strides,  # as in `forward`
    A, bias, skip,
    kept, ends,  # [m + 1, B, tiles, N, D]: states before every tile, gradients of the own states after it
    du, ddt,  # [B, T, D]
    dB, dC,  # [splits, B, G, T, NP] float32: sums over one split of the channels
    dA,  # [spans * B, N, D] float32: sums over the tokens of one span of tiles
    dskip, dbias,  # [spans * B, D] float32
    T, D, N, per_group, groups, span, splits,
    CARRIED: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_Z: tl.constexpr, HAS_SKIP: tl.constexpr, M: tl.constexpr,
    NP: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradients of the own stream, for one split of a group's channels and `span` tiles; grid (G splits, B, spans)."""
    group, split, begin, end = own_share(per_group, splits, BLOCK)
    batch = tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(T, TILE)
    n, j = tl.arange(0, NP), tl.arange(0, TILE)
    home = (tl.program_id(2) * tl.num_programs(1) + batch) * D
    first = tl.program_id(2) * span
    for tile in range(first, tl.minimum(first + span, tiles)):
        t = tile * TILE + j
        live = (t < T)[:, None]
        B_sums = tl.zeros([TILE, NP, BLOCK], tl.float32)
        C_sums = tl.zeros([TILE, NP, BLOCK], tl.float32)
        for place in range(begin, end, BLOCK):
            exists = place + tl.arange(0, BLOCK) < end
            channel = group * per_group + place + tl.arange(0, BLOCK)
            mask = (n < N)[:, None] & exists[None, :]
            offsets = state_offsets(channel, n, D)
            rows = fetch(tokens, strides, batch, t, channel, live & exists[None, :])
            shared = fetch_shared(tables, table_strides, batch, group, t, n, live & (n < N)[None, :])
            h = load_states(kept + piece_offset(0, tile, tiles, D, N), offsets, mask)
            s = load_states(ends + piece_offset(0, tile, tiles, D, N), offsets, mask)
            rate = load_states(A, offsets, mask)
            biases = tl.load(bias + channel, mask=exists, other=0.0)
            fresh = tile == first
            old_A = so_far(dA + home * N, offsets, fresh, mask)
            old_bias = so_far(dbias + home, channel, fresh, exists)
            if HAS_SKIP:
                skips = tl.load(skip + channel, mask=exists, other=0.0)
                old_skip = so_far(dskip + home, channel, fresh, exists)
            B = shared[0].to(tl.float32)[:, :, None]
            value = rows[0].to(tl.float32)
            x = rows[M + 1].to(tl.float32) + biases[None, :]
            step = tl.where(live, activate(x, SOFTPLUS), 0.0)
            grad = opened(rows, 3 * M + 2, HAS_Z)
            a = decays(rate, step, rows[M + 1])
            b = B * (step * value)[:, None, :]
            inflow = tl.zeros([TILE, NP, BLOCK], tl.float32)
            for i in tl.static_range(1, M + 1):
                other_bias = tl.load(bias + i * D + channel, mask=exists, other=0.0)[None, :]
                other_step = tl.where(live, activate(rows[M + 1 + i].to(tl.float32) + other_bias, SOFTPLUS), 0.0)
                other_rate = load_states(A + i * D * N, offsets, mask)
                other_h = load_states(kept + piece_offset(i, tile, tiles, D, N), offsets, mask)
                other_b = shared[i].to(tl.float32)[:, :, None] * (other_step * rows[i].to(tl.float32))[:, None, :]
                other_a = decays(other_rate, other_step, rows[M + 1 + i])
                _before, others = replay(other_a, other_b, other_h, j, TILE)
                inflow += rows[2 * M + 1 + i].to(tl.float32)[:, None, :] * others
            if CARRIED:
                b += inflow
            before, fused = replay(a, b, h, j, TILE)
            if M > 0 and not CARRIED:
                fused += inflow
            C_sums += fused * grad[:, None, :]
            dh, _start = walk_back(a, shared[M + 1].to(tl.float32)[:, :, None] * grad[:, None, :], s, j, TILE, False)
            B_sums += dh * (step * value)[:, None, :]
            flow = tl.sum(dh * B, axis=1)
            lost = a * dh * before
            x_grad = (flow * value + tl.sum(lost * rate[None, :, :], axis=1)) * slope(x, SOFTPLUS)
            x_grad = tl.where(live, x_grad, 0.0)
            value_grad = flow * step
            if HAS_SKIP:
                value_grad += skips[None, :] * grad
                tl.store(dskip + home + channel, old_skip + tl.sum(grad * value, axis=0), mask=exists)
            out = (batch * T + t.to(tl.int64))[:, None] * D + channel[None, :]
            tl.store(du + out, value_grad.to(du.dtype.element_ty), mask=live & exists[None, :])
            tl.store(ddt + out, x_grad.to(ddt.dtype.element_ty), mask=live & exists[None, :])
            tl.store(dA + home * N + offsets, old_A + tl.sum(lost * step[:, None, :], axis=0), mask=mask)
            tl.store(dbias + home + channel, old_bias + tl.sum(x_grad, axis=0), mask=exists)
        store_shared(dB, split, group, groups, t, n, T, NP, tl.sum(B_sums, axis=2))
        store_shared(dC, split, group, groups, t, n, T, NP, tl.sum(C_sums, axis=2))


@triton.jit(do_not_specialize=["T", "span", "splits", "groups", "stream"])
def source_gradients(
    tokens, strides,  # [B, T, D] each: the source's u and dt, the own dt, the source's gate, the output's gradient, z
    tables, table_strides, stream,  # the source's B, and C; which stream the source is
    A, bias,
    kept, ends,  # [m + 1, B, tiles, N, D]
    du, ddt, dgate,  # [B, T, D]
    dB,  # [splits, B, G, T, NP] float32
    dA, dbias,  # [spans * B, N, D] and [spans * B, D], float32
    T, D, N, per_group, groups, span, splits,
    CARRIED: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_Z: tl.constexpr,
    NP: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradients of one source; its states receive gate x (CARRIED: the own states' gradient, else C dy)."""
    group, split, begin, end = own_share(per_group, splits, BLOCK)
    batch = tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(T, TILE)
    n, j = tl.arange(0, NP), tl.arange(0, TILE)
    home = (tl.program_id(2) * tl.num_programs(1) + batch) * D
    first = tl.program_id(2) * span
    for tile in range(first, tl.minimum(first + span, tiles)):
        t = tile * TILE + j
        live = (t < T)[:, None]
        B_sums = tl.zeros([TILE, NP, BLOCK], tl.float32)
        for place in range(begin, end, BLOCK):
            exists = place + tl.arange(0, BLOCK) < end
            channel = group * per_group + place + tl.arange(0, BLOCK)
            mask = (n < N)[:, None] & exists[None, :]
            offsets = state_offsets(channel, n, D)
            rows = fetch(tokens, strides, batch, t, channel, live & exists[None, :])
            shared = fetch_shared(tables, table_strides, batch, group, t, n, live & (n < N)[None, :])
            h = load_states(kept + piece_offset(stream, tile, tiles, D, N), offsets, mask)
            s = load_states(ends + piece_offset(stream, tile, tiles, D, N), offsets, mask)
            rate = load_states(A + stream * D * N, offsets, mask)
            biases = tl.load(bias + stream * D + channel, mask=exists, other=0.0)
            old_A = so_far(dA + home * N, offsets, tile == first, mask)
            old_bias = so_far(dbias + home, channel, tile == first, exists)
            B = shared[0].to(tl.float32)[:, :, None]
            value = rows[0].to(tl.float32)
            x = rows[1].to(tl.float32) + biases[None, :]
            step = tl.where(live, activate(x, SOFTPLUS), 0.0)
            inflow = shared[1].to(tl.float32)[:, :, None] * opened(rows, 4, HAS_Z)[:, None, :]
            if CARRIED:
                own_s = load_states(ends + piece_offset(0, tile, tiles, D, N), offsets, mask)
                own_x = rows[2].to(tl.float32) + tl.load(bias + channel, mask=exists, other=0.0)[None, :]
                own_step = tl.where(live, activate(own_x, SOFTPLUS), 0.0)
                own_a = decays(load_states(A, offsets, mask), own_step, rows[2])
                inflow, _own_start = walk_back(own_a, inflow, own_s, j, TILE, False)
            a = decays(rate, step, rows[1])
            before, after = replay(a, B * (step * value)[:, None, :], h, j, TILE)
            dh, _start = walk_back(a, rows[3].to(tl.float32)[:, None, :] * inflow, s, j, TILE, False)
            B_sums += dh * (step * value)[:, None, :]
            flow = tl.sum(dh * B, axis=1)
            lost = a * dh * before
            x_grad = (flow * value + tl.sum(lost * rate[None, :, :], axis=1)) * slope(x, SOFTPLUS)
            x_grad = tl.where(live, x_grad, 0.0)
            out = (batch * T + t.to(tl.int64))[:, None] * D + channel[None, :]
            gate_grad = tl.sum(inflow * after, axis=1)
            tl.store(du + out, (flow * step).to(du.dtype.element_ty), mask=live & exists[None, :])
            tl.store(ddt + out, x_grad.to(ddt.dtype.element_ty), mask=live & exists[None, :])
            tl.store(dgate + out, gate_grad.to(dgate.dtype.element_ty), mask=live & exists[None, :])
            tl.store(dA + home * N + offsets, old_A + tl.sum(lost * step[:, None, :], axis=0), mask=mask)
            tl.store(dbias + home + channel, old_bias + tl.sum(x_grad, axis=0), mask=exists)
        store_shared(dB, split, group, groups, t, n, T, NP, tl.sum(B_sums, axis=2))
