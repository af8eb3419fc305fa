"""Forward kernels of the selective scan: walk the tokens with the states in registers.

A program owns BLOCK channels of one group, with all N states of a channel in one thread where they fit, and walks its
segment of tokens in order: one multiply-add per state and token, no scan tree, and the sum over N needs no other thread.
Long sequences with few channels are cut in segments: one walk from zero finds each segment's end state, `join` hands the
states on from segment to segment, and a second walk starts from them. The decay over a segment needs no product:
it is exp(A * sum of dt).

Letters: B batch, T tokens, D channels, N states, G groups; m sources. A *stream* is one recurrence: 0 is the layer's own,
1 .. m the sources. State buffers are [m + 1, B, K, D, N] with K pieces of time; a tile of states is [N, BLOCK].
"""

from __future__ import annotations

import triton
import triton.language as tl

from dense_lab_kernels._triton import INTERPRETED

_FAST_EXP = tl.constexpr(not INTERPRETED)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp2(x):
    """2 ** x in one instruction; a result below 1e-38 is zero (a decay that small has forgotten everything)."""
    if _FAST_EXP:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def softplus_part(x):
    """exp(-|x|), from which softplus and its slope both follow."""
    return exp2(-tl.abs(x) * LOG2_E)


@triton.jit
def softplus(x):
    """max(x, 0) + log1p(exp(-|x|)), with log1p to 4e-8 of itself: log1p(e) = 2 artanh(e / (2 + e)), a short series."""
    e = softplus_part(x)
    s = e / (2.0 + e)
    r = s * s
    series = 0.3333332404467344 + r * (0.2000296805110227 + r * (0.1414192400906113 + r * 0.13260748908362108))
    return tl.maximum(x, 0.0) + 2.0 * s * (1.0 + r * series)


@triton.jit
def softplus_slope(x):
    e = softplus_part(x)
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def activate(x, SOFTPLUS: tl.constexpr):
    """The step dt, from dt + dt_bias."""
    if SOFTPLUS:
        return softplus(x)
    else:
        return x


@triton.jit
def own_channels(D, groups, BLOCK: tl.constexpr):
    """Channels of this program (all of one group), which of them exist, and the group; program axis 0."""
    per_group = D // groups
    blocks = tl.cdiv(per_group, BLOCK)
    group = tl.program_id(0) // blocks
    within = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    return group * per_group + within, within < per_group, group


@triton.jit
def state_tiles(buffer, stream, piece, pieces, channel, n, D, N):
    """Pointers [N, BLOCK] into a state buffer [m + 1, B, K, D, N]; the batch is program axis 1."""
    index = (stream * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * pieces + piece
    return buffer + index * D * N + channel[None, :] * N + n[:, None]


@triton.jit
def read_rows(pointer, stride, mask, STEPS: tl.constexpr):
    """STEPS rows, `stride` apart, still in their own type."""
    rows = (tl.load(pointer, mask=mask, other=0.0),)
    for j in tl.static_range(1, STEPS):
        rows = rows + (tl.load(pointer + j * stride, mask=mask, other=0.0),)
    return rows


@triton.jit
def advance(
    h, cross, product, sums,  # states, couplings and decay products [N, BLOCK] and sums of dt [BLOCK], one per stream
    u, dt, gates, z, B, C, out, raw,  # pointers at the first token; tuples of one per stream, or per source
    decay, bias, skip,  # A log2(e) [N, BLOCK] and dt_bias [BLOCK] per stream; D [BLOCK]
    u_strides, dt_strides, gate_strides, z_stride, B_stride, row, D,
    channel_mask, n_mask,
    CARRIED: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_Z: tl.constexpr, HAS_SKIP: tl.constexpr,
    OUTPUT: tl.constexpr, SUMS: tl.constexpr, M: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Walk STEPS tokens: all loads first, then the arithmetic, then all stores, so that nothing waits for a store."""
    us, dts, Bs = (), (), ()
    for i in tl.static_range(M + 1):
        us = us + (read_rows(u[i], u_strides[i][1], channel_mask, STEPS),)
        dts = dts + (read_rows(dt[i], dt_strides[i][1], channel_mask, STEPS),)
        Bs = Bs + (read_rows(B[i], row, n_mask, STEPS),)
    opens = ()
    for i in tl.static_range(M):
        opens = opens + (read_rows(gates[i], gate_strides[i][1], channel_mask, STEPS),)
    if OUTPUT:
        Cs = read_rows(C, row, n_mask, STEPS)
        if HAS_Z:
            zs = read_rows(z, z_stride, channel_mask, STEPS)
    ys = ()
    for j in tl.static_range(STEPS):
        step = activate(dts[0][j].to(tl.float32) + bias[0], SOFTPLUS)
        value = us[0][j].to(tl.float32)
        a = exp2(decay[0] * step[None, :])
        state = a * h[0] + Bs[0][j][:, None] * (step * value)[None, :]
        fused = state
        others, other_cross, other_product, totals = (), (), (), ()
        for i in tl.static_range(M):
            open_ = opens[i][j].to(tl.float32)[None, :]
            other_step = activate(dts[i + 1][j].to(tl.float32) + bias[i + 1], SOFTPLUS)
            other_a = exp2(decay[i + 1] * other_step[None, :])
            flow = Bs[i + 1][j][:, None] * (other_step * us[i + 1][j].to(tl.float32))[None, :]
            other = other_a * h[i + 1] + flow
            fused += open_ * other
            others = others + (other,)
            if SUMS:
                totals = totals + (sums[i + 1] + other_step,)
                if CARRIED:
                    other_product = other_product + (product[i] * other_a,)
                    other_cross = other_cross + (a * cross[i] + open_ * product[i] * other_a,)
        if CARRIED:
            state = fused
        h = (state,) + others
        if SUMS:
            sums = (sums[0] + step,) + totals
            if CARRIED:
                cross, product = other_cross, other_product
        if OUTPUT:
            y = tl.sum(fused * Cs[j][:, None], axis=0)
            if HAS_SKIP:
                y += skip * value
            ys = ys + (y,)
    if OUTPUT:
        for j in tl.static_range(STEPS):
            y = ys[j]
            if HAS_Z:
                tl.store(raw + j * D, y.to(raw.dtype.element_ty), mask=channel_mask)
                z_value = zs[j].to(tl.float32)
                y = y * z_value / (1.0 + exp2(-z_value * LOG2_E))
            tl.store(out + j * D, y.to(out.dtype.element_ty), mask=channel_mask)
    return h, cross, product, sums
