"""Time decay attention against its peers on one GPU: forward, forward + backward, first call, each kernel.

    python benchmarks/ops_decay_attention.py                    # all shapes, peers where installed, first call
    python benchmarks/ops_decay_attention.py --quick            # ours only, short
    python benchmarks/ops_decay_attention.py --kernels          # time of each kernel
    python benchmarks/ops_decay_attention.py --sweep wide ssd   # time tile choices of every kernel

Milliseconds, median [20 %, 80 %] with the L2 cache flushed between runs, bfloat16. Run the tests first.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor
from triton.runtime.errors import TritonError
from triton.testing import do_bench

from dense_lab_kernels.decay_attention import decay_attention, triton
from dense_lab_kernels.decay_attention.triton_launch import Tile, Tiles, collecting, using_tiles

# name: B, T, H, G, K, V, decay
SHAPES = {
    "wide": (8, 2048, 2, 2, 384, 1536, "constant"),
    "middle": (8, 2048, 4, 4, 256, 512, "constant"),
    "square": (8, 2048, 16, 16, 128, 128, "constant"),
    "ssd": (8, 2048, 32, 1, 128, 64, "per token"),
}
FIRST_CALL = """
import time, torch
from dense_lab_kernels.decay_attention import decay_attention
def step(batch, tokens, heads, key_size, value_size):
    q, k = (torch.randn(batch, tokens, heads, key_size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    v = torch.randn(batch, tokens, heads, value_size, device="cuda", dtype=torch.bfloat16)
    log_decay = -torch.rand(heads, device="cuda")
    for x in (q, k, v):
        x.requires_grad_()
    torch.cuda.synchronize()
    start = time.perf_counter()
    decay_attention(q, k, v, log_decay).output.sum().backward()
    torch.cuda.synchronize()
    return time.perf_counter() - start
torch.ones(1, device="cuda").sum().item()
print("first call %.2f s" % step(8, 2048, 16, 128, 128))
print("other batch, length, heads of the class %.2f s" % step(3, 1000, 5, 128, 128))
print("other head sizes %.2f s" % step(2, 2048, 2, 256, 512))
print("odd head sizes %.2f s" % step(2, 100, 2, 100, 72))
"""


def inputs(shape: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, log_decay of a shape, requiring gradients (constant decays do not)."""
    batch, tokens, heads, groups, key_size, value_size, decay = SHAPES[shape]
    draw = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    q, k = draw(batch, tokens, groups, key_size) * key_size**-0.5, draw(batch, tokens, groups, key_size)
    v = draw(batch, tokens, heads, value_size)
    if decay == "constant":
        log_decay = torch.log(1 - 2.0 ** (-5 - torch.arange(heads, device="cuda", dtype=torch.float32)))
    else:
        log_decay = (-torch.rand(batch, tokens, heads, device="cuda")).requires_grad_()
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), log_decay


def ours(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """The output of the operation, by whatever "auto" chooses."""
    return decay_attention(q, k, v, log_decay).output


def peers(shape: str) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """Name and function of every peer that is installed and computes the shape's operation (or serves as yardstick)."""
    constant, grouped = SHAPES[shape][6] == "constant", SHAPES[shape][2] != SHAPES[shape][3]
    try:
        from fla.ops.retention import chunk_retention
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        print("fla is not installed")
    else:
        if constant:
            yield "fla chunk_retention", lambda q, k, v, g: chunk_retention(q, k, v)[0]
        elif not grouped:
            yield "fla chunk_simple_gla", lambda q, k, v, g: chunk_simple_gla(q, k, v, g)[0]
    if not constant:
        try:
            from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
        except ImportError:
            print("mamba_ssm is not installed")
        else:

            def mamba(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
                rate = -torch.ones(v.shape[2], device=v.device)
                return mamba_chunk_scan_combined(v, -g, rate, k, q, chunk_size=256)

            yield "mamba_chunk_scan_combined", mamba
    if not grouped and SHAPES[shape][5] <= 256:

        def flash(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

        yield "torch attention (yardstick)", flash


def timed(function: Callable[[], object], leaves: list[Tensor] | None = None, rep: int = 200) -> str:
    """Median and spread of one call."""
    median, low, high = do_bench(function, warmup=50, rep=rep, quantiles=[0.5, 0.2, 0.8], grad_to_none=leaves)
    return f"{median:7.3f} [{low:6.3f}, {high:6.3f}]"


def compare(shape: str, with_peers: bool) -> None:
    """Print forward and forward + backward times of ours and the peers."""
    tensors = inputs(shape)
    leaves = [x for x in tensors if x.requires_grad]
    functions = [("dense_lab", ours), *(peers(shape) if with_peers else ())]
    upstream = torch.randn_like(tensors[2])
    for name, function in functions:

        def both(function: Callable[..., Tensor] = function) -> None:
            function(*tensors).backward(upstream)

        with torch.no_grad():
            forward = timed(lambda function=function: function(*tensors))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        total = timed(both, leaves)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        print(f"{shape:8} {name:28} forward {forward}  forward+backward {total}  peak {peak:.2f} GiB", flush=True)


def kernels(shape: str) -> None:
    """Print the time of each kernel of one forward and backward, in the order of its cost."""
    tensors = inputs(shape)
    upstream = torch.randn_like(tensors[2])
    step = partial(lambda: ours(*tensors).backward(upstream))
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(10):
            step()
        torch.cuda.synchronize()
    rows = [(e.self_device_time_total / 1e4, e.count // 10, e.key) for e in profile.key_averages()]
    print(f"{shape}: {sum(row[0] for row in rows):.3f} ms on the device")
    for milliseconds, count, name in sorted(rows, reverse=True)[:12]:
        print(f"    {milliseconds:7.4f} ms  x{count}  {name[:90]}")


def first_call() -> None:
    """Print the time of a first forward + backward with empty caches, and of further shapes."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TRITON_CACHE_DIR": folder}
        subprocess.run([sys.executable, "-c", FIRST_CALL], env=environment, check=True)


STATES = [(128, 128, 64, 8, 3), (128, 128, 64, 8, 3, 128), (128, 128, 32, 8, 4), (64, 128, 64, 4, 3)]
STATES += [(128, 64, 64, 4, 3), (64, 64, 64, 4, 3), (128, 64, 64, 4, 3, 168), (64, 256, 64, 8, 3), (128, 256, 32, 8, 3)]
SCORES = [
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 3, 128),
    (128, 128, 64, 8, 2),
    (128, 128, 64, 4, 3),
    (64, 64, 64, 4, 3),
]
PRODUCTS = [(128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 128, 64, 8, 4), (128, 256, 64, 8, 3), (64, 128, 64, 4, 3)]
PRODUCTS += [(128, 64, 64, 4, 3), (64, 64, 64, 4, 4), (128, 128, 32, 8, 4), (64, 256, 64, 4, 3)]
ROLES = {"states": STATES, "scores": SCORES, "score_grads": SCORES, "values": PRODUCTS, "keys": PRODUCTS}


def candidates(base: Tiles, role: str, rows: int, cols: int) -> Iterator[tuple[Tile, Tiles]]:
    """Tiles with one role replaced; the tiles that exceed the problem's rows or cols are left out."""
    for numbers in ROLES[role]:
        tile = Tile(*numbers)
        if tile.rows > rows or tile.cols > cols or (role == "states" and tile.depth > base.chunk):
            continue
        tiles = base
        if role in ("scores", "score_grads"):
            shrink = {name: dataclasses.replace(getattr(base, name), rows=tile.rows) for name in ("values", "keys")}
            tiles = dataclasses.replace(base, **shrink)
        yield tile, dataclasses.replace(tiles, **{role: tile})


def jobs(shape: str, chunk: int) -> Iterator[tuple[str, Tile, Callable[[], object]]]:
    """(what, tile, call) for each kernel of a shape and each candidate tile."""
    q, k, v, log_decay = (x.detach() for x in inputs(shape))
    with using_tiles(None):
        base = triton._Problem.of(q, v, log_decay).tiles
    grouped = q.shape[2] != v.shape[2]
    rows = min(chunk, 128)
    resized = {n: dataclasses.replace(getattr(base, n), rows=rows, cols=rows) for n in ("scores", "score_grads")}
    resized |= {n: dataclasses.replace(getattr(base, n), rows=min(rows, 64)) for n in ("values", "keys")}
    base = dataclasses.replace(base, chunk=chunk, **resized)
    out_grad = torch.randn_like(v)
    problem = triton._Problem.of(q, v, log_decay)
    problem = dataclasses.replace(problem, tiles=base)
    decay = triton._decay(problem, log_decay)
    states = triton._states(problem, k, v, decay, None, None, "forward")
    scores = triton._scores(problem, q, k, decay, base.scores)
    wide, narrow = v.shape[3], q.shape[3]
    limits = {"states": (narrow, wide), "scores": (chunk, chunk), "score_grads": (chunk, chunk)}
    limits |= {"values": (chunk, wide), "keys": (chunk, narrow)}
    for role, (most_rows, most_cols) in limits.items():
        for tile, tiles in candidates(base, role, most_rows, most_cols):
            p = dataclasses.replace(problem, tiles=tiles)
            match role:
                case "states":
                    yield "states", tile, partial(triton._states, p, k, v, decay, None, None, "forward")
                    yield "states back", tile, partial(triton._states, p, q, out_grad, decay, None, None, "backward")
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


def sweep(shape: str) -> None:
    """Print, for each chunk size and kernel, the times of the candidate tiles, best first."""
    for chunk in (64, 128, 256) if shape in ("square", "ssd") else (128, 256):
        start = time.perf_counter()
        todo = list(jobs(shape, chunk))
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
    modes = parser.add_mutually_exclusive_group()
    for mode in ("quick", "kernels", "sweep"):
        modes.add_argument(f"--{mode}", action="store_true")
    given = parser.parse_args()
    for shape in given.shapes or SHAPES:
        if given.sweep:
            sweep(shape)
        elif given.kernels:
            kernels(shape)
        else:
            compare(shape, with_peers=not given.quick)
    if not (given.sweep or given.kernels or given.quick):
        first_call()


if __name__ == "__main__":
    main()
