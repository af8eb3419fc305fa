"""How the decay attention kernels are launched: tile sizes by rule, compilation side by side, no search.

The rule was found with `benchmarks/decay_attention_tiles.py`; what it measured is in docs/kernels/LOG.md. `using_tiles`
overrides it, for measuring; so does what `dense-lab tune` found.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from dense_lab_kernels._triton import Launch, launch, power_of_2
from dense_lab_kernels._tuned import chosen


@dataclass(frozen=True)
class Tile:
    """Tile of one kernel: `rows` x `cols` in registers, `depth` summed per step; warps and pipeline stages.

    registers: most registers a thread may use, None for no limit; fewer let more programs share a processor.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    registers: int | None = None

    def options(self) -> dict[str, int | None]:
        """The launch options among the choices."""
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


@dataclass(frozen=True)
class Tiles:
    """All that the launch of one problem is free to choose.

    chunk: tokens per chunk. states: key x value tile, depth in tokens. scores: square tile of tokens, depth in key size
    (for A; in value size for dA, which score_grads is for). values: tokens x value tile of o and dv. keys: tokens x key
    tile of dq and dk. weighed: the decays are multiplied into k (or q) once, before the states' kernel, and not by
    every program that reads it; only where no heads share them.
    """

    chunk: int
    states: Tile
    scores: Tile
    score_grads: Tile
    values: Tile
    keys: Tile
    weighed: bool = False

    def __post_init__(self) -> None:
        # A row of scores is written up to the end of its own block only, so no reader may have larger blocks.
        for tile in (self.scores, self.score_grads):
            if self.chunk % tile.rows or tile.rows % self.values.rows or tile.rows % self.keys.rows:
                raise ValueError(f"rows of values and keys must divide rows of scores, and these the chunk: {self}")


KERNELS = ("states", "scores", "score_grads", "values", "keys")
KNOBS = {f"{kernel}.warps": (4, 8) for kernel in KERNELS} | {f"{kernel}.stages": (2, 3, 4) for kernel in KERNELS}
"""What `dense-lab tune` tries of the tiles."""

_override: ContextVar[Tiles | None] = ContextVar("decay_attention_tiles", default=None)


@contextlib.contextmanager
def using_tiles(tiles: Tiles | None) -> Iterator[None]:
    """Within the block, calls use `tiles` instead of the rule (None: the rule)."""
    token = _override.set(tiles)
    try:
        yield
    finally:
        _override.reset(token)


def tiles_for(key_size: int, value_size: int, per_group: int, tokens: int, dtype: torch.dtype) -> Tiles:
    """The tiles of one shape class: depends on sizes rounded up to powers of two, and on T only below a chunk."""
    override = _override.get()
    if override is not None:
        return override
    rule = _rule(key_size, value_size, per_group, tokens, dtype)
    heads = "shared" if per_group > 1 else "own"
    sizes = f"K{power_of_2(key_size)} V{power_of_2(value_size)} chunk{rule.chunk}"
    return chosen("decay_attention", f"{sizes} {heads} keys, {str(dtype).removeprefix('torch.')}", rule, KNOBS)


def _rule(key_size: int, value_size: int, per_group: int, tokens: int, dtype: torch.dtype) -> Tiles:
    if dtype == torch.float32:
        return _float32_tiles(key_size, value_size, tokens)
    # Wide heads have large states and few of them: longer chunks write and read them less often. Narrow heads spend
    # their time on the scores instead, whose number grows with the chunk.
    wide = key_size * value_size >= 2**17
    chunk = _fit(tokens, 256 if wide else 128)
    rows = min(chunk, 128 if wide else 64)
    k_tile, v_tile = _fit(key_size, 128), _fit(value_size, 128)
    k_depth, v_depth = _fit(key_size, 64), _fit(value_size, 64)
    score_limit = 128 if wide else None
    # The more tiles of values read k, the more is saved by multiplying the decays into it once.
    weighed = wide and per_group == 1 and value_size >= 1024
    states = Tile(min(k_tile, 64), v_tile, min(chunk, 64), 4, 3)
    if weighed:
        states = Tile(min(k_tile, 64), v_tile, min(chunk, 32), 4, 4)
    return Tiles(
        chunk,
        states=states,
        scores=Tile(rows, rows, k_depth, _warps(rows * rows), 3, score_limit),
        score_grads=Tile(rows, rows, v_depth, _warps(rows * rows), 3, score_limit),
        values=Tile(rows, v_tile, k_depth, _warps(rows * v_tile), 3),
        keys=Tile(rows, min(k_tile, 64) if per_group > 1 else k_tile, v_depth, _warps(rows * k_tile), 3),
        weighed=weighed,
    )


def _float32_tiles(key_size: int, value_size: int, tokens: int) -> Tiles:
    """Products are three tf32 products and operands take twice the space, so tiles are small."""
    chunk = _fit(tokens, 64)
    k_tile, v_tile = _fit(key_size, 64), _fit(value_size, 64)
    k_depth, v_depth = _fit(key_size, 32), _fit(value_size, 32)
    return Tiles(
        chunk,
        states=Tile(k_tile, v_tile, min(chunk, 32), 8, 2),
        scores=Tile(chunk, chunk, k_depth, 4, 2),
        score_grads=Tile(chunk, chunk, v_depth, 4, 2),
        values=Tile(chunk, v_tile, k_depth, 4, 2),
        keys=Tile(chunk, k_tile, v_depth, 4, 2),
    )


def _fit(size: int, limit: int) -> int:
    """Power of two that covers `size`, from 16 (the least a matrix unit takes) to `limit`."""
    return min(max(power_of_2(size), 16), limit)


def _warps(elements: int) -> int:
    return 8 if elements > 8192 else 4


_collected: ContextVar[dict[Any, Launch] | None] = ContextVar("decay_attention_launches", default=None)


def run(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """Launch `kernel` on a one-dimensional grid; inside `collecting()` only note that it would be."""
    launches = _collected.get()
    if launches is None:
        launch(kernel, programs, arguments, options)
        return
    # What decides which binary serves a launch, as far as launches of one problem differ in it.
    kinds = (
        a.dtype if isinstance(a, torch.Tensor) else name not in kernel.do_not_specialize and (a == 1, a % 16 == 0)
        for name, a in zip(kernel.arg_names, arguments, strict=False)
    )
    launches[(kernel, *kinds, *options.items())] = Launch(kernel, arguments, options)


@contextlib.contextmanager
def collecting() -> Iterator[dict[Any, Launch]]:
    """Yield a dictionary that fills with the different launches of the calls made within the block; nothing runs."""
    launches: dict[Any, Launch] = {}
    token = _collected.set(launches)
    try:
        yield launches
    finally:
        _collected.reset(token)
