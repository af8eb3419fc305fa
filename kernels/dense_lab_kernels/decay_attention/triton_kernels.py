"""The Triton kernels of decay attention, in chunks of C tokens (scheme of GLA, arXiv 2312.06635, and SSD, 2405.21060).

With e_i the sum of the log decays from the start of a chunk to its token i (included), and E that of the whole chunk:

    S'   = exp(E) S + sum_j exp(E - e_j) k_j v_j^T                 `states`, walks the chunks in order; for wide
                                                                   heads exp(E - e_j) k_j comes from `weigh`
    A_ij = exp(e_i - e_j) q_i . k_j  for j <= i, else 0            `scores`, once per chunk, for every tile of V
    o_i  = exp(e_i) q_i S + sum_j A_ij v_j                         `apply`
    dS   = exp(E) dS' + sum_i exp(e_i) q_i dO_i^T                  `states`, reversed
    dA_ij = exp(e_i - e_j) dO_i . v_j  for j <= i, else 0          `scores`
    dv_j = exp(E - e_j) k_j dS' + sum_i A_ij dO_i                  `apply`, reversed
    dq_i = exp(e_i) dO_i S^T + sum_j dA_ij k_j                     `apply`
    dk_j = exp(E - e_j) v_j dS'^T + sum_i dA_ij q_i                `apply`, reversed
    dg_t = exp(E) <S, dS'> + what enters, leaves and stays in the chunk across t        `decay_gradient`

So four of the eight matrix passes are one kernel, `apply`: out = scale * (X Y) + P Z.

Letters: B batch, T tokens, H heads, G groups, R = H / G heads per group, K key size, V value size, C chunk.
Layouts: inputs [B, T, H or G, size] with strides, last dimension contiguous; states [B, chunks, H, K, V];
scores [B, chunks, H or G, C, C]; log decay [H], or per token the chunk-wise sums e as [B, H, T] (float32).
Sizes are run-time arguments; constexpr are tiles and what changes the code. Program ids are one-dimensional.
"""

from __future__ import annotations

import triton
import triton.language as tl

# exp(-80) is zero beside anything else in float32; the bound keeps differences of sums exact and -inf usable.
LOWEST_LOG_DECAY = tl.constexpr(-80.0)


@triton.jit
def _summed_decay(decay_ptr, batch, head, H, T, start, index, length, PER_TOKEN: tl.constexpr):
    """e at `index` (clipped to the chunk's last token) of the chunk that starts at token `start`."""
    index = tl.minimum(index, length - 1)
    if PER_TOKEN:
        return tl.load(decay_ptr + (batch * H + head).to(tl.int64) * T + start + index)
    return tl.maximum(tl.load(decay_ptr + head), LOWEST_LOG_DECAY) * (index + 1).to(tl.float32)


@triton.jit(do_not_specialize=["T", "H", "n_chunks"])
def sum_decays_kernel(
    log_decay_ptr,  # [B, T, H], strides b, t, h
    sums_ptr,  # [B, H, T]
    stride_b,
    stride_t,
    stride_h,
    T,
    H,
    n_chunks,
    C: tl.constexpr,
    BH: tl.constexpr,
):
    """e of every token: log decays summed from the start of its chunk. One program: one chunk, BH heads."""
    pid = tl.program_id(0)
    head_tiles = tl.cdiv(H, BH)
    heads = (pid % head_tiles) * BH + tl.arange(0, BH)
    chunk = (pid // head_tiles) % n_chunks
    batch = (pid // head_tiles // n_chunks).to(tl.int64)
    tokens = chunk * C + tl.arange(0, C)
    mask = (tokens < T)[:, None] & (heads < H)[None, :]
    offsets = tokens.to(tl.int64)[:, None] * stride_t + heads[None, :] * stride_h
    decays = tl.load(log_decay_ptr + batch * stride_b + offsets, mask=mask, other=0.0).to(tl.float32)
    sums = tl.cumsum(tl.maximum(decays, LOWEST_LOG_DECAY), axis=0)
    tl.store(sums_ptr + (batch * H + heads)[None, :] * T + tokens[:, None], sums, mask=mask)


@triton.jit(do_not_specialize=["T", "H", "n_chunks"])
def weigh_kernel(
    x_ptr,  # [B, T, H, K]: k, or q if REVERSED
    out_ptr,  # [B, T, H, K] contiguous
    decay_ptr,
    x_stride_b,
    x_stride_t,
    x_stride_h,
    T,
    H,
    n_chunks,
    K,
    C: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    REVERSED: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):
    """x times what it has in the state: exp(E - e_j), or exp(e_i) if REVERSED. One program: BT tokens of one head."""
    pid = tl.program_id(0)
    head = pid % H
    block = pid // H % (n_chunks * (C // BT))
    batch = (pid // H // (n_chunks * (C // BT))).to(tl.int64)
    start = block * BT // C * C
    length = tl.minimum(C, T - start)
    index = block * BT - start + tl.arange(0, BT)
    tokens = (start + index).to(tl.int64)
    weight = _summed_decay(decay_ptr, batch, head, H, T, start, index, length, PER_TOKEN)
    if not REVERSED:
        weight = _summed_decay(decay_ptr, batch, head, H, T, start, length - 1, length, PER_TOKEN) - weight
    weight = tl.exp(weight)[:, None]
    x_ptr += batch * x_stride_b + head.to(tl.int64) * x_stride_h + tokens[:, None] * x_stride_t
    out_ptr += ((batch * T + tokens) * H + head)[:, None] * K
    for first in range(0, K, BK):
        cols = first + tl.arange(0, BK)[None, :]
        mask = (index < length)[:, None] & (cols < K)
        x = tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + cols, (x * weight).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["has_initial", "has_final", "backwards", "T", "H", "R", "n_chunks"])
def states_kernel(
    x_ptr,  # [B, T, H / R, K]: k, or q when reversed; if WEIGHED, from `weigh_kernel`
    y_ptr,  # [B, T, H, V]: v, or dO when reversed
    decay_ptr,
    initial_ptr,  # [B, H, K, V] float32, read if has_initial: the state before the walk
    states_ptr,  # [B, chunks, H, K, V]: the state before each chunk of the walk
    final_ptr,  # [B, H, K, V] float32, written if has_final: the state after the walk
    has_initial,
    has_final,
    backwards,  # 1 or 0, at run time, so that one binary serves both passes
    x_stride_b,
    x_stride_t,
    x_stride_h,
    y_stride_b,
    y_stride_t,
    y_stride_h,
    T,
    H,
    R,
    n_chunks,
    K,
    V,
    C: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    WEIGHED: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Walk the chunks (from the last if backwards) with one [BK, BV] tile of the state in registers."""
    pid = tl.program_id(0)
    v_tiles = tl.cdiv(V, BV)
    k_tiles = tl.cdiv(K, BK)
    cols = (pid % v_tiles) * BV + tl.arange(0, BV)
    rows = (pid // v_tiles % k_tiles) * BK + tl.arange(0, BK)
    unit = pid // v_tiles // k_tiles
    head = unit % H
    batch = (unit // H).to(tl.int64)
    row_mask = rows < K
    col_mask = cols < V
    tile = rows[:, None] * V + cols[None, :]
    tile_mask = row_mask[:, None] & col_mask[None, :]
    x_ptr += batch * x_stride_b + (head // R).to(tl.int64) * x_stride_h
    y_ptr += batch * y_stride_b + head.to(tl.int64) * y_stride_h
    state_offset = (batch * H + head) * K * V

    initial_mask = (rows < K * has_initial)[:, None] & col_mask[None, :]
    state = tl.load(initial_ptr + state_offset + tile, mask=initial_mask, other=0.0)
    n_steps = n_chunks * (C // BT)
    for i in range(n_steps):
        step = i + backwards * (n_steps - 1 - 2 * i)
        chunk = step // (C // BT)
        start = chunk * C
        length = tl.minimum(C, T - start)
        whole = _summed_decay(decay_ptr, batch, head, H, T, start, length - 1, length, PER_TOKEN)
        if i % (C // BT) == 0:
            offset = ((batch * n_chunks + chunk) * H + head) * K * V
            tl.store(states_ptr + offset + tile, state.to(states_ptr.dtype.element_ty), mask=tile_mask)
            state *= tl.exp(whole)
        index = (step % (C // BT)) * BT + tl.arange(0, BT)
        tokens = (start + index).to(tl.int64)
        token_mask = index < length
        # x is read transposed: scaled in registers, it is the first operand of the product.
        x_mask = token_mask[None, :] if EVEN_K else token_mask[None, :] & row_mask[:, None]
        x = tl.load(x_ptr + tokens[None, :] * x_stride_t + rows[:, None], mask=x_mask, other=0.0)
        y_mask = token_mask[:, None] if EVEN_V else token_mask[:, None] & col_mask[None, :]
        y = tl.load(y_ptr + tokens[:, None] * y_stride_t + cols[None, :], mask=y_mask, other=0.0)
        if not WEIGHED:
            summed = _summed_decay(decay_ptr, batch, head, H, T, start, index, length, PER_TOKEN)
            weight = tl.exp(tl.where(backwards != 0, summed, whole - summed))
            x = (x.to(tl.float32) * weight[None, :]).to(x.dtype)
        state = tl.dot(x, y, state, input_precision=PRECISION)
    final_mask = (rows < K * has_final)[:, None] & col_mask[None, :]
    tl.store(final_ptr + state_offset + tile, state, mask=final_mask)


@triton.jit(do_not_specialize=["T", "H", "R", "n_chunks"])
def scores_kernel(
    x_ptr,  # [B, T, U, M]: q, or dO
    y_ptr,  # [B, T, U, M]: k, or v
    decay_ptr,
    scores_ptr,  # [B, chunks, H / R, C, C]
    a_ptr,  # like scores: A, if OF_DECAY
    sums_ptr,  # [2, C / BM, B, H, T] float32, if OF_DECAY: sums of A_ij dA_ij over the block's j, and over its i
    x_stride_b,
    x_stride_t,
    x_stride_h,
    y_stride_b,
    y_stride_t,
    y_stride_h,
    T,
    H,
    R,
    n_chunks,
    M,
    C: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    DECAYED: tl.constexpr,
    SUM_HEADS: tl.constexpr,
    OF_DECAY: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    EVEN_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One [BM, BM] block on or below the diagonal of a chunk's X Y^T, masked, times exp(e_i - e_j) if DECAYED.

    With SUM_HEADS the block is summed over the R heads of a group, which x and y then have one by one.
    OF_DECAY (for dA): also write what the gradient of each head's log decay needs of the block.
    """
    pid = tl.program_id(0)
    side: tl.constexpr = C // BM
    block = pid % (side * (side + 1) // 2)
    chunk = pid // (side * (side + 1) // 2) % n_chunks
    unit = pid // (side * (side + 1) // 2) // n_chunks
    row_block = 0
    for row in tl.static_range(1, side):
        row_block += (block >= row * (row + 1) // 2).to(tl.int32)
    col_block = block - row_block * (row_block + 1) // 2
    units = H // R
    batch = (unit // units).to(tl.int64)
    group = unit % units

    start = chunk * C
    length = tl.minimum(C, T - start)
    i = row_block * BM + tl.arange(0, BM)
    j = col_block * BM + tl.arange(0, BM)
    depth = tl.arange(0, BD)
    x_ptr += batch * x_stride_b + (start + i).to(tl.int64)[:, None] * x_stride_t + depth[None, :]
    y_ptr += batch * y_stride_b + (start + j).to(tl.int64)[None, :] * y_stride_t + depth[:, None]
    i_mask = (i < length)[:, None]
    j_mask = (j < length)[None, :]
    causal = i[:, None] >= j[None, :]
    depth_tiles = tl.cdiv(M, BD)
    block_offset = ((batch * n_chunks + chunk) * units + group) * C * C + i[:, None] * C + j[None, :]
    if OF_DECAY:
        a = tl.load(a_ptr + block_offset).to(tl.float32)
        batches = (tl.num_programs(0) // (side * (side + 1) // 2) // n_chunks // units).to(tl.int64)
        i_sums = ((col_block * batches + batch) * H) * T + start + i
        j_sums = (((side + row_block) * batches + batch) * H) * T + start + j
        over_j = tl.zeros([BM], dtype=tl.float32)
        over_i = tl.zeros([BM], dtype=tl.float32)
    total = tl.zeros([BM, BM], dtype=tl.float32)
    n_heads = R if SUM_HEADS else 1
    for step in range(n_heads * depth_tiles):
        if SUM_HEADS:
            head = (group * R + step // depth_tiles).to(tl.int64)
            first = (step % depth_tiles) * BD
        else:
            head = group.to(tl.int64)
            first = step * BD
        x_mask = i_mask if EVEN_M else i_mask & (first + depth < M)[None, :]
        y_mask = j_mask if EVEN_M else j_mask & (first + depth < M)[:, None]
        x = tl.load(x_ptr + head * x_stride_h + first, mask=x_mask, other=0.0)
        y = tl.load(y_ptr + head * y_stride_h + first, mask=y_mask, other=0.0)
        if SUM_HEADS:
            e_i = _summed_decay(decay_ptr, batch, head, H, T, start, i, length, PER_TOKEN)
            e_j = _summed_decay(decay_ptr, batch, head, H, T, start, j, length, PER_TOKEN)
            fade = tl.exp(tl.where(causal, e_i[:, None] - e_j[None, :], 0.0))
            faded = tl.dot(x, y, input_precision=PRECISION) * fade
            total += faded
            if OF_DECAY:
                over_j = tl.where(first == 0, 0.0, over_j) + tl.sum(faded * a, axis=1)
                over_i = tl.where(first == 0, 0.0, over_i) + tl.sum(faded * a, axis=0)
                tl.store(sums_ptr + head * T + i_sums, over_j, mask=i < length)
                tl.store(sums_ptr + head * T + j_sums, over_i, mask=j < length)
        else:
            total = tl.dot(x, y, total, input_precision=PRECISION)
    if OF_DECAY and not SUM_HEADS:
        # A holds the decay already.
        tl.store(sums_ptr + group.to(tl.int64) * T + i_sums, tl.sum(total * a, axis=1), mask=i < length)
        tl.store(sums_ptr + group.to(tl.int64) * T + j_sums, tl.sum(total * a, axis=0), mask=j < length)
    if DECAYED and not SUM_HEADS:
        e_i = _summed_decay(decay_ptr, batch, group, H, T, start, i, length, PER_TOKEN)
        e_j = _summed_decay(decay_ptr, batch, group, H, T, start, j, length, PER_TOKEN)
        total *= tl.exp(tl.where(causal, e_i[:, None] - e_j[None, :], 0.0))
    total = tl.where(causal, total, 0.0)
    tl.store(scores_ptr + block_offset, total.to(scores_ptr.dtype.element_ty))


@triton.jit
def _add_products(
    out, p_ptr, z_ptr, z_stride_t, decay_ptr, e_i, i, row_block, col_mask, batch, own, H, T, start, length,
    C: tl.constexpr, BM: tl.constexpr, BJ: tl.constexpr, REVERSED: tl.constexpr, DECAY_P: tl.constexpr,
    PER_TOKEN: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out + P Z for the rows i of a chunk; DECAY_P: P is decayed first.

    Blocks of P above the diagonal were never written: only those on the causal side are read.
    """
    if REVERSED:
        first_block = row_block * BM // BJ
        last_block = tl.cdiv(length, BJ)
    else:
        first_block = 0
        last_block = tl.cdiv(tl.minimum((row_block + 1) * BM, length), BJ)
    for block in range(first_block, last_block):
        j = block * BJ + tl.arange(0, BJ)
        if REVERSED:
            p = tl.load(p_ptr + j[None, :] * C + i[:, None])
        else:
            p = tl.load(p_ptr + i[:, None] * C + j[None, :])
        z_mask = (j < length)[:, None] if EVEN_N else (j < length)[:, None] & col_mask
        z = tl.load(z_ptr + j.to(tl.int64)[:, None] * z_stride_t, mask=z_mask, other=0.0)
        if DECAY_P:
            e_j = _summed_decay(decay_ptr, batch, own, H, T, start, j, length, PER_TOKEN)
            gap = e_j[None, :] - e_i[:, None] if REVERSED else e_i[:, None] - e_j[None, :]
            # Where P is zero the gap has the other sign and may be large: zero times infinity must not arise.
            causal = j[None, :] >= i[:, None] if REVERSED else i[:, None] >= j[None, :]
            p = (p.to(tl.float32) * tl.exp(tl.where(causal, gap, 0.0))).to(z.dtype)
        out = tl.dot(p, z, out, input_precision=PRECISION)
    return out


@triton.jit(do_not_specialize=["T", "H", "R", "n_chunks"])
def apply_kernel(
    x_ptr,  # [B, T, ., M]: q (o), k (dv), dO (dq), v (dk)
    y_ptr,  # states [B, chunks, H, K, V]: S (o, dq), dS' (dv, dk)
    p_ptr,  # [B, chunks, ., C, C]: A (o, dv), dA (dq, dk)
    z_ptr,  # [B, T, ., N]: v (o), dO (dv), k (dq), q (dk)
    decay_ptr,
    out_ptr,  # [B, T, ., N] contiguous: o, dv (one per head), dq, dk (one per group)
    own_ptr,  # [B, T, G, N], if OF_DECAY: q (dq), k (dk)
    sums_ptr,  # [N / BN, B, H, T] float32, if OF_DECAY: sums over the tile of own times (scale X Y), per head
    x_stride_b, x_stride_t, x_stride_h,
    z_stride_b, z_stride_t, z_stride_h,
    own_stride_b, own_stride_t, own_stride_h,
    T, H, R, n_chunks, M, N,
    C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BJ: tl.constexpr,
    REVERSED: tl.constexpr, OF_KEYS: tl.constexpr, SHARED: tl.constexpr, OF_DECAY: tl.constexpr,
    PER_TOKEN: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One [BM, BN] tile of out = scale * (X Y) + P Z.

    REVERSED (dv, dk): P is transposed, scale is exp(E - e_j) instead of exp(e_i). OF_KEYS (dq, dk): Y is transposed.
    SHARED (R > 1): q and k belong to groups; o and dv then decay the group's P themselves, dq and dk sum over heads.
    OF_DECAY (dq, dk): also write what the gradient of each head's log decay needs of the tile.
    """
    sum_heads: tl.constexpr = SHARED and OF_KEYS
    decay_p: tl.constexpr = SHARED and not OF_KEYS
    pid = tl.program_id(0)
    n_tiles = tl.cdiv(N, BN)
    tile = pid % n_tiles
    cols = tile * BN + tl.arange(0, BN)
    row_block = pid // n_tiles % (C // BM)
    chunk = pid // n_tiles // (C // BM) % n_chunks
    unit = pid // n_tiles // (C // BM) // n_chunks
    units = H // R if OF_KEYS else H
    batch = (unit // units).to(tl.int64)
    own = unit % units

    start = chunk * C
    length = tl.minimum(C, T - start)
    i = row_block * BM + tl.arange(0, BM)
    tokens = (start + i).to(tl.int64)
    i_mask = (i < length)[:, None]
    col_mask = (cols < N)[None, :]
    depth = tl.arange(0, BD)
    x_ptr += batch * x_stride_b + tokens[:, None] * x_stride_t + depth[None, :]
    y_ptr += (batch * n_chunks + chunk) * H * M * N
    if OF_KEYS:
        y_ptr += cols[None, :] * M + depth[:, None]
    else:
        y_ptr += depth[:, None] * N + cols[None, :]
    depth_tiles = tl.cdiv(M, BD)
    if OF_DECAY:
        own_ptr += (
            batch * own_stride_b + own.to(tl.int64) * own_stride_h + tokens[:, None] * own_stride_t + cols[None, :]
        )
        partner = tl.load(own_ptr, mask=i_mask if EVEN_N else i_mask & col_mask, other=0.0).to(tl.float32)
        batches = tl.num_programs(0) // n_tiles // (C // BM) // n_chunks // units
        sums_ptr += ((tile * batches + batch) * H) * T + tokens
        into = tl.zeros([BM], dtype=tl.float32)
    n_heads = R if sum_heads else 1
    out = tl.zeros([BM, BN], dtype=tl.float32)
    for step in range(n_heads * depth_tiles):
        if sum_heads:
            head = own * R + step // depth_tiles
            first = (step % depth_tiles) * BD
        else:
            head = own
            first = step * BD
        x_head = (head if OF_KEYS else head // R).to(tl.int64)
        x_mask = i_mask if EVEN_M else i_mask & (first + depth < M)[None, :]
        x = tl.load(x_ptr + x_head * x_stride_h + first, mask=x_mask, other=0.0)
        y_tile = y_ptr + head.to(tl.int64) * M * N + (first if OF_KEYS else first * N)
        if EVEN_M and EVEN_N:
            y = tl.load(y_tile)
        else:
            y = tl.load(y_tile, mask=(first + depth < M)[:, None] & col_mask, other=0.0)
        if sum_heads:
            e_i = _summed_decay(decay_ptr, batch, head, H, T, start, i, length, PER_TOKEN)
            if REVERSED:
                e_i = _summed_decay(decay_ptr, batch, head, H, T, start, length - 1, length, PER_TOKEN) - e_i
            part = tl.dot(x, y, input_precision=PRECISION) * tl.exp(e_i)[:, None]
            out += part
            if OF_DECAY:
                into = tl.where(first == 0, 0.0, into) + tl.sum(part * partner, axis=1)
                tl.store(sums_ptr + head.to(tl.int64) * T, into, mask=i < length)
        else:
            out = tl.dot(x, y, out, input_precision=PRECISION)
    e_i = _summed_decay(decay_ptr, batch, own, H, T, start, i, length, PER_TOKEN)
    if not sum_heads:
        scale = e_i
        if REVERSED:
            scale = _summed_decay(decay_ptr, batch, own, H, T, start, length - 1, length, PER_TOKEN) - e_i
        out *= tl.exp(scale)[:, None]
        if OF_DECAY:
            tl.store(sums_ptr + own.to(tl.int64) * T, tl.sum(out * partner, axis=1), mask=i < length)

    p_unit = own // R if decay_p else own
    p_units = H // R
    p_ptr += ((batch * n_chunks + chunk) * p_units + p_unit) * C * C
    z_ptr += batch * z_stride_b + own.to(tl.int64) * z_stride_h + start.to(tl.int64) * z_stride_t + cols[None, :]
    out = _add_products(
        out, p_ptr, z_ptr, z_stride_t, decay_ptr, e_i, i, row_block, col_mask, batch, own, H, T, start, length,
        C, BM, BJ, REVERSED, decay_p, PER_TOKEN, EVEN_N, PRECISION,
    )  # fmt: skip

    out_ptr += ((batch * T + tokens) * units + own)[:, None] * N + cols[None, :]
    tl.store(out_ptr, out.to(out_ptr.dtype.element_ty), mask=i_mask if EVEN_N else i_mask & col_mask)


@triton.jit(do_not_specialize=["has_initial", "has_final_grad", "side", "key_tiles", "B", "T", "H", "n_chunks"])
def decay_gradient_kernel(
    score_sums_ptr,  # [2, side, B, H, T]: sums of A_ij dA_ij over j (slot: block of j), and over i (slot: block of i)
    q_sums_ptr,  # [key_tiles, B, H, T]: q_i . (part of dq_i from the state before the chunk)
    k_sums_ptr,  # [key_tiles, B, H, T]: k_j . (part of dk_j from the state after the chunk)
    states_ptr,  # [B, chunks, H, K, V]: the state before each chunk
    state_grads_ptr,  # [B, chunks, H, K, V]: the gradient of the state after each chunk
    initial_ptr,  # [B, H, K, V] float32, read for the first chunk if has_initial
    final_grad_ptr,  # [B, H, K, V] float32, read for the last chunk if has_final_grad
    decay_ptr,  # [B, H, T]
    decay_grad_ptr,  # [B, T, H] contiguous, float32
    has_initial,
    has_final_grad,
    side,
    key_tiles,
    B,
    T,
    H,
    n_chunks,
    size,  # K V
    C: tl.constexpr,
    BM: tl.constexpr,
    BS: tl.constexpr,
):
    """Gradient of the log decays of one chunk and head: at t, the sum of all that passes from before t to t or later.

    exp(E) <S, dS'> (through the whole chunk), k_j . (part of dk_j) for j < t (out of it), q_i . (part of dq_i) for
    i >= t (into it), and A_ij dA_ij for j < t <= i. Nothing is subtracted that was rounded in two different ways: in
    the last part each product enters once with either sign.
    """
    pid = tl.program_id(0)
    head = pid % H
    chunk = pid // H % n_chunks
    batch = (pid // H // n_chunks).to(tl.int64)
    i = tl.arange(0, C)
    tokens = chunk * C + i
    mask = tokens < T
    row = (batch * H + head) * T + tokens
    slot = B.to(tl.int64) * H * T
    change = tl.zeros([C], dtype=tl.float32)
    leaving = tl.zeros([C], dtype=tl.float32)
    for block in range(side):
        change += tl.load(score_sums_ptr + block * slot + row, mask=mask & (block <= i // BM), other=0.0)
        change -= tl.load(score_sums_ptr + (side + block) * slot + row, mask=mask & (block >= i // BM), other=0.0)
    for block in range(key_tiles):
        change += tl.load(q_sums_ptr + block * slot + row, mask=mask, other=0.0)
        leaving += tl.load(k_sums_ptr + block * slot + row, mask=mask, other=0.0)

    offset = ((batch * n_chunks + chunk) * H + head) * size
    products = tl.zeros([BS], dtype=tl.float32)
    outer = (batch * H + head) * size
    for first in range(0, size, BS):
        place = first + tl.arange(0, BS)
        inside = place < size
        if chunk == 0 and has_initial != 0:
            state = tl.load(initial_ptr + outer + place, mask=inside, other=0.0)
        else:
            state = tl.load(states_ptr + offset + place, mask=inside, other=0.0).to(tl.float32)
        if chunk == n_chunks - 1 and has_final_grad != 0:
            grad = tl.load(final_grad_ptr + outer + place, mask=inside, other=0.0)
        else:
            grad = tl.load(state_grads_ptr + offset + place, mask=inside, other=0.0).to(tl.float32)
        products += state * grad
    whole = tl.load(decay_ptr + (batch * H + head) * T + tl.minimum(chunk * C + C, T) - 1)
    gradient = tl.exp(whole) * tl.sum(products) + tl.cumsum(change, axis=0, reverse=True)
    gradient += tl.cumsum(leaving, axis=0) - leaving
    tl.store(decay_grad_ptr + (batch * T + tokens) * H + head, gradient, mask=mask)
