"""What other libraries take for the same work, on this GPU, in this run: each in a process of its own.

    python benchmarks/peers.py                                # all, one after the other
    python benchmarks/peers.py "wide fla" "square sdpa"       # some of them
    python benchmarks/peers.py --wait FILE --limit 100       # get ready, touch *.quiet beside FILE, wait for FILE

fla searches its launch parameters at the first call of every shape, and compiles every candidate for it, for minutes;
here the candidates of a kernel are compiled side by side first, which changes nothing in what is chosen. A peer that is
not ready within --limit seconds is left out and says so; a library that is not installed, too. Milliseconds, median
[10 %, 90 %], of eager calls and, where they can be recorded, of CUDA graphs; bfloat16; the shapes are those of ours.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bandwidth import eager, graphed
from torch import Tensor


class Work(NamedTuple):
    """A function with sets of arguments that take turns; the first results are scored."""

    function: Callable[..., Tensor]
    sets: list[tuple[Tensor, ...]]

    def forward(self, i: int) -> Tensor:
        return self.function(*self.sets[i])

    def both(self, i: int) -> tuple[Tensor | None, ...]:
        out = self.forward(i)
        leaves = [x for x in self.sets[i] if x.requires_grad]
        return torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)


def attention(shape: str, function: Callable[..., Tensor]) -> Work:
    from ops_decay_attention import inputs

    return Work(function, [inputs(shape) for _ in range(2)])


def fla_retention(shape: str) -> Work:
    from fla.ops.retention import chunk_retention

    return attention(shape, lambda q, k, v, g: chunk_retention(q, k, v, scale=1.0)[0])


def fla_simple_gla(shape: str) -> Work:
    from fla.ops.simple_gla import chunk_simple_gla

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        # It has no groups of heads that share q and k.
        q, k = (x.expand(-1, -1, v.shape[2], -1).contiguous() for x in (q, k))
        return chunk_simple_gla(q, k, v, g, scale=1.0)[0]

    return attention(shape, run)


def torch_parallel(shape: str) -> Work:
    """Retention as a product with a matrix of decays, as the official code trains it (arXiv 2307.08621, eq. 5)."""

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        steps = torch.arange(q.shape[2], device=q.device)
        apart = (steps[:, None] - steps).clamp(min=0)
        decay = torch.exp(g[:, None, None] * apart).tril().to(q.dtype)
        return ((q @ k.mT * decay) @ v).transpose(1, 2)

    return attention(shape, run)


def torch_attention(shape: str) -> Work:
    """Softmax attention: another operation, a yardstick."""

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return attention(shape, run)


def mamba_ssd(shape: str) -> Work:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        rate = -torch.ones(v.shape[2], device=v.device)
        return mamba_chunk_scan_combined(v, -g, rate, k, q, chunk_size=256)

    return attention(shape, run)


def fla_convolution(_: str) -> Work:
    from fla.modules.causal_conv1d import causal_conv1d
    from ops_causal_conv1d import SETS, SHAPES, draw

    sets = [draw(*SHAPES[0])[:-1] for _ in range(SETS)]
    return Work(lambda x, weight, bias: causal_conv1d(x, weight, bias, activation="silu")[0], sets)


def mamba_scan(_: str) -> Work:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    from ops_selective_scan import SHAPES, draw

    def run(u: Tensor, dt: Tensor, z: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor, bias: Tensor) -> Tensor:
        return selective_scan_fn(u, dt, A, B, C, D, z, bias, True)

    def turned(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        wide = [inputs[k].transpose(1, 2).contiguous().detach().requires_grad_() for k in ("u", "dt", "z")]
        shared = [inputs[k].permute(0, 2, 3, 1).contiguous().detach().requires_grad_() for k in "BC"]
        return (*wide, *shared, inputs["A"], inputs["D"], inputs["dt_bias"])

    return Work(run, [turned(draw(*SHAPES[0])) for _ in range(2)])


PEERS: dict[str, Callable[[str], Work]] = {
    "wide fla": fla_retention,
    "wide torch": torch_parallel,
    "middle fla": fla_retention,
    "square fla": fla_retention,
    "square sdpa": torch_attention,
    "ssd fla": fla_simple_gla,
    "ssd mamba_ssm": mamba_ssd,
    "scan mamba_ssm": mamba_scan,
    "convolution fla": fla_convolution,
}
"""By the shape of ops_decay_attention.py (or the operation) and the library."""


def compile_side_by_side() -> None:
    """Make Triton's autotuner compile its candidates in parallel before it times them one by one."""
    from triton.runtime.autotuner import Autotuner

    prune = Autotuner.prune_configs

    def prune_and_compile(self: Any, kwargs: dict[str, Any]) -> list[Any]:
        configs = prune(self, kwargs)
        given = {**self.nargs, **kwargs, "grid": (1,)}
        given.pop("warmup", None)

        def compile_one(config: Any) -> None:
            with contextlib.suppress(Exception):  # The autotuner meets and handles it again.
                self.fn.warmup(**given, **config.all_kwargs())

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, configs))
        return configs

    Autotuner.prune_configs = prune_and_compile


def measure(name: str, wait: Path | None, limit: int) -> None:
    """Print one line: a peer's times, or why there are none."""
    started = time.perf_counter()

    quiet = wait.with_name(f"{name}.quiet") if wait else Path(os.devnull)

    def late(*_: object) -> None:
        print(f"{name:18} left out: not ready within {limit} s", flush=True)
        quiet.touch()
        os._exit(0)

    signal.signal(signal.SIGALRM, late)
    signal.alarm(limit)
    try:
        compile_side_by_side()
        work = PEERS[name](name.split()[0])
        work.both(0)
        torch.cuda.synchronize()
    except ImportError as error:
        print(f"{name:18} left out: {error}", flush=True)
        return
    finally:
        signal.alarm(0)
        quiet.touch()
    first = time.perf_counter() - started
    while wait is not None and not wait.exists():
        time.sleep(0.2)
    with (wait or Path(os.devnull)).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # One at a time.
        print(f"{name:18} {times(work)}; ready {first:.0f} s after its start", flush=True)


def times(work: Work) -> str:
    """Forward, and forward + backward."""
    found = []
    for how, timer in (("eager", partial(eager, rounds=10)), ("graph", partial(graphed, replays=10))):
        for what, call in (("forward", work.forward), ("forward + backward", work.both)):
            calls = [partial(call, i) for i in range(len(work.sets))]
            with torch.set_grad_enabled(what != "forward"):
                try:
                    found.append(f"{how}, {what} {_text(timer(calls))}")
                except RuntimeError as error:
                    found.append(f"{how}, {what}: {str(error).splitlines()[0][:60]}")
    return "  ".join(found)


def _text(timing: tuple[float, float, float]) -> str:
    median, low, high = timing
    return f"{median:7.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="peer", help=f"of {', '.join(PEERS)} (all)")
    parser.add_argument("--wait", type=Path, metavar="FILE")
    parser.add_argument("--limit", type=int, default=100, metavar="SECONDS", help="for each to be ready")
    parser.add_argument("--one", choices=PEERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options.one, options.wait, options.limit)
        return
    waiting = ["--wait", str(options.wait)] if options.wait else []
    started = []
    for name in options.names or PEERS:
        command = [sys.executable, __file__, "--one", name, "--limit", str(options.limit), *waiting]
        started.append((name, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
        if not waiting:
            _finish(*started.pop())
    for name, process in started:
        _finish(name, process)


def _finish(name: str, process: subprocess.Popen[str]) -> None:
    """Wait for a peer; say what ended it when it failed."""
    _, errors = process.communicate()
    if process.returncode:
        print(f"{name:18} failed: {(errors.strip().splitlines() or ['?'])[-1][:200]}", flush=True)


if __name__ == "__main__":
    main()
