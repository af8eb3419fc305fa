"""The compiled loops of the selective scan: each task is one vector of channels of one sequence, walked token by token.

Letters: as in cpu.py; t token, k token within a segment, s stream, n state.

    inputs = u, dt [S, B, T, D], A [S, N, D], B [S, B, T, G, N], C [B, T, G, N], gates [S-1, B, T, D], D [D]
    z [B, T, D], or empty when there is none; start, last [S, B, N, D]
    saved [segments, S, B, N, D]: the states before each segment; no segments: nothing is saved
    h, fade [S, N, WIDTH] at an offset: states and decays exp(dt A) of the vector's channels
    place = b, at, group: which vector; `at` is its first channel
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dense_lab_kernels._numba import compiled
from dense_lab_kernels._vector import WIDTH, exp, load, spread, store, total

SEGMENT = 32  # tokens between saved states; a segment's replayed states fit the second-level cache

Array = Any
Vector = Any
Place = tuple[int, int, int]


@compiled
def _token(
    inputs: Any, carried: bool, place: Place, t: int, h: Array, old: int, new: int, fade: Array, kept: int
) -> Vector:
    """One token of all streams, from the states h[old:] to h[new:]; decays go to fade[kept:]; returns y before z."""
    u, dt, A, B, C, gates, D = inputs
    b, at, group = place
    streams, batch, tokens, channels = u.shape
    states = A.shape[1]
    here, stream = (b * tokens + t) * channels + at, batch * tokens * channels
    y = load(D, at) * load(u, here)
    for s in range(streams):
        step = load(dt, s * stream + here)
        inflow, read = step * load(u, s * stream + here), spread(u.dtype.type(0))
        for n in range(states):
            row = s * states + n
            decay = exp(step * load(A, row * channels + at))
            state = decay * load(h, old + row * WIDTH) + inflow * B[s, b, t, group, n]
            store(fade, kept + row * WIDTH, decay)
            store(h, new + row * WIDTH, state)
            read = read + state * C[b, t, group, n]
        if s == 0:
            y = y + read
            continue
        gate = load(gates, (s - 1) * stream + here)
        y = y + gate * read
        if carried:
            for n in range(states):
                own, other = new + n * WIDTH, new + (s * states + n) * WIDTH
                store(h, own, load(h, own) + gate * load(h, other))
    return y


@compiled
def forward(
    inputs: Any, z: Array, start: Array, carried: bool, saved: Array, y: Array, last: Array, first: int, stop: int
) -> None:
    """Tasks first..stop: fill y [B, T, D], last and, when it has room, saved."""
    u, C = inputs[0], inputs[4]
    streams, _, tokens, channels = u.shape
    in_sequence, one = channels // WIDTH, u.dtype.type(1)
    h = np.empty((2, streams, start.shape[2], WIDTH), u.dtype)
    fade = np.empty_like(h[0])
    for task in range(first, stop):
        b, at = task // in_sequence, task % in_sequence * WIDTH
        h[0] = start[:, b, :, at : at + WIDTH]
        for t in range(tokens):
            if saved.shape[0] and t % SEGMENT == 0:
                saved[t // SEGMENT, :, b, :, at : at + WIDTH] = h[t % 2]
            place = (b, at, at * C.shape[2] // channels)
            out = _token(inputs, carried, place, t, h, t % 2 * fade.size, (t + 1) % 2 * fade.size, fade, 0)
            here = (b * tokens + t) * channels + at
            if z.shape[0]:
                gate = load(z, here)
                out = out * gate / (exp(spread(-one) * gate) + one)
            store(y, here, out)
        last[:, b, :, at : at + WIDTH] = h[tokens % 2]


@compiled
def _join_back(
    inputs: Any, carried: bool, place: Place, t: int, h: Array, now: int, d_h: Array, d_y: Vector, d_C: Array, d_gates: Array
) -> None:
    """From y to the states h[now:] after token t: adds to d_h [S, N, WIDTH], fills d_C and d_gates."""
    u, _, A, _, C, gates, _ = inputs
    b, at, group = place
    streams, batch, tokens, channels = u.shape
    states, zero = A.shape[1], spread(u.dtype.type(0))
    here, stream = (b * tokens + t) * channels + at, batch * tokens * channels
    for s in range(streams - 1):
        store(d_gates, s * stream + here, zero)
    for n in range(states):
        join = d_y * C[b, t, group, n]
        d_own = load(d_h, n * WIDTH) + join
        store(d_h, n * WIDTH, d_own)
        seen = load(h, now + n * WIDTH)
        if carried:  # the sources joined the carried state, which holds them
            join = d_own
        for s in range(1, streams):
            row, beside = (s * states + n) * WIDTH, (s - 1) * stream + here
            gate, other = load(gates, beside), load(h, now + row)
            store(d_h, row, load(d_h, row) + gate * join)
            store(d_gates, beside, load(d_gates, beside) + join * other)
            if not carried:
                seen = seen + gate * other
        d_C[b, t, group, n] = total(d_y * seen)


@compiled
def _step_back(
    inputs: Any, place: Place, t: int, h: Array, before: int, fade: Array, kept: int, d_h: Array, d_y: Vector, d: Any
) -> None:
    """From the states after token t to those before it, h[before:]: d_h in place; fills d_u, d_dt, d_B, adds to d_A, d_D."""
    u, dt, A, B, _, _, D = inputs
    d_u, d_dt, d_A, d_B, d_D = d
    b, at, group = place
    streams, batch, tokens, channels = u.shape
    states = A.shape[1]
    here, stream = (b * tokens + t) * channels + at, batch * tokens * channels
    through_skip = d_y * load(D, at)
    for s in range(streams):
        value, step = load(u, s * stream + here), load(dt, s * stream + here)
        inflow = step * value
        along_u = along_dt = spread(u.dtype.type(0))
        for n in range(states):
            row = s * states + n
            d_state = load(d_h, row * WIDTH)
            d_B[s, b, t, group, n] = total(d_state * inflow)
            along_u = along_u + d_state * B[s, b, t, group, n]
            d_state = d_state * load(fade, kept + row * WIDTH)
            store(d_h, row * WIDTH, d_state)
            through_decay = d_state * load(h, before + row * WIDTH)
            along_dt = along_dt + through_decay * load(A, row * channels + at)
            into = (b * streams * states + row) * channels + at
            store(d_A, into, load(d_A, into) + through_decay * step)
        store(d_u, s * stream + here, step * along_u + through_skip)
        store(d_dt, s * stream + here, value * along_u + along_dt)
        through_skip = spread(u.dtype.type(0))
    skip = b * channels + at
    store(d_D, skip, load(d_D, skip) + d_y * load(u, here))


@compiled
def backward(
    inputs: Any, z: Array, saved: Array, carried: bool, d_out: Array, d_last: Array, d: Any, first: int, stop: int
) -> None:
    """Tasks first..stop: fill the gradients d = u, dt, A, B, C, gates, D, z, start.

    d_A [B, S, N, D] and d_D [B, D] are per sequence; d_B and d_C have the vector's place in its group as first dimension.
    """
    u, C = inputs[0], inputs[4]
    d_u, d_dt, d_A, d_B, d_C, d_gates, d_D, d_z, d_start = d
    streams, _, tokens, channels = u.shape
    in_sequence, one = channels // WIDTH, u.dtype.type(1)
    h = np.empty((SEGMENT + 1, streams, d_last.shape[2], WIDTH), u.dtype)
    fade, y = np.empty_like(h), np.empty((SEGMENT, WIDTH), u.dtype)
    slot = h[0].size
    for task in range(first, stop):
        b, at = task // in_sequence, task % in_sequence * WIDTH
        place, part = (b, at, at * C.shape[2] // channels), task % in_sequence % (in_sequence // C.shape[2])
        d_h = d_last[:, b, :, at : at + WIDTH].copy()
        d_A[b, :, :, at : at + WIDTH] = 0
        d_D[b, at : at + WIDTH] = 0
        for segment in range(saved.shape[0] - 1, -1, -1):
            begin = segment * SEGMENT
            length = min(SEGMENT, tokens - begin)
            h[0] = saved[segment, :, b, :, at : at + WIDTH]
            for k in range(length):
                replayed = _token(inputs, carried, place, begin + k, h, k * slot, (k + 1) * slot, fade, k * slot)
                store(y, k * WIDTH, replayed)
            for k in range(length - 1, -1, -1):
                here = (b * tokens + begin + k) * channels + at
                d_y = load(d_out, here)
                if z.shape[0]:
                    gate = load(z, here)
                    opened = one / (exp(spread(-one) * gate) + one)
                    store(d_z, here, d_y * load(y, k * WIDTH) * opened * (one + gate * (one - opened)))
                    d_y = d_y * gate * opened
                _join_back(inputs, carried, place, begin + k, h, (k + 1) * slot, d_h, d_y, d_C[part], d_gates)
                targets = (d_u, d_dt, d_A, d_B[part], d_D)
                _step_back(inputs, place, begin + k, h, k * slot, fade, k * slot, d_h, d_y, targets)
        d_start[:, b, :, at : at + WIDTH] = d_h
