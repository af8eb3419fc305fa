"""The walk back of the selective scan: gradients of the states, handed on from the last token to the first.

`adjoint` walks the tokens backwards with the gradients of the states in registers, as the forward does with the states,
and keeps them at the end of every tile of TILE tokens (the states at the start of every tile come from a forward walk).
`gradients` (triton_gradients.py) then takes each tile alone.

Letters as in the forward; states of a tile are [TILE, NP, BLOCK].
"""

# ruff: noqa: RUF005 - Triton knows no unpacking inside a tuple

from __future__ import annotations

import triton
import triton.language as tl

from dense_lab_kernels._triton import ASSEMBLY, sigmoid
from dense_lab_kernels.selective_scan.triton_forward import (
    BACK_32,
    BACK_128,
    SCAN_TYPES_32,
    SCAN_TYPES_128,
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
def walk_back(a, inflow, s, j, TILE: tl.constexpr):
    """Gradients of the states of a tile, last token first, [TILE, NP, BLOCK], and that of the state before it.

    s: what the tokens behind the tile pass to its last state. The usual sizes are written out as PTX (see `scan`).
    """
    SIZE: tl.constexpr = s.shape[0] * s.shape[1]
    if ASSEMBLY and TILE == 8 and SIZE == 512:
        grads = tl.inline_asm_elementwise(
            BACK_128, SCAN_TYPES_128, [a, inflow, s[None, :, :]], dtype=tl.float32, is_pure=True, pack=128
        )
        s = pick(a * grads, (j == TILE - 1)[:, None, None], 0)
    elif ASSEMBLY and TILE == 4 and SIZE == 256:
        grads = tl.inline_asm_elementwise(
            BACK_32, SCAN_TYPES_32, [a, inflow, s[None, :, :]], dtype=tl.float32, is_pure=True, pack=32
        )
        s = pick(a * grads, (j == TILE - 1)[:, None, None], 0)
    else:
        grads = inflow
        for i in tl.static_range(TILE):
            here = (j == i)[:, None, None]
            own = s + pick(inflow, here, 0)
            s = pick(a, here, 0) * own
            grads = tl.where(here, own[None, :, :], grads)
    return grads, s


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
    rest,  # [m + 1, B, ceil(T / TILE), D]: sums of dt from the end of every tile to that of its segment
    T, D, N, per_group, segment,
    CARRIED: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_Z: tl.constexpr, OUTPUT: tl.constexpr, SUMS: tl.constexpr,
    M: tl.constexpr, NP: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walk one segment back for BLOCK channels of one batch element; grid (channel blocks, B, segments).

    OUTPUT: store dz and what tiles end with. SUMS: store spans and (with OUTPUT) rest.
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
            if SUMS:
                for i in tl.static_range(M + 1):
                    left = ((i * tl.num_programs(1) + batch) * tl.cdiv(T, TILE) + tile) * D
                    tl.store(rest + left + channel, sums[i], mask=exists)
        inflow = C[:, :, None] * grad[:, None, :]
        step = tl.where(live, activate(rows[0].to(tl.float32) + biases[0][None, :], SOFTPLUS), 0.0)
        own, own_start = walk_back(decays(rate[0], step, rows[0]), inflow, s[0], j, TILE)
        if CARRIED:
            inflow = own
        starts, totals = (own_start,), (sums[0] + tl.sum(step, axis=0),)
        for i in tl.static_range(1, M + 1):
            gate = rows[M + i].to(tl.float32)[:, None, :]
            other_step = tl.where(live, activate(rows[i].to(tl.float32) + biases[i][None, :], SOFTPLUS), 0.0)
            other_a = decays(rate[i], other_step, rows[i])
            _gradients, start = walk_back(other_a, gate * inflow, s[i], j, TILE)
            starts = starts + (start,)
            totals = totals + (sums[i] + tl.sum(other_step, axis=0),)
        s, sums = starts, totals
    for i in tl.static_range(M + 1):
        tl.store(last + piece_offset(i, piece, segments, D, N) + offsets, s[i], mask=tile_mask)
        if SUMS:
            span = ((i * tl.num_programs(1) + batch) * segments + piece) * D
            tl.store(spans + span + channel, sums[i], mask=exists)
