"""Forward kernels of the selective scan: tiles of tokens, with the states in registers from tile to tile.

A program owns BLOCK channels of one group and walks its segment TILE tokens at a time. Steps, decays and inflows of a
tile are computed at once as [TILE, NP, BLOCK]; then one multiply-add per state and token makes the states, in order: no
scan tree. The decays of a tile do not wait for each other, so that one warp keeps the special-function unit busy. Rows
and shared rows (B, C) of the next tile are fetched while the present one is computed. Long sequences with few channels
are cut in segments: one walk from zero finds each segment's end state, `join` hands the states on from segment to
segment, and a second walk starts from them. The decay over a segment needs no product: it is exp(A * sum of dt).

Letters: B batch, T tokens, D channels, N states, G groups; m sources. A *stream* is one recurrence: 0 is the layer's
own, 1 .. m the sources. State buffers are [m + 1, B, K, N, D] with K pieces of time.
"""

# ruff: noqa: RUF005 - Triton knows no unpacking inside a tuple

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from dense_lab_kernels._triton import ASSEMBLY, reciprocal, sigmoid

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp2(x):
    """2 ** x in one instruction; a result below 1e-38 is zero (a decay that small has forgotten everything)."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:  # noqa: RET505 - the branch is resolved when compiling, and must not leave a second return behind
        return tl.exp2(x)


@triton.jit
def exp(x):
    """exp(x) as torch computes it on the same device, to one unit in the last place and without bias."""
    if ASSEMBLY:
        return libdevice.exp(x)
    else:  # noqa: RET505
        return tl.exp(x)


@triton.jit
def decays(rate, step, raw):
    """exp(rate step), [TILE, NP, BLOCK], of a stream whose dt came as `raw`.

    The errors of `exp2` lean to one side. A hundredth of a millionth lost per token is what a slightly faster rate
    would lose, and grows with the length of the memory: for steps in float32 that is twice the error of the gradient
    of A. Steps of 16 bits are themselves known to one part in 256 only.
    """
    if raw.dtype == tl.float32:
        return exp(rate[None, :, :] * step[:, None, :])
    else:  # noqa: RET505
        return exp2((rate * LOG2_E)[None, :, :] * step[:, None, :])


@triton.jit
def activate(x, SOFTPLUS: tl.constexpr):
    """The step dt, from dt + dt_bias.

    softplus(x) = max(x, 0) + log1p(e), e = exp(-|x|); log1p(e) = 2 artanh(e / (2 + e)) by its series, to 4e-8.
    The logarithm of the hardware is 1e-7 off in absolute terms, which is much for the small steps of a trained model.
    """
    if SOFTPLUS:
        e = exp2(-tl.abs(x) * LOG2_E)
        s = e * reciprocal(2.0 + e)
        r = s * s
        series = 0.3333332404467344 + r * (0.2000296805110227 + r * (0.1414192400906113 + r * 0.13260748908362108))
        x = tl.maximum(x, 0.0) + 2.0 * s * (1.0 + r * series)
    return x


@triton.jit
def pick(x, place, AXIS: tl.constexpr):
    """The slice of x where `place` is true. Threads hold that axis whole, so that the compiler leaves no instruction:
    adding -0.0 to a number changes nothing."""
    return tl.sum(tl.where(place, x, -0.0), axis=AXIS)


def _steps(tokens: int, held: int, *, back: bool = False) -> tuple[str, str]:
    """PTX and operand types of `scan` (or, back, of `walk_back`) for the numbers of a thread: `held` states of `tokens`
    tokens. Results; operands: decays, inflows, and what comes first, once a token."""
    count = tokens * held
    decay = (
        count - held if back else count
    )  # what decays a state on its way in is its own; back, that of the one before
    code = [
        f"fma.rn.f32 ${i}, ${decay + i}, ${i - held}, ${2 * count + i};"
        if i >= held
        else (f"add.f32 ${i}, ${3 * count + i}, ${2 * count + i};" if back
              else f"fma.rn.f32 ${i}, ${count + i}, ${3 * count + i}, ${2 * count + i};")
        for i in range(count)
    ]  # fmt: skip
    return " ".join(code), ",".join(["=&f"] * count + ["f"] * (3 * count))


SCAN_128, SCAN_TYPES_128 = (tl.constexpr(x) for x in _steps(8, 16))
SCAN_32, SCAN_TYPES_32 = (tl.constexpr(x) for x in _steps(4, 8))
BACK_128, BACK_32 = (tl.constexpr(_steps(tokens, held, back=True)[0]) for tokens, held in ((8, 16), (4, 8)))


@triton.jit
def scan(a, b, h, j, TILE: tl.constexpr):
    """h_j = a_j h_{j-1} + b_j over the first axis, [TILE, NP, BLOCK]; the last state too, [NP, BLOCK].

    The usual sizes are written out as PTX, a thread's states of one token after the other. The compiler then
    takes half of the time, and for a walk without output half of the registers.
    """
    SIZE: tl.constexpr = h.shape[0] * h.shape[1]
    if ASSEMBLY and TILE == 8 and SIZE == 512:
        states = tl.inline_asm_elementwise(
            SCAN_128, SCAN_TYPES_128, [a, b, h[None, :, :]], dtype=tl.float32, is_pure=True, pack=128
        )
        h = pick(states, (j == TILE - 1)[:, None, None], 0)
    elif ASSEMBLY and TILE == 4 and SIZE == 256:
        states = tl.inline_asm_elementwise(
            SCAN_32, SCAN_TYPES_32, [a, b, h[None, :, :]], dtype=tl.float32, is_pure=True, pack=32
        )
        h = pick(states, (j == TILE - 1)[:, None, None], 0)
    else:
        states = b
        for k in tl.static_range(TILE):
            here = (j == k)[:, None, None]
            h = pick(a, here, 0) * h + pick(b, here, 0)
            states = tl.where(here, h[None, :, :], states)
    return states, h


@triton.jit
def own_channels(per_group, BLOCK: tl.constexpr):
    """Channels of this program (all of one group), which of them exist, and the group; program axis 0."""
    blocks = tl.cdiv(per_group, BLOCK)
    group = tl.program_id(0) // blocks
    within = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    return group * per_group + within, within < per_group, group


@triton.jit
def state_offsets(channel, n, D):
    """Offsets [NP, BLOCK] of the states of one token in [N, D].

    The compiler is told that channels lie side by side, but on odd addresses: it then gives neighbouring threads
    neighbouring channels, as the computation wants them, instead of 16 bytes to a thread, which only these rare
    accesses would like.
    """
    return tl.multiple_of(tl.max_contiguous(n[:, None] * D + channel[None, :], [1, 2]), [1, 1])


@triton.jit
def load_states(pointer, offsets, mask):
    """[NP, BLOCK]"""
    return tl.load(pointer + offsets, mask=mask, other=0.0)


@triton.jit
def piece_offset(stream, piece, pieces, D, N):
    """Where the states of one piece of time begin in a buffer [m + 1, B, K, N, D]; the batch is program axis 1."""
    return ((stream * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * pieces + piece) * D * N


@triton.jit
def fetch(tokens, strides, batch, t, channel, mask):
    """Tokens t of every tensor [B, T, D], [TILE, BLOCK], still in their own types; zeros where masked."""
    result = ()
    for i in tl.static_range(len(tokens)):
        place = batch * strides[i][0] + t.to(tl.int64)[:, None] * strides[i][1] + channel[None, :]
        result = result + (tl.load(tokens[i] + place, mask=mask, other=0.0),)
    return result


@triton.jit
def fetch_shared(tables, strides, batch, group, t, n, mask):
    """Tokens t of every B and C, [TILE, NP], still in their own types; zeros where masked."""
    result = ()
    for i in tl.static_range(len(tables)):
        place = batch * strides[i][0] + (group // strides[i][3]) * strides[i][2]
        place += t.to(tl.int64)[:, None] * strides[i][1] + n[None, :]
        result = result + (tl.load(tables[i] + place, mask=mask, other=0.0),)
    return result


@triton.jit
def keep(kept, h, piece, pieces, offsets, mask, D, N):
    for i in tl.static_range(len(h)):
        tl.store(kept + piece_offset(i, piece, pieces, D, N) + offsets, h[i], mask=mask)


@triton.jit(do_not_specialize=["T", "segment", "every"])
def forward(
    tokens, strides,  # [B, T, D] each: u of every stream, dt of every stream, the gates, z if any; (batch, token)
    tables, table_strides,  # [B, T, G, N] each: B of every stream, C; (batch, token, group, sharers)
    A, bias, skip,  # [m + 1, N, D], [m + 1, D] and [D], float32
    entry,  # [m + 1, B, segments, N, D]: the states at the start of every segment
    out, raw,  # [B, T, D]; raw: y before the gate, for the backward
    kept,  # [m + 1, B, ceil(T / every), N, D]: the states before every `every` tokens
    last,  # [m + 1, B, segments, N, D]: the states at the end of every segment
    crossed, spans,  # [m, B, segments, N, D] couplings of sources to the own state; [m + 1, B, segments, D] sums of dt
    T, D, N, per_group, segment, every,
    CARRIED: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_Z: tl.constexpr, HAS_SKIP: tl.constexpr,
    OUTPUT: tl.constexpr, RAW: tl.constexpr, KEEP: tl.constexpr, SUMS: tl.constexpr,
    M: tl.constexpr, NP: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walk one segment for BLOCK channels of one batch element; grid (channel blocks, B, segments).

    OUTPUT: compute the layer's output. KEEP: store the states every `every` tokens. SUMS: store what `join` needs.
    """
    channel, exists, group = own_channels(per_group, BLOCK)
    n = tl.arange(0, NP)
    j = tl.arange(0, TILE)
    offsets = state_offsets(channel, n, D)
    tile_mask = (n < N)[:, None] & exists[None, :]
    batch = tl.program_id(1).to(tl.int64)
    piece, segments = tl.program_id(2), tl.num_programs(2)
    begin = piece * segment
    end = tl.minimum(begin + segment, T)

    h, rate, biases, cross, product, sums = (), (), (), (), (), ()
    for i in tl.static_range(M + 1):
        h = h + (load_states(entry + piece_offset(i, piece, segments, D, N), offsets, tile_mask),)
        rate = rate + (load_states(A + i * D * N, offsets, tile_mask),)
        biases = biases + (tl.load(bias + i * D + channel, mask=exists, other=0.0),)
        if SUMS:
            sums = sums + (tl.zeros([BLOCK], tl.float32),)
            if CARRIED and i:
                cross = cross + (tl.zeros([NP, BLOCK], tl.float32),)
                product = product + (tl.full([NP, BLOCK], 1.0, tl.float32),)
    skips = biases[0]
    if HAS_SKIP:
        skips = tl.load(skip + channel, mask=exists, other=0.0)

    for t0 in tl.range(begin, end, TILE, num_stages=STAGES):
        t = t0 + j
        live = (t < end)[:, None]
        rows = fetch(tokens, strides, batch, t, channel, live & exists[None, :])
        shared = fetch_shared(tables, table_strides, batch, group, t, n, live & (n < N)[None, :])
        if KEEP:  # noqa: SIM102 - the outer one is resolved when compiling
            if t0 % every == 0:
                keep(kept, h, t0 // every, tl.cdiv(T, every), offsets, tile_mask, D, N)
        ends, totals, next_cross, next_product = (), (), (), ()
        inflow = tl.zeros([TILE, NP, BLOCK], tl.float32)
        step = tl.where(live, activate(rows[M + 1].to(tl.float32) + biases[0][None, :], SOFTPLUS), 0.0)
        a = decays(rate[0], step, rows[M + 1])
        for i in tl.static_range(1, M + 1):
            other_step = tl.where(live, activate(rows[M + 1 + i].to(tl.float32) + biases[i][None, :], SOFTPLUS), 0.0)
            other_a = decays(rate[i], other_step, rows[M + 1 + i])
            other_b = shared[i].to(tl.float32)[:, :, None] * (other_step * rows[i].to(tl.float32))[:, None, :]
            other, other_end = scan(other_a, other_b, h[i], j, TILE)
            gate = rows[2 * M + 1 + i].to(tl.float32)[:, None, :]
            inflow += gate * other
            ends = ends + (other_end,)
            if SUMS:
                totals = totals + (sums[i] + tl.sum(other_step, axis=0),)
                if CARRIED:
                    products, product_end = scan(other_a, tl.zeros_like(other_a), product[i - 1], j, TILE)
                    _crosses, cross_end = scan(a, gate * products, cross[i - 1], j, TILE)
                    next_product, next_cross = next_product + (product_end,), next_cross + (cross_end,)
        value = rows[0].to(tl.float32)
        b = shared[0].to(tl.float32)[:, :, None] * (step * value)[:, None, :]
        if CARRIED:
            b += inflow
        states, own_end = scan(a, b, h[0], j, TILE)
        if M > 0 and not CARRIED:
            states += inflow
        h = (own_end,) + ends
        if SUMS:
            sums = (sums[0] + tl.sum(step, axis=0),) + totals
            cross, product = next_cross, next_product
        if OUTPUT:
            y = tl.sum(states * shared[M + 1].to(tl.float32)[:, :, None], axis=1)
            place = (batch * T + t.to(tl.int64))[:, None] * D + channel[None, :]
            if HAS_SKIP:
                y += skips[None, :] * value
            if RAW:
                tl.store(raw + place, y.to(raw.dtype.element_ty), mask=live & exists[None, :])
            if HAS_Z:
                z = rows[3 * M + 2].to(tl.float32)
                y *= z * sigmoid(z)
            tl.store(out + place, y.to(out.dtype.element_ty), mask=live & exists[None, :])
    for i in tl.static_range(M + 1):
        if OUTPUT or SUMS:
            tl.store(last + piece_offset(i, piece, segments, D, N) + offsets, h[i], mask=tile_mask)
        if SUMS:
            span = ((i * tl.num_programs(1) + batch) * segments + piece) * D
            tl.store(spans + span + channel, sums[i], mask=exists)
            if CARRIED and i:
                tl.store(crossed + piece_offset(i - 1, piece, segments, D, N) + offsets, cross[i - 1], mask=tile_mask)


@triton.jit(do_not_specialize=["segments"])
def join(
    states,  # [m + 1, B, segments, N, D]; in: what each segment adds to a zero state; out: the state it starts from
    crossed, spans,  # as `forward` stores them
    A,  # [m + 1, N, D]
    first,  # [m + 1, B, N, D]: what the first segment (BACKWARD: the last) starts from; becomes the end
    D, N, segments,
    CARRIED: tl.constexpr, BACKWARD: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Hand the states (BACKWARD: their gradients) from segment to segment; grid (ceil(D N / WIDTH), B)."""
    index = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    mask = index < D * N
    channel = index % D
    h, rate = (), ()
    for i in tl.static_range(M + 1):
        h = h + (tl.load(first + piece_offset(i, 0, 1, D, N) + index, mask=mask, other=0.0),)
        rate = rate + (tl.load(A + i * D * N + index, mask=mask, other=0.0),)
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
            kept = exp(rate[i] * tl.load(spans + span + channel, mask=mask, other=0.0))
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
