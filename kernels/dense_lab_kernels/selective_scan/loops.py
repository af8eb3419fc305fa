"""The compiled loops of the selective scan: each task is one vector of channels of one sequence, walked token by token.

Letters: as in cpu.py; t token, s stream, n state, row = s N + n. All arrays are addressed by flat offsets.

    inputs = u, dt [S, B, T, D], A [S, 1, N, D], B [S, B, T, G, N], C [B, T, G, N], gates [S-1, B, T, D],
        D [D]
    z [B, T, D], or empty when there is none; start, last [S, B, N, D]
    saved [segments, S, B, N, D]: the states before each segment; no segments: nothing is saved
    place = b, at: the vector's sequence and first channel
    scratch: slots of S N vectors; a slot holds the states or the decays exp(dt A) of the vector's channels at a token.
        The first holds A, whose rows lie so far apart in memory that they would push each other out of the cache.
"""

from __future__ import annotations

from typing import Any

from dense_lab_kernels._numba import compiled, inlined
from dense_lab_kernels._vector import WIDTH, exp, load, pick, prefetch, put, spread, store, total

AHEAD = 4  # tokens: neighbours in time lie too far apart in memory for the processor to foresee the next
SEGMENT = 32  # tokens between saved states; a segment's replayed states and decays fit the second-level cache
FORWARD_SLOTS = 4  # A, states before and after a token, decays
BACKWARD_SLOTS = 2 * SEGMENT + 4  # A, the gradients of A and the states, states around each token of a segment, decays

Array = Any
Vector = Any
Place = tuple[int, int]


@inlined
def _token(inputs: Any, carried: bool, place: Place, t: int, scratch: Array, old: int, new: int, fade: int) -> Vector:
    """One token of all streams: states at old -> states at new, decays to fade; returns y before z."""
    u, dt, A, B, C, gates, D = inputs
    b, at = place
    streams, batch, tokens, channels = u.shape
    states, groups = A.shape[2], C.shape[2]
    here, stream = (b * tokens + t) * channels + at, batch * tokens * channels
    shared = ((b * tokens + t) * groups + at * groups // channels) * states
    y = load(D, at) * load(u, here)
    for s in range(streams):
        prefetch(u, s * stream + here + AHEAD * channels)
        prefetch(dt, s * stream + here + AHEAD * channels)
        step = load(dt, s * stream + here)
        inflow, read = step * load(u, s * stream + here), spread(u.dtype.type(0))
        for n in range(states):
            row = s * states + n
            decay = exp(step * load(scratch, row * WIDTH))
            shared_b = pick(B, s * batch * tokens * groups * states + shared + n)
            state = decay * load(scratch, old + row * WIDTH) + inflow * shared_b
            store(scratch, fade + row * WIDTH, decay)
            store(scratch, new + row * WIDTH, state)
            read = read + state * pick(C, shared + n)
        if s == 0:
            y = y + read
            continue
        prefetch(gates, (s - 1) * stream + here + AHEAD * channels)
        gate = load(gates, (s - 1) * stream + here)
        y = y + gate * read
        if carried:
            for n in range(states):
                own, other = new + n * WIDTH, new + (s * states + n) * WIDTH
                store(scratch, own, load(scratch, own) + gate * load(scratch, other))
    return y


@inlined
def _fetch(states: Array, first: int, place: Place, scratch: Array, slot: int) -> None:
    """Copy the vector's rows of states [S, B, N, D], which begin at the offset `first`, to a slot."""
    streams, batch, count, channels = states.shape[-4:]
    for row in range(streams * count):
        s, n = row // count, row % count
        at = ((s * batch + place[0]) * count + n) * channels + place[1]
        store(scratch, slot + row * WIDTH, load(states, first + at))


@inlined
def _keep(scratch: Array, slot: int, place: Place, states: Array, first: int) -> None:
    """The reverse of `_fetch`."""
    streams, batch, count, channels = states.shape[-4:]
    for row in range(streams * count):
        s, n = row // count, row % count
        at = ((s * batch + place[0]) * count + n) * channels + place[1]
        store(states, first + at, load(scratch, slot + row * WIDTH))


@compiled
def forward(
    inputs: Any,
    z: Array,
    start: Array,
    carried: bool,
    saved: Array,
    y: Array,
    last: Array,
    scratch: Array,
    first: int,
    stop: int,
) -> None:
    """Tasks first..stop: fill y [B, T, D], last and, when it has room, saved."""
    _, _, tokens, channels = inputs[0].shape
    in_sequence, one = channels // WIDTH, y.dtype.type(1)
    slot = start.shape[0] * start.shape[2] * WIDTH
    for task in range(first, stop):
        b, at = task // in_sequence, task % in_sequence * WIDTH
        place = (b, at)
        _fetch(inputs[2], 0, (0, at), scratch, 0)
        _fetch(start, 0, place, scratch, slot)
        for t in range(tokens):
            old, new = (1 + t % 2) * slot, (1 + (t + 1) % 2) * slot
            if saved.shape[0] and t % SEGMENT == 0:
                _keep(scratch, old, place, saved, t // SEGMENT * start.size)
            out = _token(inputs, carried, place, t, scratch, old, new, 3 * slot)
            here = (b * tokens + t) * channels + at
            if z.shape[0]:
                prefetch(z, here + AHEAD * channels)
                gate = load(z, here)
                out = out * gate / (exp(y.dtype.type(0) - gate) + one)
            store(y, here, out)
        _keep(scratch, (1 + tokens % 2) * slot, place, last, 0)


@inlined
def _join_back(
    inputs: Any, carried: bool, place: Place, t: int, scratch: Array, now: int, d_h: int, d_y: Vector, d: Any
) -> None:
    """From y to the states at `now`, those after token t: adds to the slot d_h, fills d = C, gates."""
    u, _, A, _, C, gates, _ = inputs
    d_C, d_C_first, d_gates = d
    b, at = place
    streams, batch, tokens, channels = u.shape
    states, groups = A.shape[2], C.shape[2]
    here, stream = (b * tokens + t) * channels + at, batch * tokens * channels
    shared = ((b * tokens + t) * groups + at * groups // channels) * states
    for s in range(streams - 1):
        store(d_gates, s * stream + here, spread(u.dtype.type(0)))
    for n in range(states):
        join = d_y * pick(C, shared + n)
        d_own = load(scratch, d_h + n * WIDTH) + join
        store(scratch, d_h + n * WIDTH, d_own)
        seen = load(scratch, now + n * WIDTH)
        if carried:  # the sources joined the carried state, which holds them
            join = d_own
        for s in range(1, streams):
            row, beside = (s * states + n) * WIDTH, (s - 1) * stream + here
            gate, other = load(gates, beside), load(scratch, now + row)
            store(scratch, d_h + row, load(scratch, d_h + row) + gate * join)
            store(d_gates, beside, load(d_gates, beside) + join * other)
            if not carried:
                seen = seen + gate * other
        put(d_C, d_C_first + shared + n, total(d_y * seen))


@inlined
def _step_back(
    inputs: Any, place: Place, t: int, scratch: Array, before: int, fade: int, d_A: int, d_h: int, d_y: Vector, d: Any
) -> None:
    """From the states after token t to those before it, slot d_h; adds to slot d_A and D, fills u, dt, B of d."""
    u, dt, A, B, _, _, D = inputs
    d_u, d_dt, d_B, d_B_first, d_D = d
    b, at = place
    streams, batch, tokens, channels = u.shape
    states, groups = A.shape[2], B.shape[3]
    here, stream = (b * tokens + t) * channels + at, batch * tokens * channels
    through_skip = d_y * load(D, at)
    for s in range(streams):
        value, step = load(u, s * stream + here), load(dt, s * stream + here)
        shared = (((s * batch + b) * tokens + t) * groups + at * groups // channels) * states
        inflow = step * value
        along_u = along_dt = spread(u.dtype.type(0))
        for n in range(states):
            row = s * states + n
            d_state = load(scratch, d_h + row * WIDTH)
            put(d_B, d_B_first + shared + n, total(d_state * inflow))
            along_u = along_u + d_state * pick(B, shared + n)
            d_state = d_state * load(scratch, fade + row * WIDTH)
            store(scratch, d_h + row * WIDTH, d_state)
            through_decay = d_state * load(scratch, before + row * WIDTH)
            along_dt = along_dt + through_decay * load(scratch, row * WIDTH)
            store(scratch, d_A + row * WIDTH, load(scratch, d_A + row * WIDTH) + through_decay * step)
        store(d_u, s * stream + here, step * along_u + through_skip)
        store(d_dt, s * stream + here, value * along_u + along_dt)
        through_skip = spread(u.dtype.type(0))
    store(d_D, b * channels + at, load(d_D, b * channels + at) + d_y * load(u, here))


@inlined
def _gate_back(z: Array, d_out: Array, here: int, y: Vector, d_z: Array) -> Vector:
    """From out = y * silu(z) to y, which is returned, and z."""
    d_y = load(d_out, here)
    if z.shape[0]:
        zero, one = z.dtype.type(0), z.dtype.type(1)
        gate = load(z, here)
        opened = one / (exp(zero - gate) + one)
        store(d_z, here, d_y * y * opened * (one + gate * (one - opened)))
        d_y = d_y * gate * opened
    return d_y


@inlined
def _token_back(
    inputs: Any,
    z: Array,
    carried: bool,
    place: Place,
    part: int,
    t: int,
    scratch: Array,
    slots: Any,
    d_out: Array,
    d: Any,
) -> None:
    """From the output and the states after token t to its inputs and the states before it."""
    before, after, fade, at_A, at_h = slots
    d_u, d_dt, _, d_B, d_C, d_gates, d_D, d_z, _ = d
    _, _, tokens, channels = inputs[0].shape
    here = (place[0] * tokens + t) * channels + place[1]
    prefetch(d_out, here - AHEAD * channels)
    prefetch(z, here - AHEAD * channels)
    y = load(d_z, here) if z.shape[0] else load(d_out, here)
    d_y = _gate_back(z, d_out, here, y, d_z)
    _join_back(inputs, carried, place, t, scratch, after, at_h, d_y, (d_C, part * d_C[0].size, d_gates))
    stepped = (d_u, d_dt, d_B, part * d_B[0].size, d_D)
    _step_back(inputs, place, t, scratch, before, fade, at_A, at_h, d_y, stepped)


@compiled
def backward(
    inputs: Any,
    z: Array,
    saved: Array,
    carried: bool,
    d_out: Array,
    d_last: Array,
    d: Any,
    scratch: Array,
    first: int,
    stop: int,
) -> None:
    """Tasks first..stop: fill the gradients d = u, dt, A, B, C, gates, D, z, start.

    d_A [S, B, N, D] and d_D [B, D] (zeros at first) are per sequence; d_B and d_C have the vector's place in its group
    as first dimension; d_z holds y before z until the gradient replaces it.
    """
    _, _, tokens, channels = inputs[0].shape
    _, _, d_A, d_B, _, _, _, d_z, d_start = d
    in_sequence, in_group = channels // WIDTH, d_B.shape[0]
    slot = d_last.shape[0] * d_last.shape[2] * WIDTH
    at_A, at_h, states, fades = slot, 2 * slot, 3 * slot, (4 + SEGMENT) * slot
    for task in range(first, stop):
        b, at = task // in_sequence, task % in_sequence * WIDTH
        place, part = (b, at), task % in_sequence % in_group
        _fetch(inputs[2], 0, (0, at), scratch, 0)
        _fetch(d_last, 0, place, scratch, at_h)
        for at_row in range(at_A, at_A + slot, WIDTH):
            store(scratch, at_row, spread(d_A.dtype.type(0)))
        for segment in range(saved.shape[0] - 1, -1, -1):
            begin = segment * SEGMENT
            length = min(SEGMENT, tokens - begin)
            _fetch(saved, segment * d_last.size, place, scratch, states)
            for k in range(length):
                old = states + k * slot
                y = _token(inputs, carried, place, begin + k, scratch, old, old + slot, fades + k * slot)
                if z.shape[0]:
                    store(d_z, (b * tokens + begin + k) * channels + at, y)
            for k in range(length - 1, -1, -1):
                slots = (states + k * slot, states + (k + 1) * slot, fades + k * slot, at_A, at_h)
                _token_back(inputs, z, carried, place, part, begin + k, scratch, slots, d_out, d)
        _keep(scratch, at_A, place, d_A, 0)
        _keep(scratch, at_h, place, d_start, 0)
