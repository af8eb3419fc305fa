"""Time decay attention on one GPU: forward, forward + backward, each kernel, one token, first call.

    python benchmarks/ops_decay_attention.py              # the training shapes, eager and as CUDA graphs
    python benchmarks/ops_decay_attention.py --kernels    # time of each kernel of a training step
    python benchmarks/ops_decay_attention.py --token      # one token (decoding), as share of the copy's bandwidth
    python benchmarks/ops_decay_attention.py --first      # first call with empty caches, further shapes

Milliseconds, median [10 %, 90 %], bfloat16, inputs in rotation. Run the tests first. Other libraries: peers.py; long
sequences: lengths.py.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial

import torch
from bandwidth import Timing, copy_bandwidth, eager, graphed, line
from torch import Tensor

from dense_lab_kernels import reusing_states
from dense_lab_kernels.decay_attention import decay_attention

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


def inputs(shape: str | tuple[int, int, int, int, int, int, str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, log_decay of a shape, requiring gradients (constant decays do not)."""
    batch, tokens, heads, groups, key_size, value_size, decay = SHAPES[shape] if isinstance(shape, str) else shape
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


def measure(function: Callable[..., Tensor], shape: str | tuple) -> dict[str, Timing | float]:
    """Times of forward and of forward + backward, as graphs and eager, and GiB at the peak of a step."""
    sets = [inputs(shape) for _ in range(2)]
    upstreams = [torch.randn_like(tensors[2]) for tensors in sets]

    def both(i: int) -> tuple[Tensor, ...]:
        leaves = [x for x in sets[i] if x.requires_grad]
        return torch.autograd.grad(function(*sets[i]), leaves, upstreams[i])

    steps = [partial(both, i) for i in range(len(sets))]
    steps[0]()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    steps[0]()
    found: dict[str, Timing | float] = {"peak": (torch.cuda.max_memory_allocated() - before) / 2**30}
    found |= {"graph, forward + backward": graphed(steps, replays=20), "eager, forward + backward": eager(steps)}
    with torch.no_grad():
        forwards = [partial(function, *tensors) for tensors in sets]
        found |= {"graph, forward": graphed(forwards, replays=20), "eager, forward": eager(forwards)}
    return found


def report(name: str, found: dict[str, Timing | float]) -> None:
    times = (f"{k} {t.median:7.3f} [{t.low:.3f}, {t.high:.3f}]" for k, t in found.items() if isinstance(t, Timing))
    print(f"{name:28} peak {found['peak']:.2f} GiB  " + "  ".join(times), flush=True)


def kernels(shape: str) -> None:
    """Print the time of each kernel of one forward and backward, in the order of its cost."""
    tensors = inputs(shape)
    leaves, upstream = [x for x in tensors if x.requires_grad], torch.randn_like(tensors[2])

    def step() -> None:
        torch.autograd.grad(ours(*tensors), leaves, upstream)

    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(10):
            step()
        torch.cuda.synchronize()
    rows = [(e.self_device_time_total / 1e4, e.count // 10, e.key) for e in profile.key_averages()]
    print(f"{shape}: {sum(row[0] for row in rows):.3f} ms on the device")
    for milliseconds, count, name in sorted(rows, reverse=True)[:10]:
        if milliseconds:
            print(f"    {milliseconds:7.4f} ms  x{count}  {name[:90]}")


def token() -> None:
    """One token with a state in float32: as a new state, and in place."""
    batch, heads, key_size, value_size = 6, 2, 384, 1536
    sets = [
        tuple(x.detach() for x in inputs((batch, 1, heads, heads, key_size, value_size, "constant"))) for _ in range(4)
    ]
    states = [torch.randn(batch, heads, key_size, value_size, device="cuda") for _ in sets]
    copy = copy_bandwidth()

    def step(i: int) -> Tensor:
        return decay_attention(*sets[i], initial_state=states[i]).output

    calls = [partial(step, i) for i in range(len(sets))]
    with torch.no_grad():
        print(line("one token, new state", graphed(calls), 2 * states[0].nbytes, copy))
        print(line("one token, new state, eager", eager(calls), 2 * states[0].nbytes, copy))
        with reusing_states():
            print(line("one token, in place", graphed(calls), 2 * states[0].nbytes, copy))


def first_call() -> None:
    """Print the time of a first forward + backward with empty caches, and of further shapes."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TRITON_CACHE_DIR": folder}
        subprocess.run([sys.executable, "-c", FIRST_CALL], env=environment, check=True, timeout=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="shape", help=f"of {', '.join(SHAPES)} (all)")
    modes = parser.add_mutually_exclusive_group()
    for mode in ("kernels", "token", "first"):
        modes.add_argument(f"--{mode}", action="store_true")
    given = parser.parse_args()
    alone = {"token": token, "first": first_call}
    for mode, function in alone.items():
        if getattr(given, mode):
            function()
            return
    for shape in given.shapes or SHAPES:
        if given.kernels:
            kernels(shape)
        else:
            report(shape, measure(ours, shape))


if __name__ == "__main__":
    main()
