"""The compiled loop of decay attention: each task is one head of one sequence, walked token by token.

Letters: B batch, T tokens, H heads, K key size, V value size (multiples of PAIR); b sequence, h head, t token, i row.
"""

from __future__ import annotations

from typing import Any

from dense_lab_kernels._numba import compiled, inlined
from dense_lab_kernels._vector import WIDTH, load, pick, spread, store

PAIR = 2 * WIDTH  # columns taken at once, so that a number of k or q is loaded once for two vectors

Array = Any


@inlined
def _offset(array: Array, b: int, t: int, h: int, heads: int) -> int:
    """Where head h finds its numbers in an array [B, T, G, .]: head h reads group h // (H / G)."""
    _, tokens, groups, size = array.shape
    return ((b * tokens + t) * groups + h * groups // heads) * size


@inlined
def _slot(at: int, rows: int, columns: int) -> int:
    """Where the walk keeps the vector at offset `at` of a state [K, V]: pairs of columns one after the other."""
    i, c = at // columns, at % columns
    return c // PAIR * PAIR * rows + i * PAIR + c % PAIR


@inlined
def _token(
    q: Array, k: Array, v: Array, places: tuple[int, int, int], fade: float, scratch: Array, out: Array, here: int
) -> None:
    """S = fade S + k v^T and out = q^T S, with q, k, v at their places and the result at `here`."""
    at_q, at_k, at_v = places
    rows, columns = q.shape[3], out.shape[3]
    for c in range(0, columns, PAIR):
        left_v, right_v = load(v, at_v + c), load(v, at_v + c + WIDTH)
        left_out = right_out = spread(out.dtype.type(0))
        for i in range(rows):
            at, k_i, q_i = c * rows + i * PAIR, pick(k, at_k + i), pick(q, at_q + i)
            left = load(scratch, at) * fade + left_v * k_i
            right = load(scratch, at + WIDTH) * fade + right_v * k_i
            store(scratch, at, left)
            store(scratch, at + WIDTH, right)
            left_out = left_out + left * q_i
            right_out = right_out + right * q_i
        store(out, here + c, left_out)
        store(out, here + c + WIDTH, right_out)


@compiled
def scan(
    q: Array,
    k: Array,
    v: Array,
    fades: Array,
    start: Array,
    backwards: bool,
    out: Array,
    last: Array,
    scratch: Array,
    first: int,
    stop: int,
) -> None:
    """Tasks first..stop: S = fade_t S + k_t v_t^T, out_t = q_t^T S, for t = 0, 1, ... or `backwards` from the last.

    q, k [B, T, G, K], v [B, T, G, V] with any G that divides H; fades [B or 1, T, H], start and last [B, H, K, V],
    out [B, T, H, V]. scratch [K V]: the state S.
    """
    _, tokens, heads, columns = out.shape
    rows = q.shape[3]
    for task in range(first, stop):
        b, h = task // heads, task % heads
        for at in range(0, rows * columns, WIDTH):
            store(scratch, _slot(at, rows, columns), load(start, task * rows * columns + at))
        for step in range(tokens):
            t = tokens - 1 - step if backwards else step
            fade = pick(fades, (b % fades.shape[0] * tokens + t) * heads + h)
            at_q, at_k, at_v = _offset(q, b, t, h, heads), _offset(k, b, t, h, heads), _offset(v, b, t, h, heads)
            here = ((b * tokens + t) * heads + h) * columns
            _token(q, k, v, (at_q, at_k, at_v), fade, scratch, out, here)
        for at in range(0, rows * columns, WIDTH):
            store(last, task * rows * columns + at, load(scratch, _slot(at, rows, columns)))
