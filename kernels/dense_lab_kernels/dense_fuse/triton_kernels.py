"""The kernels of dense fusion (Triton). A program owns whole rows.

Letters: W width, m sources, R width of a gate's bottleneck.
"""

import triton
import triton.language as tl

from dense_lab_kernels._triton import ASSEMBLY, reciprocal, sigmoid


@triton.jit
def _read(pointer, stride, row, column, mask):
    return tl.load(pointer + row[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _write(pointer, width, row, column, mask, value):
    tl.store(pointer + row[:, None] * width + column[None, :], value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _closed(x):
    """1 / sigmoid(x) up to 2^40, in four instructions."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "mul.ftz.f32 $0, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 $0, $0;"  # 2 ** (-log2(e) x)
            "min.ftz.f32 $0, $0, 0f53800000; add.ftz.f32 $0, $0, 0f3F800000;",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:  # noqa: RET505 - as in sigmoid
        return tl.minimum(tl.exp(-x), 1099511627776.0) + 1.0


@triton.jit
def _all_silu(own, source, gate):
    """silu(own) + silu(gate) silu(source) with one division for three: special functions bound the forward."""
    own_closed = _closed(own)
    closed = _closed(source) * _closed(gate)
    return (own * closed + gate * source * own_closed) * reciprocal(own_closed * closed)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        x = x * sigmoid(x)
    elif ACTIVATION == "sigmoid":
        x = sigmoid(x)
    return x


@triton.jit
def _activate_slope(x, ACTIVATION: tl.constexpr):
    """The activation and its derivative."""
    value = x
    slope = tl.full(x.shape, 1.0, tl.float32)
    if ACTIVATION == "silu":
        open_ = sigmoid(x)
        value = x * open_
        slope = open_ + value * (1.0 - open_)
    elif ACTIVATION == "sigmoid":
        value = sigmoid(x)
        slope = value * (1.0 - value)
    return value, slope


@triton.jit(do_not_specialize=["rows", "scale"])
def forward_kernel(
    own,
    sources,  # m pointers
    gates,  # None, 1 or m pointers
    weight,
    out,
    inverse_rms,  # [rows], fp32
    own_stride,
    source_strides,
    gate_strides,
    rows,
    width,
    eps,
    scale,
    GATES: tl.constexpr,  # "none", "shared" or "each"
    ACTIVATION: tl.constexpr,  # of the gates
    STREAM: tl.constexpr,  # activation of own and sources
    NORM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_WIDTH)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    fused = _read(own, own_stride, row, column, mask)
    if GATES == "shared" and ACTIVATION == "silu" and STREAM == "silu" and len(sources) == 1:
        source = _read(sources[0], source_strides[0], row, column, mask)
        fused = _all_silu(fused, source, _read(gates[0], gate_strides[0], row, column, mask))
    elif GATES == "each":
        fused = _activate(fused, STREAM)
        for i in tl.static_range(len(sources)):
            gate = _activate(_read(gates[i], gate_strides[i], row, column, mask), ACTIVATION)
            fused += gate * _activate(_read(sources[i], source_strides[i], row, column, mask), STREAM)
    else:
        total = _activate(_read(sources[0], source_strides[0], row, column, mask), STREAM)
        for i in tl.static_range(1, len(sources)):
            total += _activate(_read(sources[i], source_strides[i], row, column, mask), STREAM)
        if GATES == "shared":
            total *= _activate(_read(gates[0], gate_strides[0], row, column, mask), ACTIVATION)
        fused = _activate(fused, STREAM) + total
    fused *= scale
    if NORM:
        inverse = 1.0 / tl.sqrt(tl.sum(fused * fused, axis=1) / width + eps)
        tl.store(inverse_rms + row, inverse, mask=row < rows)
        factor = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
        fused = fused * inverse[:, None] * factor[None, :]
    _write(out, width, row, column, mask, fused)


@triton.jit(do_not_specialize=["rows", "scale", "read"])
def backward_kernel(
    grad,
    own_grad,  # of own as later layers read it
    own,
    sources,
    gates,
    weight,
    inverse_rms,
    d_own,  # None where it is grad
    d_sources,  # m pointers; 1 where all are equal; None where they are d_own
    d_gates,
    d_weight,  # [programs, W], fp32: each program's share
    grad_stride,
    own_stride,
    source_strides,
    gate_strides,
    rows,
    width,
    scale,
    read,  # whether there is own_grad: at run time, since the last layer has none
    GATES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STREAM: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    column = tl.arange(0, BLOCK_WIDTH)
    inside = column < width
    share = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    factor = tl.zeros([BLOCK_WIDTH], tl.float32)
    if NORM:
        factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & inside[None, :]
        d_fused = _read(grad, grad_stride, row, column, mask)
        total = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
        gate = total
        slope = total
        source_slope = total
        own_slope = total
        if GATES == "shared":
            gate, slope = _activate_slope(_read(gates[0], gate_strides[0], row, column, mask), ACTIVATION)
        if GATES == "shared" or (GATES == "none" and (NORM or STREAM != "none")):
            total, source_slope = _activate_slope(_read(sources[0], source_strides[0], row, column, mask), STREAM)
            for i in tl.static_range(1, len(sources)):
                total += _activate(_read(sources[i], source_strides[i], row, column, mask), STREAM)
        if NORM or STREAM != "none":
            normed, own_slope = _activate_slope(_read(own, own_stride, row, column, mask), STREAM)
        if NORM:
            if GATES == "shared":
                normed += gate * total
            elif GATES == "none":
                normed += total
            else:
                for i in tl.static_range(len(sources)):
                    each = _activate(_read(gates[i], gate_strides[i], row, column, mask), ACTIVATION)
                    normed += each * _activate(_read(sources[i], source_strides[i], row, column, mask), STREAM)
            inverse = tl.load(inverse_rms + row, mask=row < rows, other=0.0)[:, None]
            normed *= inverse * scale
            share += d_fused * normed
            d_normed = d_fused * factor[None, :]
            along = tl.sum(d_normed * normed, axis=1) / width
            d_fused = (d_normed - normed * along[:, None]) * inverse
        d_fused *= scale
        if d_own is not None:
            d_sum = d_fused if STREAM == "none" else d_fused * own_slope
            d_sum += _read(own_grad, width, row, column, (row < rows * read)[:, None] & inside[None, :])
            _write(d_own, width, row, column, mask, d_sum)
        if GATES == "shared":
            _write(d_gates[0], width, row, column, mask, d_fused * total * slope)
            d_fused *= gate
        if GATES == "each":
            # Read a second time (from cache) rather than hold 2 m tiles in registers.
            for i in tl.static_range(len(sources)):
                source = _read(sources[i], source_strides[i], row, column, mask)
                source, source_slope = _activate_slope(source, STREAM)
                each, each_slope = _activate_slope(_read(gates[i], gate_strides[i], row, column, mask), ACTIVATION)
                d_source = d_fused * each if STREAM == "none" else d_fused * each * source_slope
                _write(d_sources[i], width, row, column, mask, d_source)
                _write(d_gates[i], width, row, column, mask, d_fused * source * each_slope)
        elif d_sources is not None:
            d_source = d_fused if STREAM == "none" else d_fused * source_slope
            _write(d_sources[0], width, row, column, mask, d_source)
            for i in tl.static_range(1, len(d_sources)):
                source = _read(sources[i], source_strides[i], row, column, mask)
                source, source_slope = _activate_slope(source, STREAM)
                _write(d_sources[i], width, row, column, mask, d_fused * source_slope)
    if NORM:
        tl.store(d_weight + tl.program_id(0).to(tl.int64) * width + column, tl.sum(share, axis=0), mask=inside)


@triton.jit(do_not_specialize=["rows", "scale"])
def step_kernel(
    own,
    sources,
    hidden,  # [rows, R]
    gate_weight,  # [W, R]
    out,
    own_stride,
    source_strides,
    hidden_stride,
    rows,
    width,
    inner,
    scale,
    ACTIVATION: tl.constexpr,
    STREAM: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """Some columns of one row, the gate's second map included, no norm: for few rows, where launches cost more than
    work, and the weight must reach many processors."""
    row = (tl.program_id(0) % rows).to(tl.int64)
    column = (tl.program_id(0) // rows) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    place = tl.arange(0, BLOCK_INNER)
    inside = column < width
    mask = inside[:, None] & (place < inner)[None, :]
    wide = tl.load(gate_weight + column[:, None] * inner + place[None, :], mask=mask, other=0.0)
    narrow = tl.load(hidden + row * hidden_stride + place, mask=place < inner, other=0.0).to(tl.float32)
    fused = _activate(tl.load(own + row * own_stride + column, mask=inside, other=0.0).to(tl.float32), STREAM)
    total = tl.zeros([BLOCK_WIDTH], tl.float32)
    for i in tl.static_range(len(sources)):
        source = tl.load(sources[i] + row * source_strides[i] + column, mask=inside, other=0.0)
        total += _activate(source.to(tl.float32), STREAM)
    narrow *= sigmoid(narrow)
    gate = tl.sum(wide.to(tl.float32) * narrow[None, :], axis=1)
    fused += _activate(gate, ACTIVATION) * total
    tl.store(out + row * width + column, (fused * scale).to(out.dtype.element_ty), mask=inside)
