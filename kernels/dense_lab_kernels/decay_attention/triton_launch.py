"""How the decay attention kernels are launched: tile sizes by rule, compilation side by side, no search.

The rule (`launch_for`) was found with `benchmarks/ops_decay_attention.py --sweep`; its measurements are in
docs/kernels/LOG.md. `using_launch` overrides it, for measuring.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton


@dataclass(frozen=True)
class Tile:
    """Tile of one kernel: `rows` x `cols` in registers, `depth` summed per step; warps and pipeline stages."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Launch:
    """All that the launch of one problem is free to choose.

    chunk: tokens per chunk. states: key x value tile, depth in tokens. scores: square tile of tokens, depth in key size
    (and in value size for dA). values: tokens x value tile of o and dv. keys: tokens x key tile of dq and dk.
    """

    chunk: int
    states: Tile
    scores: Tile
    values: Tile
    keys: Tile

    def __post_init__(self) -> None:
        # A row of scores is written up to the end of its own block only.
        if self.scores.rows % self.values.rows or self.scores.rows % self.keys.rows or self.chunk % self.scores.rows:
            raise ValueError(f"rows of values and keys must divide those of scores, and these the chunk: got {self}")


_override: ContextVar[Launch | None] = ContextVar("decay_attention_launch", default=None)


@contextlib.contextmanager
def using_launch(launch: Launch | None) -> Iterator[None]:
    """Within the block, calls use `launch` instead of the rule."""
    token = _override.set(launch)
    try:
        yield
    finally:
        _override.reset(token)


def launch_for(key_size: int, value_size: int, tokens: int, dtype: torch.dtype) -> Launch:
    """The launch for one shape class: depends on sizes rounded up to powers of two, and on T only below a chunk."""
    override = _override.get()
    if override is not None:
        return override
    if dtype == torch.float32:
        return _exact_launch(key_size, value_size, tokens)
    longest = 256 if key_size * value_size > 2**17 else 128
    chunk = _fit(tokens, longest)
    rows = min(chunk, 128)
    k_tile, v_tile = _fit(key_size, 128), _fit(value_size, 128)
    depth = _fit(max(key_size, value_size), 64)
    return Launch(
        chunk,
        states=Tile(k_tile, v_tile, min(chunk, 64), _warps(k_tile * v_tile), 3),
        scores=Tile(rows, rows, _fit(key_size, 64), _warps(rows * rows), 3),
        values=Tile(rows, v_tile, min(depth, _fit(key_size, 64)), _warps(rows * v_tile), 3),
        keys=Tile(rows, k_tile, min(depth, _fit(value_size, 64)), _warps(rows * k_tile), 3),
    )


def _exact_launch(key_size: int, value_size: int, tokens: int) -> Launch:
    """float32: products are three tf32 products, operands take twice the space, so tiles are small."""
    chunk = _fit(tokens, 64)
    k_tile, v_tile = _fit(key_size, 64), _fit(value_size, 64)
    return Launch(
        chunk,
        states=Tile(k_tile, v_tile, min(chunk, 32), 4, 2),
        scores=Tile(chunk, chunk, _fit(key_size, 32), 4, 2),
        values=Tile(chunk, v_tile, _fit(key_size, 32), 4, 2),
        keys=Tile(chunk, k_tile, _fit(value_size, 32), 4, 2),
    )


def _fit(size: int, limit: int) -> int:
    """Power of two that covers `size`, from 16 (the least a matrix unit takes) to `limit`."""
    return min(max(triton.next_power_of_2(size), 16), limit)


def _warps(elements: int) -> int:
    return 8 if elements > 8192 else 4


@dataclass(frozen=True)
class Call:
    """One kernel launch."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]

    def binary(self) -> tuple[Any, ...]:
        """What decides which binary serves the call, as far as this module needs to tell calls apart."""
        kinds = (a.dtype if isinstance(a, torch.Tensor) else (a == 1, a % 16 == 0) for a in self.arguments)
        return (self.kernel, *kinds, *self.options)


_collected: ContextVar[list[Call] | None] = ContextVar("decay_attention_calls", default=None)


def run(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """Launch `kernel` on a one-dimensional grid; inside `collecting()` only note that it would be."""
    calls = _collected.get()
    if calls is None:
        kernel[(programs,)](*arguments, **options)
    else:
        calls.append(Call(kernel, programs, arguments, tuple(options.items())))


@contextlib.contextmanager
def collecting() -> Iterator[list[Call]]:
    """Yield a list that fills with the calls that would be made within the block; nothing runs."""
    calls: list[Call] = []
    token = _collected.set(calls)
    try:
        yield calls
    finally:
        _collected.reset(token)


def compile_together(calls: Sequence[Call], device: torch.device) -> None:
    """Compile and load what `calls` need, in parallel: the compiler runs outside the interpreter lock."""
    wanted = {call.binary(): call for call in calls if isinstance(call.kernel, triton.JITFunction)}
    if not wanted:
        return

    def build(call: Call) -> None:
        compiled = call.kernel.warmup(*call.arguments, grid=(1,), **dict(call.options))
        _ = compiled.run  # builds the launcher and loads the binary

    workers = min(len(wanted), os.cpu_count() or 1)
    with ThreadPoolExecutor(workers, initializer=torch.cuda.set_device, initargs=(device,)) as pool:
        list(pool.map(build, wanted.values()))
