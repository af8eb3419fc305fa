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
PAD = tl.constexpr(8)
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
def reciprocal(x):
    """1 / x in one instruction, to one unit in the last place."""
    if _FAST_EXP:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def sigmoid(x):
    return reciprocal(1.0 + exp2(-x * LOG2_E))


@triton.jit
def silu(x):
    return x * sigmoid(x)


@triton.jit
def activate(x, SOFTPLUS: tl.constexpr):
    """The step dt, from dt + dt_bias.

    softplus(x) = max(x, 0) + log1p(e), e = exp(-|x|); log1p(e) = 2 artanh(e / (2 + e)) by its series, to 4e-8 of itself:
    the logarithm of the hardware is 1e-7 off in absolute terms, which is much for the small steps of a trained model.
    """
    if SOFTPLUS:
        e = exp2(-tl.abs(x) * LOG2_E)
        s = e * reciprocal(2.0 + e)
        r = s * s
        series = 0.3333332404467344 + r * (0.2000296805110227 + r * (0.1414192400906113 + r * 0.13260748908362108))
        x = tl.maximum(x, 0.0) + 2.0 * s * (1.0 + r * series)
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
def state_offsets(channel, n, N):
    """Offsets [BLOCK, NP] of the states of one token in [D, N].

    The compiler is told that nothing lies side by side: it then gives every thread whole channels (the sum over N stays
    within a thread, no step is computed twice) instead of 16 bytes of one, which only these rare accesses would like.
    """
    return tl.max_contiguous(channel[:, None] * N + n[None, :], [1, 1])


@triton.jit
def piece_offset(stream, piece, pieces, D, N):
    """Where the states of one piece of time begin in a buffer [m + 1, B, K, D, N]; the batch is program axis 1."""
    return ((stream * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * pieces + piece) * D * N


@triton.jit
def fetch(pointers, strides, j, mask):
    """Token j after the pointers, of every tensor, still in its own type; strides are pairs (batch, token)."""
    result = ()
    for i in tl.static_range(len(pointers)):
        result = result + (tl.load(pointers[i] + j * strides[i][1], mask=mask),)
    return result


@triton.jit
def fetch_shared(tables, j, NP: tl.constexpr):
    """Token j after the pointers, of every B and C; they are padded to NP states, and PAD tokens at both ends."""
    result = ()
    for i in tl.static_range(len(tables)):
        result = result + (tl.load(tables[i] + j * NP),)
    return result


@triton.jit
def placed(pointers, strides, t):
    """The pointers at token t."""
    result = ()
    for i in tl.static_range(len(pointers)):
        result = result + (pointers[i] + t.to(tl.int64) * strides[i][1],)
    return result


@triton.jit
def shifted(pointers, distance):
    result = ()
    for i in tl.static_range(len(pointers)):
        result = result + (pointers[i] + distance,)
    return result


@triton.jit
def keep(kept, h, t, every, T, offsets, mask, D, N):
    """Store the states before token t, when its turn has come."""
    if t % every == 0:
        for i in tl.static_range(len(h)):
            tl.store(kept + piece_offset(i, t // every, tl.cdiv(T, every), D, N) + offsets, h[i], mask=mask)


@triton.jit
def advance(
    h, cross, product, sums,  # states, couplings, decay products [BLOCK, NP] and sums of dt [BLOCK] of the streams
    rows,  # of STEPS tokens: u and dt of every stream, the gates, z; [BLOCK] each
    shared,  # of AHEAD tokens: B of every stream, C; [NP] each
    pointers, strides,  # to the rows of the next STEPS tokens
    tables,  # to B and C of the present tokens
    decay, bias, skip,  # A log2(e) [BLOCK, NP] and dt_bias [BLOCK] of the streams; D [BLOCK]
    out, raw, D, exists,
    CARRIED: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_Z: tl.constexpr, HAS_SKIP: tl.constexpr,
    OUTPUT: tl.constexpr, RAW: tl.constexpr, SUMS: tl.constexpr, M: tl.constexpr, NP: tl.constexpr,
    STEPS: tl.constexpr, AHEAD: tl.constexpr, MORE: tl.constexpr,
):  # fmt: skip
    """Walk STEPS tokens. MORE: fetch the row STEPS tokens on, and B and C AHEAD tokens on, as soon as a token is done."""
    next_rows = ()
    wide: tl.constexpr = len(rows) // STEPS
    deep: tl.constexpr = len(tables)
    for j in tl.static_range(STEPS):
        value = rows[j * wide].to(tl.float32)
        step = activate(rows[j * wide + M + 1].to(tl.float32) + bias[0], SOFTPLUS)
        a = exp2(decay[0] * step[:, None])
        state = a * h[0] + shared[j * deep][None, :] * (step * value)[:, None]
        fused = state
        others, other_cross, other_product, totals = (), (), (), ()
        for i in tl.static_range(1, M + 1):
            open_ = rows[j * wide + 2 * M + 1 + i].to(tl.float32)[:, None]
            other_step = activate(rows[j * wide + M + 1 + i].to(tl.float32) + bias[i], SOFTPLUS)
            other_a = exp2(decay[i] * other_step[:, None])
            inflow = other_step * rows[j * wide + i].to(tl.float32)
            other = other_a * h[i] + shared[j * deep + i][None, :] * inflow[:, None]
            fused += open_ * other
            others = others + (other,)
            if SUMS:
                totals = totals + (sums[i] + other_step,)
                if CARRIED:
                    other_product = other_product + (product[i - 1] * other_a,)
                    other_cross = other_cross + (a * cross[i - 1] + open_ * product[i - 1] * other_a,)
        if CARRIED:
            state = fused
        h = (state,) + others
        if SUMS:
            sums = (sums[0] + step,) + totals
            if CARRIED:
                cross, product = other_cross, other_product
        if OUTPUT:
            y = tl.sum(fused * shared[j * deep + M + 1][None, :], axis=1)
            if HAS_SKIP:
                y += skip * value
            if RAW:
                tl.store(raw + j * D, y.to(raw.dtype.element_ty), mask=exists)
            if HAS_Z:
                y *= silu(rows[j * wide + 3 * M + 2].to(tl.float32))
            tl.store(out + j * D, y.to(out.dtype.element_ty), mask=exists)
        if MORE:
            next_rows = next_rows + fetch(pointers, strides, j, exists)
            shared = shared + fetch_shared(tables, j + AHEAD, NP)
    next_shared = ()
    if MORE:
        for k in tl.static_range(AHEAD * deep):
            next_shared = next_shared + (shared[STEPS * deep + k],)
    return h, cross, product, sums, next_rows, next_shared


@triton.jit(do_not_specialize=["T", "segment", "every", "padded"])
def forward(
    tokens, strides,  # [B, T, D] each: u of every stream, dt of every stream, the gates, z if any; (batch, token) strides
    shared, padded,  # [m + 2, B, G, padded = T + 2 PAD, NP] in float32: B of every stream, C
    A, bias, skip,  # [m + 1, D, N], [m + 1, D] and [D], float32
    entry,  # [m + 1, B, segments, D, N]: the states at the start of every segment
    out, raw,  # [B, T, D]; raw: y before the gate, for the backward
    kept,  # [m + 1, B, ceil(T / every), D, N]: the states before every `every` tokens
    last,  # [m + 1, B, segments, D, N]: the states at the end of every segment
    crossed, spans,  # [m, B, segments, D, N] couplings of the sources to the own state; [m + 1, B, segments, D] sums of dt
    T, D, N, groups, segment, every,
    CARRIED: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_Z: tl.constexpr, HAS_SKIP: tl.constexpr,
    OUTPUT: tl.constexpr, RAW: tl.constexpr, KEEP: tl.constexpr, SUMS: tl.constexpr,
    M: tl.constexpr, NP: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Walk one segment for BLOCK channels of one batch element; grid (channel blocks, B, segments).

    OUTPUT: compute the layer's output. KEEP: store the states every `every` tokens. SUMS: store what `join` needs.
    """
    channel, exists, group = own_channels(D, groups, BLOCK)
    n = tl.arange(0, NP)
    offsets = state_offsets(channel, n, N)
    tile_mask = exists[:, None] & (n < N)[None, :]
    batch = tl.program_id(1).to(tl.int64)
    piece, segments = tl.program_id(2), tl.num_programs(2)
    begin = piece * segment
    end = tl.minimum(begin + segment, T)

    h, decay, biases, pointers, tables, cross, product, sums = (), (), (), (), (), (), (), ()
    for i in tl.static_range(M + 1):
        h = h + (tl.load(entry + piece_offset(i, piece, segments, D, N) + offsets, mask=tile_mask, other=0.0),)
        decay = decay + (tl.load(A + i * D * N + offsets, mask=tile_mask, other=0.0) * LOG2_E,)
        biases = biases + (tl.load(bias + i * D + channel, mask=exists),)
    for i in tl.static_range(len(tokens)):
        pointers = pointers + (tokens[i] + batch * strides[i][0] + channel,)
    for i in tl.static_range(M + 1 + OUTPUT):
        tables = tables + (shared + (((i * tl.num_programs(1) + batch) * groups + group) * padded + PAD + begin) * NP + n,)
    if SUMS:
        for i in tl.static_range(M + 1):
            sums = sums + (tl.zeros([BLOCK], tl.float32),)
        if CARRIED:
            for i in tl.static_range(M):
                cross = cross + (tl.zeros([BLOCK, NP], tl.float32),)
                product = product + (tl.full([BLOCK, NP], 1.0, tl.float32),)
    skips = biases[0]
    if HAS_SKIP:
        skips = tl.load(skip + channel, mask=exists)
    pout = out + (batch * T + begin) * D + channel
    praw = raw + (batch * T + begin) * D + channel

    whole = begin + (end - begin) // STEPS * STEPS
    rows, B_and_C = (), ()
    start = placed(pointers, strides, begin)
    for j in tl.static_range(STEPS):
        rows = rows + fetch(start, strides, j, exists & (channel * 0 + begin < whole))
    for j in tl.static_range(AHEAD):
        B_and_C = B_and_C + fetch_shared(tables, j, NP)
    for walked in range(0, whole - begin, STEPS):
        t = begin + walked
        if KEEP:
            keep(kept, h, t, every, T, offsets, tile_mask, D, N)
        h, cross, product, sums, rows, B_and_C = advance(
            h, cross, product, sums, rows, B_and_C,
            placed(pointers, strides, tl.minimum(t + STEPS, whole - STEPS)), strides, tables,
            decay, biases, skips, pout, praw, D, exists,
            CARRIED, SOFTPLUS, HAS_Z, HAS_SKIP, OUTPUT, RAW, SUMS, M, NP, STEPS, AHEAD, True)  # fmt: skip
        tables = shifted(tables, STEPS * NP)
        pout += D * STEPS
        praw += D * STEPS
    for walked in range(0, end - whole):
        t = whole + walked
        if KEEP:
            keep(kept, h, t, every, T, offsets, tile_mask, D, N)
        one_row = fetch(placed(pointers, strides, t), strides, 0, exists)
        one_B_and_C = fetch_shared(tables, 0, NP)
        h, cross, product, sums, none, nothing = advance(
            h, cross, product, sums, one_row, one_B_and_C, pointers, strides, tables,
            decay, biases, skips, pout, praw, D, exists,
            CARRIED, SOFTPLUS, HAS_Z, HAS_SKIP, OUTPUT, RAW, SUMS, M, NP, 1, 1, False)  # fmt: skip
        tables = shifted(tables, NP)
        pout += D
        praw += D
    for i in tl.static_range(M + 1):
        if OUTPUT or SUMS:
            tl.store(last + piece_offset(i, piece, segments, D, N) + offsets, h[i], mask=tile_mask)
        if SUMS:
            span = ((i * tl.num_programs(1) + batch) * segments + piece) * D
            tl.store(spans + span + channel, sums[i], mask=exists)
    if SUMS and CARRIED:
        for i in tl.static_range(M):
            tl.store(crossed + piece_offset(i, piece, segments, D, N) + offsets, cross[i], mask=tile_mask)


@triton.jit(do_not_specialize=["segments"])
def join(
    states,  # [m + 1, B, segments, D, N]; in: what each segment adds to a zero state; out: the state it starts from
    crossed, spans,  # as `forward` stores them
    A,  # [m + 1, D, N]
    first,  # [m + 1, B, D, N]: the state that the first segment (BACKWARD: the last one) starts from; replaced by the end
    D, N, segments,
    CARRIED: tl.constexpr, BACKWARD: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Hand the states (BACKWARD: their gradients) from segment to segment; grid (ceil(D N / WIDTH), B)."""
    index = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    mask = index < D * N
    channel = index // N
    h, decay = (), ()
    for i in tl.static_range(M + 1):
        h = h + (tl.load(first + piece_offset(i, 0, 1, D, N) + index, mask=mask, other=0.0),)
        decay = decay + (tl.load(A + i * D * N + index, mask=mask, other=0.0) * LOG2_E,)
    for k in range(segments):
        piece = k
        if BACKWARD:
            piece = segments - 1 - k
        passed = ()
        for i in tl.static_range(M + 1):
            place = states + piece_offset(i, piece, segments, D, N) + index
            added = tl.load(place, mask=mask, other=0.0)
            tl.store(place, h[i], mask=mask)
            span = ((i * tl.num_programs(1) + tl.program_id(1)) * segments + piece) * D
            kept = exp2(decay[i] * tl.load(spans + span + channel, mask=mask, other=0.0))
            passed = passed + (kept * h[i] + added,)
        if CARRIED:
            own = passed[0]
            others = ()
            for i in tl.static_range(M):
                link = tl.load(crossed + piece_offset(i, piece, segments, D, N) + index, mask=mask, other=0.0)
                if BACKWARD:
                    others = others + (passed[i + 1] + link * h[0],)
                else:
                    own += link * h[i + 1]
                    others = others + (passed[i + 1],)
            passed = (own,) + others
        h = passed
    for i in tl.static_range(M + 1):
        tl.store(first + piece_offset(i, 0, 1, D, N) + index, h[i], mask=mask)
