"""Time the tile choices of every decay attention kernel, to find or check the rule in `triton_launch.tiles_for`.

    python benchmarks/decay_attention_tiles.py wide ssd      # shapes of ops_decay_attention.py; all by default

Milliseconds of single kernels, best first, as rows/cols/depth/warps/stages/registers.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from ops_decay_attention import SHAPES, inputs
from triton.runtime.errors import TritonError
from triton.testing import do_bench

from dense_lab_kernels.decay_attention import triton
from dense_lab_kernels.decay_attention.triton_launch import Tile, Tiles, collecting, using_tiles

STATES = [(128, 128, 64, 8, 3), (128, 128, 64, 8, 3, 128), (128, 128, 32, 8, 4), (64, 128, 64, 4, 3)]
STATES += [(128, 64, 64, 4, 3), (64, 64, 64, 4, 3), (128, 64, 64, 4, 3, 168), (64, 256, 64, 8, 3), (128, 256, 32, 8, 3)]
WEIGHED = [(128, 128, 64, 8, 3), (128, 128, 64, 8, 3, 128), (128, 128, 64, 8, 2, 128), (64, 128, 64, 4, 3)]
WEIGHED += [(64, 128, 64, 4, 2), (128, 256, 64, 8, 2), (64, 256, 64, 4, 3), (128, 128, 64, 4, 2), (64, 64, 64, 4, 3)]
WEIGHED += [
    (128, 128, 32, 8, 4, 128),
    (64, 128, 32, 4, 4),
    (64, 256, 64, 8, 3),
    (256, 128, 64, 8, 2),
    (128, 64, 64, 4, 2),
]
SCORES = [
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 3, 128),
    (128, 128, 64, 8, 2),
    (128, 128, 64, 4, 3),
    (64, 64, 64, 4, 3),
]
PRODUCTS = [(128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 128, 64, 8, 4), (128, 256, 64, 8, 3), (64, 128, 64, 4, 3)]
PRODUCTS += [(128, 64, 64, 4, 3), (64, 64, 64, 4, 4), (128, 128, 32, 8, 4), (64, 256, 64, 4, 3)]
ROLES = {
    "states": STATES,
    "weighed": WEIGHED,
    "scores": SCORES,
    "score_grads": SCORES,
    "values": PRODUCTS,
    "keys": PRODUCTS,
}


def candidates(base: Tiles, role: str, rows: int, cols: int) -> Iterator[tuple[Tile, Tiles]]:
    """Tiles with one role replaced; the tiles that exceed the problem's rows or cols are left out."""
    for numbers in ROLES[role]:
        tile = Tile(*numbers)
        if tile.rows > rows or tile.cols > cols or (role in ("states", "weighed") and tile.depth > base.chunk):
            continue
        if role == "weighed":
            yield tile, dataclasses.replace(base, states=tile, weighed=True)
            continue
        tiles = base
        if role in ("scores", "score_grads"):
            shrink = {name: dataclasses.replace(getattr(base, name), rows=tile.rows) for name in ("values", "keys")}
            tiles = dataclasses.replace(base, **shrink)
        yield tile, dataclasses.replace(tiles, **{role: tile})


def jobs(shape: str, chunk: int, only: list[str]) -> Iterator[tuple[str, Tile, Callable[[], object]]]:
    """(what, tile, call) for each kernel of a shape and each candidate tile."""
    q, k, v, log_decay = (x.detach() for x in inputs(shape))
    with using_tiles(None):
        base = triton._Problem.of(q, v, log_decay).tiles
    grouped = q.shape[2] != v.shape[2]
    rows = min(chunk, 128)
    resized = {n: dataclasses.replace(getattr(base, n), rows=rows, cols=rows) for n in ("scores", "score_grads")}
    resized |= {n: dataclasses.replace(getattr(base, n), rows=min(rows, 64)) for n in ("values", "keys")}
    base = dataclasses.replace(base, chunk=chunk, weighed=False, **resized)
    out_grad = torch.randn_like(v)
    problem = triton._Problem.of(q, v, log_decay)
    problem = dataclasses.replace(problem, tiles=base)
    decay = triton._decay(problem, log_decay)
    states = triton._states(problem, k, v, decay, None, None, "forward")
    scores = triton._scores(problem, q, k, decay, base.scores)
    wide, narrow = v.shape[3], q.shape[3]
    limits = {
        "states": (narrow, wide),
        "weighed": (0 if grouped else narrow, wide),
        "scores": (chunk, chunk),
        "score_grads": (chunk, chunk),
    }
    limits |= {"values": (chunk, wide), "keys": (chunk, narrow)}
    for role, (most_rows, most_cols) in limits.items():
        for tile, tiles in candidates(base, role, most_rows, most_cols) if role in only else ():
            p = dataclasses.replace(problem, tiles=tiles)
            match role:
                case "states":
                    yield "states", tile, partial(triton._states, p, k, v, decay, None, None, "forward")
                    yield "states back", tile, partial(triton._states, p, q, out_grad, decay, None, None, "backward")
                case "weighed":
                    yield "weighed", tile, partial(triton._states, p, k, v, decay, None, None, "forward")
                    yield "weighed back", tile, partial(triton._states, p, q, out_grad, decay, None, None, "backward")
                case "scores":
                    yield "scores", tile, partial(triton._scores, p, q, k, decay, tile)
                case "score_grads" if grouped or tile.depth <= wide:
                    yield "score grads", tile, partial(triton._scores, p, out_grad, v, decay, tile)
                case "values":
                    yield "o", tile, partial(triton._apply, p, q, states, scores, v, decay, "o")
                    yield "dv", tile, partial(triton._apply, p, k, states, scores, out_grad, decay, "dv")
                case "keys":
                    yield "dq", tile, partial(triton._apply, p, out_grad, states, scores, k, decay, "dq")
                    yield "dk", tile, partial(triton._apply, p, v, states, scores, q, decay, "dk")


def sweep(shape: str, only: list[str]) -> None:
    """Print, for each chunk size and kernel, the times of the candidate tiles, best first."""
    for chunk in (64, 128, 256) if shape in ("square", "ssd") else (128, 256):
        start = time.perf_counter()
        todo = list(jobs(shape, chunk, only))
        with collecting() as launches:
            for _, _, call in todo:
                call()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            built = [
                pool.submit(lambda x: x.kernel.warmup(*x.arguments, grid=(1,), **x.options).run, x)
                for x in launches.values()
            ]
            failed = sum(future.exception() is not None for future in built)
        compiled = time.perf_counter() - start
        found: dict[str, list[tuple[float, Tile]]] = {}
        for what, tile, call in todo:
            try:
                milliseconds = do_bench(call, warmup=3, rep=12, return_mode="median")
            except (TritonError, RuntimeError) as error:  # a tile that does not fit is a result of the sweep
                print(f"    {what} {tile}: {type(error).__name__}")
                continue
            found.setdefault(what, []).append((milliseconds, tile))
        best = sum(min(milliseconds for milliseconds, _ in times) for times in found.values())
        print(
            f"{shape} chunk {chunk}: best {best:.3f} ms; {len(launches)} binaries in {compiled:.0f} s, {failed} failed"
        )
        for what, times in found.items():
            ranked = sorted(times, key=lambda item: item[0])
            print(
                f"  {what:12}" + "  ".join(f"{m:.4f}:{'/'.join(map(str, dataclasses.astuple(t)))}" for m, t in ranked),
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="shape", help=f"of {', '.join(SHAPES)} (all)")
    parser.add_argument("--only", nargs="*", default=list(ROLES), choices=ROLES)
    given = parser.parse_args()
    for shape in given.shapes or SHAPES:
        sweep(shape, given.only)


if __name__ == "__main__":
    main()
