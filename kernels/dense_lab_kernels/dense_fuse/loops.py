"""The compiled loops of dense fusion: each task is a run of rows, taken row by row; a row stays in the nearest cache.

own, out and the gradients are [rows, W]; sources and gates are tables of addresses of such arrays, so that one compiled
loop serves any number of them. gates holds none, one (shared by all sources) or one per source.
"""

from __future__ import annotations

import math
from typing import Any

from dense_lab_kernels._numba import compiled, inlined
from dense_lab_kernels._vector import WIDTH, exp, load, load_from, spread, store, total

ROWS = 32  # of a task

Array = Any
Vector = Any


@inlined
def _activated(gate: Vector, silu: bool, sigmoid: bool, like: Array) -> tuple[Vector, Vector]:
    """act(gate) and its derivative."""
    zero, one = like.dtype.type(0), like.dtype.type(1)
    if not (silu or sigmoid):
        return gate, spread(one)
    opened = one / (exp(zero - gate) + one)
    if sigmoid:
        return opened, opened * (one - opened)
    return gate * opened, opened * (one + gate * (one - opened))


@inlined
def _fused(own: Array, sources: Array, gates: Array, silu: bool, sigmoid: bool, at: int) -> Vector:
    """own + sum_i act(gate_i) source_i of WIDTH numbers from `at` on."""
    fused, read = load(own, at), load_from(sources, 0, own, at)
    if gates.size > 1:
        fused = fused + read * _activated(load_from(gates, 0, own, at), silu, sigmoid, own)[0]
        for i in range(1, sources.size):
            scale = _activated(load_from(gates, i, own, at), silu, sigmoid, own)[0]
            fused = fused + load_from(sources, i, own, at) * scale
        return fused
    for i in range(1, sources.size):
        read = read + load_from(sources, i, own, at)
    if gates.size:
        read = read * _activated(load_from(gates, 0, own, at), silu, sigmoid, own)[0]
    return fused + read


@compiled
def forward(
    inputs: Any,
    silu: bool,
    sigmoid: bool,
    eps: float,
    count: int,
    out: Array,
    scales: Array,
    scratch: Array,
    first: int,
    stop: int,
) -> None:
    """Tasks first..stop: fill out and, when there is a weight, scales [rows] = 1 / sqrt(sum(fused^2) / count + eps)."""
    own, sources, gates, weight = inputs
    rows, width = own.shape
    for row in range(first * ROWS, min(stop * ROWS, rows)):
        squares = spread(own.dtype.type(0))
        for at in range(row * width, (row + 1) * width, WIDTH):
            fused = _fused(own, sources, gates, silu, sigmoid, at)
            store(out, at, fused)
            squares = squares + fused * fused
        if weight.size == 0:
            continue
        scales[row] = 1 / math.sqrt(total(squares) / count + eps)
        for column in range(0, width, WIDTH):
            at = row * width + column
            store(out, at, load(out, at) * scales[row] * load(weight, column))


@inlined
def _gates_back(
    inputs: Any, silu: bool, sigmoid: bool, at: int, d_fused: Vector, d_reads: Array, d_gates: Array
) -> None:
    """From fused to what each gate lets through, d_reads, and to the gates; both [gates, rows, W]."""
    own, sources, gates, _ = inputs
    for i in range(gates.size):
        read = load_from(sources, i, own, at)
        if gates.size == 1:
            for other in range(1, sources.size):
                read = read + load_from(sources, other, own, at)
        active, slope = _activated(load_from(gates, i, own, at), silu, sigmoid, own)
        store(d_reads, i * own.size + at, active * d_fused)
        store(d_gates, i * own.size + at, slope * read * d_fused)


@compiled
def backward(
    inputs: Any,
    silu: bool,
    sigmoid: bool,
    count: int,
    scales: Array,
    d_out: Array,
    d: Any,
    scratch: Array,
    first: int,
    stop: int,
) -> None:
    """Tasks first..stop: fill d = own, reads, gates, weight; d_weight [tasks, W], zeros at first, is per task.

    scratch [W]: a row of normalised numbers.
    """
    own, sources, gates, weight = inputs
    d_own, d_reads, d_gates, d_weight = d
    rows, width = own.shape
    for task in range(first, stop):
        for row in range(task * ROWS, min((task + 1) * ROWS, rows)):
            along, scale = spread(own.dtype.type(0)), own.dtype.type(1)
            if weight.size:
                scale = scales[row]
                for column in range(0, width, WIDTH):
                    at = row * width + column
                    normal = _fused(own, sources, gates, silu, sigmoid, at) * scale
                    store(scratch, column, normal)
                    along = along + normal * load(d_out, at) * load(weight, column)
            mean = own.dtype.type(total(along) / count)
            for column in range(0, width, WIDTH):
                at = row * width + column
                d_fused = load(d_out, at)
                if weight.size:
                    part = task * width + column
                    normal = load(scratch, column)
                    store(d_weight, part, load(d_weight, part) + d_fused * normal)
                    d_fused = (d_fused * load(weight, column) - normal * mean) * scale
                store(d_own, at, d_fused)
                _gates_back(inputs, silu, sigmoid, at, d_fused, d_reads, d_gates)
