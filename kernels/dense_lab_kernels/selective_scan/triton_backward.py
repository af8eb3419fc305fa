"""Backward kernels of the selective scan: the states' gradients walk back in time, then every tile is on its own.

Two steps. `adjoint` walks the tokens backwards with the gradients of the states in registers, as the forward does with the
states, and keeps them at the end of every tile of TILE tokens (the states at the start of every tile come from a forward
walk). `own_gradients` and `source_gradients` then take each tile alone: they replay its states into registers, walk back
and give all gradients. Since tiles no longer wait for each other, a program can stay at a tile and pass over many channels:
the gradients of B and C, sums over channels, grow in registers and leave them once; those of A, sums over tokens, grow in a
buffer that only this program touches. No atomics: the result does not depend on scheduling.

Letters as in the forward; a tile of states is [BLOCK, NP].
"""

from __future__ import annotations

import triton
import triton.language as tl

from dense_lab_kernels.selective_scan.triton_forward import (
    LOG2_E,
    PAD,
    activate,
    exp2,
    fetch,
    fetch_shared,
    own_channels,
    piece_offset,
    placed,
    reciprocal,
    shifted,
    sigmoid,
    state_offsets,
)


@triton.jit
def retreat(
    s,  # gradients of the states that the later tokens start from, [BLOCK, NP] per stream
    rows,  # of STEPS tokens: dt of every stream, the gates, the output's gradient, z and raw if gated; [BLOCK] each
    shared,  # C of AHEAD tokens, [NP] each; token j lies STEPS - 1 - j before the end
    pointers, strides,  # to the rows of the STEPS tokens before
    table,  # to C of the last of the present tokens
    decay, bias, dy, dz, D, exists,
    CARRIED: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_Z: tl.constexpr, OUTPUT: tl.constexpr,
    M: tl.constexpr, NP: tl.constexpr, STEPS: tl.constexpr, AHEAD: tl.constexpr, MORE: tl.constexpr,
):  # fmt: skip
    """Walk back over STEPS tokens, the last one first; fetching ahead is as in `advance`."""
    next_rows = ()
    wide: tl.constexpr = len(rows) // STEPS
    for j in tl.static_range(STEPS):
        grad = rows[j * wide + 2 * M + 1].to(tl.float32)
        if HAS_Z:
            z = rows[j * wide + 2 * M + 2].to(tl.float32)
            open_ = sigmoid(z)
            if OUTPUT:
                raw = rows[j * wide + 2 * M + 3].to(tl.float32)
                tl.store(dz - j * D, (grad * raw * open_ * (1.0 + z * (1.0 - open_))).to(dz.dtype.element_ty), mask=exists)
            grad = grad * z * open_
            if OUTPUT:
                tl.store(dy - j * D, grad, mask=exists)
        inflow = shared[j][None, :] * grad[:, None]
        step = activate(rows[j * wide].to(tl.float32) + bias[0], SOFTPLUS)
        own = s[0] + inflow
        if CARRIED:
            inflow = own
        passed = (exp2(decay[0] * step[:, None]) * own,)
        for i in tl.static_range(1, M + 1):
            gate = rows[j * wide + M + i].to(tl.float32)
            other_step = activate(rows[j * wide + i].to(tl.float32) + bias[i], SOFTPLUS)
            passed = passed + (exp2(decay[i] * other_step[:, None]) * (s[i] + gate[:, None] * inflow),)
        s = passed
        if MORE:
            next_rows = next_rows + fetch(pointers, strides, -j, exists)
            shared = shared + fetch_shared(table, -(j + AHEAD), NP)
    next_shared = ()
    if MORE:
        for k in tl.static_range(AHEAD):
            next_shared = next_shared + (shared[STEPS + k],)
    return s, next_rows, next_shared


@triton.jit
def keep_ends(kept, s, tile, tiles, offsets, mask, D, N):
    for i in tl.static_range(len(s)):
        tl.store(kept + piece_offset(i, tile, tiles, D, N) + offsets, s[i], mask=mask)


@triton.jit(do_not_specialize=["T", "segment", "padded"])
def adjoint(
    tokens, strides,  # [B, T, D] each: dt of every stream, the gates, the output's gradient, z and raw if gated
    shared, padded, streams,  # as in `forward`; streams = m + 1
    A, bias,  # [m + 1, D, N] and [m + 1, D], float32
    entry,  # [m + 1, B, segments, D, N]: the states' gradients at the end of every segment
    dy,  # [B, T, D] float32: the gradient of y, written if gated
    dz,  # [B, T, D]
    kept,  # [m + 1, B, ceil(T / TILE), D, N]: the states' gradients at the end of every tile
    last,  # [m + 1, B, segments, D, N]: the states' gradients at the start of every segment
    T, D, N, groups, segment,
    CARRIED: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_Z: tl.constexpr, OUTPUT: tl.constexpr,
    M: tl.constexpr, NP: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    STEPS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Walk one segment back for BLOCK channels of one batch element; grid (channel blocks, B, segments)."""
    channel, exists, group = own_channels(D, groups, BLOCK)
    n = tl.arange(0, NP)
    offsets = state_offsets(channel, n, N)
    tile_mask = exists[:, None] & (n < N)[None, :]
    batch = tl.program_id(1).to(tl.int64)
    piece, segments = tl.program_id(2), tl.num_programs(2)
    begin = piece * segment
    end = tl.minimum(begin + segment, T)
    tiles = tl.cdiv(T, TILE)

    s, decay, biases, pointers = (), (), (), ()
    for i in tl.static_range(M + 1):
        s = s + (tl.load(entry + piece_offset(i, piece, segments, D, N) + offsets, mask=tile_mask, other=0.0),)
        decay = decay + (tl.load(A + i * D * N + offsets, mask=tile_mask, other=0.0) * LOG2_E,)
        biases = biases + (tl.load(bias + i * D + channel, mask=exists),)
    for i in tl.static_range(len(tokens)):
        pointers = pointers + (tokens[i] + batch * strides[i][0] + channel,)
    pdy = dy + (batch * T + end - 1) * D + channel
    pdz = dz + (batch * T + end - 1) * D + channel
    C = shared + (((streams * tl.num_programs(1) + batch) * groups + group) * padded + PAD + end - 1) * NP + n
    table = (C,)

    whole = begin + (end - begin) // STEPS * STEPS
    if OUTPUT:
        keep_ends(kept, s, (end - 1) // TILE, tiles, offsets, tile_mask, D, N)
    for walked in range(0, end - whole):
        t = end - 1 - walked
        one_row = fetch(placed(pointers, strides, t), strides, 0, exists)
        one_C = fetch_shared(table, 0, NP)
        s, none, nothing = retreat(
            s, one_row, one_C, pointers, strides, table, decay, biases, pdy, pdz, D, exists,
            CARRIED, SOFTPLUS, HAS_Z, OUTPUT, M, NP, 1, 1, False)  # fmt: skip
        table = shifted(table, -NP)
        pdy -= D
        pdz -= D
    rows, Cs = (), ()
    start = placed(pointers, strides, tl.maximum(whole - 1, begin))
    for j in tl.static_range(STEPS):
        rows = rows + fetch(start, strides, -j, exists & (channel * 0 + begin < whole))
    for j in tl.static_range(AHEAD):
        Cs = Cs + fetch_shared(table, -j, NP)
    for walked in range(0, whole - begin, STEPS):
        t = whole - STEPS - walked
        if OUTPUT:
            if (t + STEPS) % TILE == 0:
                keep_ends(kept, s, t // TILE, tiles, offsets, tile_mask, D, N)
        s, rows, Cs = retreat(
            s, rows, Cs, placed(pointers, strides, tl.maximum(t, begin + STEPS) - 1), strides, table,
            decay, biases, pdy, pdz, D, exists,
            CARRIED, SOFTPLUS, HAS_Z, OUTPUT, M, NP, STEPS, AHEAD, True)  # fmt: skip
        table = shifted(table, -STEPS * NP)
        pdy -= D * STEPS
        pdz -= D * STEPS
    for i in tl.static_range(M + 1):
        tl.store(last + piece_offset(i, piece, segments, D, N) + offsets, s[i], mask=tile_mask)


@triton.jit
def slope(x, SOFTPLUS: tl.constexpr):
    """Derivative of `activate`."""
    if SOFTPLUS:
        return sigmoid(x)
    else:
        return x * 0.0 + 1.0


@triton.jit
def read(pointer, strides, batch, t, channel, mask):
    """[BLOCK] of token t, in float32; zeros where masked."""
    return tl.load(pointer + batch * strides[0] + t.to(tl.int64) * strides[1] + channel, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def step_back(dh, before, B, rate, step):
    """One stream, one token: gradient passed to the state before, its share of dA, and the sums that u and dt need."""
    flow = tl.sum(dh * B[None, :], axis=1)
    # (rate step) log2 e, not rate (step log2 e) as in the replay: else the compiler keeps those decays in registers
    s = exp2(rate * step[:, None] * LOG2_E) * dh
    lost = s * before
    return s, lost * step[:, None], flow, tl.sum(lost * rate, axis=1)


@triton.jit
def accumulate(pointer, value, fresh, mask):
    """Add to a buffer that this program alone uses; `fresh`: nothing is there yet."""
    tl.store(pointer, tl.load(pointer, mask=mask & (tl.zeros_like(value) + fresh < 1), other=0.0) + value, mask=mask)


@triton.jit(do_not_specialize=["T", "padded", "span", "splits"])
def own_gradients(
    tokens, strides,  # [B, T, D] each: u of every stream, dt of every stream, the gates, dy
    shared, padded,  # as in `forward`
    A, bias, skip,
    kept, ends,  # [m + 1, B, tiles, D, N]: states before every tile, gradients of the own states after it
    du, ddt,  # [B, T, D]
    dB, dC,  # [splits, B, G, T, NP] float32: sums over one split of the channels
    dA,  # [spans * B, D, N] float32: sums over the tokens of one span of tiles
    dskip, dbias,  # [spans * B, D] float32
    T, D, N, groups, span, splits,
    CARRIED: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_SKIP: tl.constexpr, M: tl.constexpr,
    NP: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradients of the layer's own stream, for one split of a group's channels and `span` tiles; grid (G splits, B, spans)."""
    group, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    batch = tl.program_id(1).to(tl.int64)
    batches = tl.num_programs(1)
    per_group = D // groups
    share = tl.cdiv(tl.cdiv(per_group, BLOCK), splits) * BLOCK
    begin, end = split * share, tl.minimum(split * share + share, per_group)
    tiles = tl.cdiv(T, TILE)
    n = tl.arange(0, NP)
    home = (tl.program_id(2) * batches + batch) * D
    first = tl.program_id(2) * span
    for walked in range(0, tl.minimum(span, tiles - first)):
        tile = first + walked
        B_sums, C_sums = (), ()
        for j in tl.static_range(TILE):
            B_sums = B_sums + (tl.zeros([BLOCK, NP], tl.float32),)
            C_sums = C_sums + (tl.zeros([BLOCK, NP], tl.float32),)
        for place in range(begin, end, BLOCK):
            channel = group * per_group + place + tl.arange(0, BLOCK)
            exists = place + tl.arange(0, BLOCK) < end
            mask = exists[:, None] & (n < N)[None, :]
            offsets = channel[:, None] * N + n[None, :]
            h, rates, biases = (), (), ()
            for i in tl.static_range(M + 1):
                h = h + (tl.load(kept + piece_offset(i, tile, tiles, D, N) + offsets, mask=mask, other=0.0),)
                rates = rates + (tl.load(A + i * D * N + offsets, mask=mask, other=0.0),)
                biases = biases + (tl.load(bias + i * D + channel, mask=exists, other=0.0),)
            s = tl.load(ends + piece_offset(0, tile, tiles, D, N) + offsets, mask=mask, other=0.0)
            states, values, steps, slopes, grads, sums = (h[0],), (), (), (), (), ()
            for j in tl.static_range(TILE):
                t = tile * TILE + j
                here = exists & (t + channel * 0 < T)
                value = read(tokens[0], strides[0], batch, t, channel, here)
                x = read(tokens[M + 1], strides[M + 1], batch, t, channel, here) + biases[0]
                grad = read(tokens[3 * M + 2], strides[3 * M + 2], batch, t, channel, here)
                step = tl.where(t < T, activate(x, SOFTPLUS), 0.0)
                a = exp2(rates[0] * (step * LOG2_E)[:, None])
                B = tl.load(shared + ((batch * groups + group) * padded + PAD + t) * NP + n)
                state = a * h[0] + B[None, :] * (step * value)[:, None]
                fused = state
                others = ()
                for i in tl.static_range(1, M + 1):
                    gate = read(tokens[2 * M + 1 + i], strides[2 * M + 1 + i], batch, t, channel, here)
                    other_x = read(tokens[M + 1 + i], strides[M + 1 + i], batch, t, channel, here) + biases[i]
                    other_step = tl.where(t < T, activate(other_x, SOFTPLUS), 0.0)
                    inflow = other_step * read(tokens[i], strides[i], batch, t, channel, here)
                    other_B = tl.load(shared + (((i * batches + batch) * groups + group) * padded + PAD + t) * NP + n)
                    other = exp2(rates[i] * (other_step * LOG2_E)[:, None]) * h[i] + other_B[None, :] * inflow[:, None]
                    fused += gate[:, None] * other
                    others = others + (other,)
                if CARRIED:
                    state = fused
                h = (state,) + others
                sums = sums + (C_sums[j] + fused * grad[:, None],)
                states, values, steps = states + (state,), values + (value,), steps + (step,)
                slopes, grads = slopes + (slope(x, SOFTPLUS),), grads + (grad,)
            C_sums, reverse_sums = sums, ()
            A_sum = tl.zeros([BLOCK, NP], tl.float32)
            skip_sum, bias_sum = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
            if HAS_SKIP:
                skips = tl.load(skip + channel, mask=exists, other=0.0)
            for j in tl.static_range(TILE - 1, -1, -1):
                t = tile * TILE + j
                B = tl.load(shared + ((batch * groups + group) * padded + PAD + t) * NP + n)
                C = tl.load(shared + ((((M + 1) * batches + batch) * groups + group) * padded + PAD + t) * NP + n)
                dh = s + C[None, :] * grads[j][:, None]
                reverse_sums = reverse_sums + (B_sums[j] + dh * (steps[j] * values[j])[:, None],)
                s, A_share, flow, fall = step_back(dh, states[j], B, rates[0], steps[j])
                A_sum += A_share
                value_grad = flow * steps[j]
                if HAS_SKIP:
                    value_grad += skips * grads[j]
                    skip_sum += grads[j] * values[j]
                x_grad = (flow * values[j] + fall) * slopes[j]
                bias_sum += tl.where(t < T, x_grad, 0.0)
                here = exists & (t + channel * 0 < T)
                out = (batch * T + t) * D + channel
                tl.store(du + out, value_grad.to(du.dtype.element_ty), mask=here)
                tl.store(ddt + out, x_grad.to(ddt.dtype.element_ty), mask=here)
            B_sums = ()
            for j in tl.static_range(TILE):
                B_sums = B_sums + (reverse_sums[TILE - 1 - j],)
            accumulate(dA + home * N + offsets, A_sum, tile == first, mask)
            accumulate(dbias + home + channel, bias_sum, tile == first, exists)
            if HAS_SKIP:
                accumulate(dskip + home + channel, skip_sum, tile == first, exists)
        for j in tl.static_range(TILE):
            t = tile * TILE + j
            out = (((split * batches + batch) * groups + group) * T + t) * NP + n
            tl.store(dB + out, tl.sum(B_sums[j], axis=0), mask=t + n * 0 < T)
            tl.store(dC + out, tl.sum(C_sums[j], axis=0), mask=t + n * 0 < T)


@triton.jit(do_not_specialize=["T", "padded", "span", "splits", "stream", "streams"])
def source_gradients(
    tokens, strides,  # [B, T, D] each: the source's u and dt, the own dt, the source's gate, dy
    shared, padded, stream, streams,  # as in `forward`; which of the `streams` = m + 1 streams the source is
    A, bias,
    kept, ends,  # [m + 1, B, tiles, D, N]
    du, ddt, dgate,  # [B, T, D]
    dB,  # [splits, B, G, T, NP] float32
    dA, dbias,  # [spans * B, D, N] and [spans * B, D], float32
    T, D, N, groups, span, splits,
    CARRIED: tl.constexpr, SOFTPLUS: tl.constexpr, NP: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradients of one source, as `own_gradients`: its states receive gate x (CARRIED: own states' gradient, else C dy)."""
    group, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    batch = tl.program_id(1).to(tl.int64)
    batches = tl.num_programs(1)
    per_group = D // groups
    share = tl.cdiv(tl.cdiv(per_group, BLOCK), splits) * BLOCK
    begin, end = split * share, tl.minimum(split * share + share, per_group)
    tiles = tl.cdiv(T, TILE)
    n = tl.arange(0, NP)
    home = (tl.program_id(2) * batches + batch) * D
    first = tl.program_id(2) * span
    pB = shared + (((stream * batches + batch) * groups + group) * padded + PAD) * NP + n
    pC = shared + (((streams * batches + batch) * groups + group) * padded + PAD) * NP + n
    for walked in range(0, tl.minimum(span, tiles - first)):
        tile = first + walked
        B_sums = ()
        for j in tl.static_range(TILE):
            B_sums = B_sums + (tl.zeros([BLOCK, NP], tl.float32),)
        for place in range(begin, end, BLOCK):
            channel = group * per_group + place + tl.arange(0, BLOCK)
            exists = place + tl.arange(0, BLOCK) < end
            mask = exists[:, None] & (n < N)[None, :]
            offsets = channel[:, None] * N + n[None, :]
            h = tl.load(kept + piece_offset(stream, tile, tiles, D, N) + offsets, mask=mask, other=0.0)
            s = tl.load(ends + piece_offset(stream, tile, tiles, D, N) + offsets, mask=mask, other=0.0)
            own_s = tl.load(ends + piece_offset(0, tile, tiles, D, N) + offsets, mask=mask, other=0.0)
            own_rate = tl.load(A + offsets, mask=mask, other=0.0)
            rate = tl.load(A + stream * D * N + offsets, mask=mask, other=0.0)
            own_bias = tl.load(bias + channel, mask=exists, other=0.0)
            other_bias = tl.load(bias + stream * D + channel, mask=exists, other=0.0)
            states, values, steps, slopes = (h,), (), (), ()
            for j in tl.static_range(TILE):
                t = tile * TILE + j
                here = exists & (t + channel * 0 < T)
                value = read(tokens[0], strides[0], batch, t, channel, here)
                x = read(tokens[1], strides[1], batch, t, channel, here) + other_bias
                step = tl.where(t < T, activate(x, SOFTPLUS), 0.0)
                h = exp2(rate * (step * LOG2_E)[:, None]) * h + tl.load(pB + t * NP)[None, :] * (step * value)[:, None]
                states = states + (h,)
                values, steps, slopes = values + (value,), steps + (step,), slopes + (slope(x, SOFTPLUS),)
            reverse_sums = ()
            A_sum = tl.zeros([BLOCK, NP], tl.float32)
            bias_sum = tl.zeros([BLOCK], tl.float32)
            for j in tl.static_range(TILE - 1, -1, -1):
                t = tile * TILE + j
                here = exists & (t + channel * 0 < T)
                gate = read(tokens[3], strides[3], batch, t, channel, here)
                inflow = tl.load(pC + t * NP)[None, :] * read(tokens[4], strides[4], batch, t, channel, here)[:, None]
                if CARRIED:
                    inflow += own_s
                    own_x = read(tokens[2], strides[2], batch, t, channel, here) + own_bias
                    own_step = tl.where(t < T, activate(own_x, SOFTPLUS), 0.0)
                    own_s = exp2(own_rate * (own_step * LOG2_E)[:, None]) * inflow
                dh = s + gate[:, None] * inflow
                B = tl.load(pB + t * NP)
                reverse_sums = reverse_sums + (B_sums[j] + dh * (steps[j] * values[j])[:, None],)
                s, A_share, flow, fall = step_back(dh, states[j], B, rate, steps[j])
                A_sum += A_share
                x_grad = (flow * values[j] + fall) * slopes[j]
                bias_sum += tl.where(t < T, x_grad, 0.0)
                out = (batch * T + t) * D + channel
                tl.store(du + out, (flow * steps[j]).to(du.dtype.element_ty), mask=here)
                tl.store(ddt + out, x_grad.to(ddt.dtype.element_ty), mask=here)
                gate_grad = tl.sum(inflow * states[j + 1], axis=1)
                tl.store(dgate + out, gate_grad.to(dgate.dtype.element_ty), mask=here)
            B_sums = ()
            for j in tl.static_range(TILE):
                B_sums = B_sums + (reverse_sums[TILE - 1 - j],)
            accumulate(dA + home * N + offsets, A_sum, tile == first, mask)
            accumulate(dbias + home + channel, bias_sum, tile == first, exists)
        for j in tl.static_range(TILE):
            t = tile * TILE + j
            out = (((split * batches + batch) * groups + group) * T + t) * NP + n
            tl.store(dB + out, tl.sum(B_sums[j], axis=0), mask=t + n * 0 < T)
