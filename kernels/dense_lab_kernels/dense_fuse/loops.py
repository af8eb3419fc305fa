"""The compiled loops of dense fusion: each task is a run of rows, taken row by row; a row stays in the nearest cache.

own, out and the gradients are [rows, W]; sources and gates are tables of addresses of such arrays, so that one compiled
loop serves any number of them. gates holds none, one (shared by all sources) or one per source. A shared gate may be
computed here instead, as hidden [rows, R] times table [R, W], so that it never is an array; R is 0 without, else a
multiple of 4, since four sums at a time keep the processor busy.
"""

from __future__ import annotations

import math
from typing import Any

from dense_lab_kernels._numba import compiled, inlined
from dense_lab_kernels._vector import WIDTH, exp, load, load_from, pick, put, spread, store, total

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
def _shared(inputs: Any, silu: bool, sigmoid: bool, row: int, column: int) -> tuple[Vector, Vector, Vector]:
    """Sum of the sources, act(gate) and its derivative of WIDTH numbers, where there is one gate or none."""
    own, sources, gates, hidden, table, _ = inputs
    width, rank = own.shape[1], hidden.shape[1]
    at = row * width + column
    read = load_from(sources, 0, own, at)
    for i in range(1, sources.size):
        read = read + load_from(sources, i, own, at)
    if gates.size == 0 and rank == 0:
        return read, spread(own.dtype.type(1)), spread(own.dtype.type(0))
    gate = spread(own.dtype.type(0))
    if gates.size:
        gate = load_from(gates, 0, own, at)
    for i in range(0, rank, 4):
        part, factor = i * width + column, row * rank + i
        gate = gate + load(table, part) * pick(hidden, factor)
        gate = gate + load(table, part + width) * pick(hidden, factor + 1)
        gate = gate + load(table, part + 2 * width) * pick(hidden, factor + 2)
        gate = gate + load(table, part + 3 * width) * pick(hidden, factor + 3)
    active, slope = _activated(gate, silu, sigmoid, own)
    return read, active, slope


@inlined
def _fused(inputs: Any, silu: bool, sigmoid: bool, row: int, column: int) -> Vector:
    """own + sum_i act(gate_i) source_i of WIDTH numbers."""
    own, sources, gates = inputs[0], inputs[1], inputs[2]
    at = row * own.shape[1] + column
    fused = load(own, at)
    if gates.size > 1:
        for i in range(sources.size):
            scale = _activated(load_from(gates, i, own, at), silu, sigmoid, own)[0]
            fused = fused + load_from(sources, i, own, at) * scale
        return fused
    read, active, _ = _shared(inputs, silu, sigmoid, row, column)
    return fused + read * active


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
    own, weight = inputs[0], inputs[5]
    rows, width = own.shape
    for row in range(first * ROWS, min(stop * ROWS, rows)):
        squares = spread(own.dtype.type(0))
        for column in range(0, width, WIDTH):
            fused = _fused(inputs, silu, sigmoid, row, column)
            store(out, row * width + column, fused)
            squares = squares + fused * fused
        if weight.size == 0:
            continue
        scales[row] = 1 / math.sqrt(total(squares) / count + eps)
        for column in range(0, width, WIDTH):
            at = row * width + column
            store(out, at, load(out, at) * scales[row] * load(weight, column))


@inlined
def _gates_back(inputs: Any, silu: bool, sigmoid: bool, at: int, d_fused: Vector, d: Any) -> None:
    """From fused to what each of several gates lets through, d_reads, and to the gates; both [gates, rows, W]."""
    own, sources, gates = inputs[0], inputs[1], inputs[2]
    d_reads, d_gates = d[1], d[2]
    for i in range(gates.size):
        active, slope = _activated(load_from(gates, i, own, at), silu, sigmoid, own)
        store(d_reads, i * own.size + at, active * d_fused)
        store(d_gates, i * own.size + at, slope * load_from(sources, i, own, at) * d_fused)


@inlined
def _hidden_back(inputs: Any, row: int, from_: int, scratch: Array, d_hidden: Array) -> None:
    """From a row of the gate's gradient, at `from_` in scratch, to hidden."""
    own, hidden, table = inputs[0], inputs[3], inputs[4]
    width, rank = own.shape[1], hidden.shape[1]
    for i in range(0, rank, 4):
        zero = spread(own.dtype.type(0))
        first, second, third, fourth = zero, zero, zero, zero
        for column in range(0, width, WIDTH):
            d_gate, part = load(scratch, from_ + column), i * width + column
            first = first + d_gate * load(table, part)
            second = second + d_gate * load(table, part + width)
            third = third + d_gate * load(table, part + 2 * width)
            fourth = fourth + d_gate * load(table, part + 3 * width)
        at = row * rank + i
        put(d_hidden, at, total(first))
        put(d_hidden, at + 1, total(second))
        put(d_hidden, at + 2, total(third))
        put(d_hidden, at + 3, total(fourth))


@inlined
def _table_back(inputs: Any, task: int, from_: int, scratch: Array, sums: Array) -> None:
    """From the rows of the gate's gradient of a task, from `from_` on in scratch, to the table's part of the sums."""
    own, hidden = inputs[0], inputs[3]
    (rows, width), rank = own.shape, hidden.shape[1]
    begin = task * ROWS
    for i in range(0, rank, 4):
        for column in range(0, width, WIDTH):
            zero = spread(own.dtype.type(0))
            first, second, third, fourth = zero, zero, zero, zero
            for row in range(min(ROWS, rows - begin)):
                d_gate, at = load(scratch, from_ + row * width + column), (begin + row) * rank + i
                first = first + d_gate * pick(hidden, at)
                second = second + d_gate * pick(hidden, at + 1)
                third = third + d_gate * pick(hidden, at + 2)
                fourth = fourth + d_gate * pick(hidden, at + 3)
            part = (task * (rank + 1) + i) * width + column
            store(sums, part, first)
            store(sums, part + width, second)
            store(sums, part + 2 * width, third)
            store(sums, part + 3 * width, fourth)


@inlined
def _normal(
    inputs: Any, silu: bool, sigmoid: bool, row: int, scale: Any, d_out: Array, scratch: Array, gate_at: int
) -> Vector:
    """Fill scratch with the row before the weight and, for one gate, with what its gradients need: act(gate) and, from
    `gate_at` on, slope * read. Gives the products of the first with its gradient, to be summed."""
    own, gates, weight = inputs[0], inputs[2], inputs[5]
    width = own.shape[1]
    along = spread(own.dtype.type(0))
    for column in range(0, width, WIDTH):
        at = row * width + column
        if gates.size > 1:
            fused = _fused(inputs, silu, sigmoid, row, column)
        else:
            read, active, slope = _shared(inputs, silu, sigmoid, row, column)
            store(scratch, width + column, active)
            store(scratch, gate_at + column, slope * read)
            fused = load(own, at) + read * active
        if weight.size:
            normal = fused * scale
            store(scratch, column, normal)
            along = along + normal * load(d_out, at) * load(weight, column)
    return along


@compiled
def backward(
    inputs: Any,
    silu: bool,
    sigmoid: bool,
    count: int,
    scales: Array,
    d_out: Array,
    d_again: Array,
    d: Any,
    scratch: Array,
    first: int,
    stop: int,
) -> None:
    """Tasks first..stop: fill d = own, reads, gates, hidden, and the sums [tasks, R + 1, W] over each task's rows: the
    gradients of the table and of the weight.

    d_again: own's other gradient, or empty. scratch [2 + ROWS, W]: a row of normalised numbers, one of act(gate), and
    the gate's gradient, of which a bottleneck keeps all rows of the task.
    """
    own, _, gates, hidden, _, weight = inputs
    d_own, d_reads, d_gates, d_hidden, sums = d
    (rows, width), rank = own.shape, hidden.shape[1]
    for task in range(first, stop):
        weight_at = (task * (rank + 1) + rank) * width
        for column in range(0, width, WIDTH):
            store(sums, weight_at + column, spread(own.dtype.type(0)))
        for row in range(task * ROWS, min((task + 1) * ROWS, rows)):
            gate_at = 2 * width
            if hidden.size:
                gate_at += (row - task * ROWS) * width
            scale = own.dtype.type(1)
            if weight.size:
                scale = scales[row]
            along = _normal(inputs, silu, sigmoid, row, scale, d_out, scratch, gate_at)
            mean = own.dtype.type(total(along) / count)
            for column in range(0, width, WIDTH):
                at = row * width + column
                d_fused = load(d_out, at)
                if weight.size:
                    part, normal = weight_at + column, load(scratch, column)
                    store(sums, part, load(sums, part) + d_fused * normal)
                    d_fused = (d_fused * load(weight, column) - normal * mean) * scale
                if gates.size > 1:
                    _gates_back(inputs, silu, sigmoid, at, d_fused, d)
                elif d_reads.size:
                    store(d_reads, at, load(scratch, width + column) * d_fused)
                    d_gate = load(scratch, gate_at + column) * d_fused
                    store(scratch, gate_at + column, d_gate)
                    if gates.size:
                        store(d_gates, at, d_gate)
                if d_again.size:
                    d_fused = d_fused + load(d_again, at)
                store(d_own, at, d_fused)
            if hidden.size:
                _hidden_back(inputs, row, gate_at, scratch, d_hidden)
        if hidden.size:
            _table_back(inputs, task, 2 * width, scratch, sums)
