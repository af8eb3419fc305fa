"""selective_scan on one GPU, bfloat16, with gate, D and softplus: time, against mamba-ssm where it is installed.

    python benchmarks/ops_selective_scan.py            # shapes, sources, kernels, first call with an empty cache
    python benchmarks/ops_selective_scan.py --quick    # the first shape, and its kernels
    python benchmarks/ops_selective_scan.py --sweep    # launch choices, to check the rule
    python benchmarks/ops_selective_scan.py --first-call  # only the first call, twice, and where the time of one goes

Milliseconds are medians: forward of replayed graphs, with the spread from the 10th to the 90th percentile; forward +
backward over CUDA events, from the 20th to the 80th.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from bandwidth import graphed
from first_call import Span, report, traced
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from triton.testing import do_bench

from dense_lab_kernels._triton import compile_once, processors
from dense_lab_kernels.selective_scan import ScanSource, selective_scan, triton

SHAPES = [(8, 2048, 2048, 16), (8, 4096, 2048, 16), (1, 2048, 32768, 16), (32, 1536, 1024, 16)]  # B, D, T, N
# mamba-ssm's CUDA kernel on an H200: forward, forward + backward
QUOTED = {SHAPES[0]: (0.589, 2.89), SHAPES[1]: (1.16, 5.69), SHAPES[2]: (1.45, 7.08), SHAPES[3]: (0.837, 4.28)}
KERNELS = ("forward", "adjoint", "join", "gradients")
# Shape, sources, site: changes to the rule. The first is the rule itself, whose gradients the others must give.
SWEEP = {
    (SHAPES[0], 0, "readout"): [{}, {"span": 4}, {"span": 7}, {"span": 9}, {"limit": 168}],
    (SHAPES[2], 0, "readout"): [{}, {"span": 16}, {"segment": 1984}],
    (SHAPES[0], 1, "readout"): [{}, {"limit": None}],
    (SHAPES[0], 2, "carried"): [{}, {"limit": 168}],
}  # fmt: skip


def draw(B: int, D: int, T: int, N: int) -> dict[str, Tensor]:
    """Arguments as a Mamba layer has them: A = -(1 .. N), steps of about 0.001 to 0.1."""
    wide = {name: torch.randn(B, T, D, device="cuda", dtype=torch.bfloat16) for name in ("u", "dt", "z")}
    shared = {name: torch.randn(B, T, 1, N, device="cuda", dtype=torch.bfloat16) for name in ("B", "C")}
    rates = -torch.arange(1, N + 1, device="cuda", dtype=torch.float32).repeat(D, 1)
    bias = torch.log(torch.expm1(torch.empty(D, device="cuda").uniform_(-6.9, -2.3).exp()))
    inputs = {**wide, **shared, "A": rates, "D": torch.ones(D, device="cuda"), "dt_bias": bias}
    inputs["dt"] *= 0.5
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def draw_sources(inputs: dict[str, Tensor], m: int) -> dict[str, Any]:
    def again(tensor: Tensor) -> Tensor:
        return torch.randn_like(tensor).requires_grad_()

    made = [
        ScanSource(again(inputs["u"]), (again(inputs["dt"]) * 0.5).detach().requires_grad_(),
                   inputs["A"].detach().clone().requires_grad_(), again(inputs["B"]), inputs["dt_bias"])
        for _ in range(m)
    ]  # fmt: skip
    return {"sources": made, "gates": [torch.rand_like(inputs["u"]).requires_grad_() for _ in range(m)]}


def time_of(call: Callable[[], Any]) -> str:
    low, middle, high = do_bench(call, warmup=10, rep=60, quantiles=[0.2, 0.5, 0.8])
    return f"{middle:7.3f} ({low:.3f}-{high:.3f})"


def both(run: Callable[[], Tensor], leaves: list[Tensor]) -> tuple[str, str]:
    """Forward without gradients, as a graph: a call costs the host as much; forward and backward."""
    grad = torch.randn_like(run())

    def train() -> None:
        torch.autograd.grad(run(), leaves, grad)

    with torch.no_grad():
        timing = graphed([run])
    forward = f"{timing.median:7.3f} ({timing.low:.3f}-{timing.high:.3f})"
    timing = graphed([train])
    return forward, f"{timing.median:7.3f} ({timing.low:.3f}-{timing.high:.3f}), called {time_of(train)}"


def leaves_of(inputs: dict[str, Any]) -> list[Tensor]:
    flat = [t for t in inputs.values() if isinstance(t, Tensor)]
    flat += list(inputs.get("gates", ()))
    return flat + [t for source in inputs.get("sources", ()) for t in source[:4]]


def ours(inputs: dict[str, Any], **options: Any) -> Callable[[], Tensor]:
    return lambda: selective_scan(**inputs, **options, impl="triton").output


def peer(inputs: dict[str, Tensor]) -> tuple[str, str] | None:
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None
    flipped = {k: inputs[k].transpose(1, 2).contiguous().detach().requires_grad_() for k in ("u", "dt", "z")}
    B, C = (inputs[k].permute(0, 2, 3, 1).contiguous().detach().requires_grad_() for k in "BC")
    A, D, bias = inputs["A"], inputs["D"], inputs["dt_bias"]
    return both(
        lambda: selective_scan_fn(flipped["u"], flipped["dt"], A, B, C, D, flipped["z"], bias, True),
        [*flipped.values(), B, C, A, D, bias],
    )


def kernels(run: Callable[[], Tensor], leaves: list[Tensor]) -> None:
    """Milliseconds of every kernel in one forward and backward, on one line; copies, sums and fills together."""
    grad = torch.randn_like(run())
    for _ in range(2):
        torch.autograd.grad(run(), leaves, grad)
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as trace:
        for _ in range(5):
            torch.autograd.grad(run(), leaves, grad)
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = event.name if event.name in KERNELS else "torch"
            times.setdefault(name, []).append(event.device_time / 5000)
    parts = sorted(times.items(), key=lambda item: -sum(item[1]))
    print("    " + ", ".join(f"{name} {sum(spent):.3f} ({len(spent) // 5} x)" for name, spent in parts), flush=True)


def first_call(option: str = "--first-call-here") -> None:
    """`first_call_here` in a process and a cache of its own."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TRITON_CACHE_DIR": cache, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, __file__, option], env=environment, check=True)


def first_call_here(trace: AbstractContextManager[list[Span]]) -> None:
    """Forward, then backward, at four shapes, imports not counted; what the first of them spent its time on."""
    torch.cuda.synchronize()
    for shape in ((8, 512, 512, 16), (8, 768, 640, 16), (8, 512, 500, 16), (8, 500, 512, 16)):
        inputs = draw(*shape)
        torch.cuda.synchronize()
        with trace as spans:
            start = time.perf_counter()
            output = ours(inputs)()
            torch.cuda.synchronize()
            forward = time.perf_counter() - start
            output.float().sum().backward()
            torch.cuda.synchronize()
            whole = time.perf_counter() - start
        print(f"first call at {shape}: forward {forward:.2f} s, with backward {whole:.2f} s", flush=True)
        report(spans, start)
        trace = nullcontext([])


def flat_of(inputs: dict[str, Any]) -> tuple[Tensor | None, ...]:
    """The arguments of `triton._SelectiveScan` after the plan."""
    flat = [*(inputs[name] for name in ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")), None]
    for source, gate in zip(inputs.get("sources", ()), inputs.get("gates", ()), strict=True):
        flat += [*source, gate, None]
    return tuple(flat)


def plans_of(inputs: dict[str, Any], site: str, changes: list[dict[str, Any]]) -> list[triton.Plan]:
    sizes = (inputs["u"].shape, inputs["A"].shape[1], 1, len(inputs.get("sources", ())), processors(inputs["u"].device))
    rule = triton.plans.make_plan(*sizes, carried=site == "carried", softplus=True, gated=True, skip=True)
    return [rule._replace(**change) for change in changes]


def sweep() -> None:
    """Launch choices: how far their gradients are from the rule's, and times; all are compiled in parallel first."""
    jobs = []
    for (shape, m, site), changes in SWEEP.items():
        inputs = draw(*shape)
        inputs |= draw_sources(inputs, m) if m else {}
        jobs.append((f"{shape} {site} m={m}", inputs, changes, plans_of(inputs, site, changes)))
    start = time.perf_counter()
    launches = [x for _, inputs, _, plans in jobs for p in plans
                for x in triton._launches(p, flat_of(inputs), training=True)]  # fmt: skip
    different = {(x.kernel.__name__, str(x.options), str(list(map(type, x.arguments))), len(x.arguments[0])): x
                 for x in launches}  # fmt: skip
    compile_once("sweep", lambda: list(different.values()))
    print(f"compiled {len(different)} kernels in {time.perf_counter() - start:.1f} s", flush=True)
    for title, inputs, changes, plans in jobs:
        print(title)
        leaves, expected = leaves_of(inputs), None
        for change, plan in zip(changes, plans, strict=True):
            run = partial(lambda plan, flat: triton._SelectiveScan.apply(plan, *flat)[0], plan, flat_of(inputs))
            torch.manual_seed(0)
            found = torch.autograd.grad(run(), leaves, torch.randn_like(inputs["u"]))
            expected = expected or found
            off = max(float((x - y).float().norm() / y.float().norm()) for x, y in zip(found, expected, strict=True))
            forward, train = both(run, leaves)
            print(f"{change!s:60} off {off:.1e}  forward {forward}  forward + backward {train} ms")
            kernels(run, leaves)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--first-call", action="store_true")
    parser.add_argument("--first-call-here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--first-call-traced", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.first_call_here or chosen.first_call_traced:
        first_call_here(traced() if chosen.first_call_traced else nullcontext([]))
        return
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    if chosen.first_call:
        for option in ("--first-call-here", "--first-call-here", "--first-call-traced"):
            first_call(option)
        return
    if chosen.sweep:
        sweep()
        return
    for shape in SHAPES[:1] if chosen.quick else SHAPES:
        inputs = draw(*shape)
        forward, train = both(ours(inputs), leaves_of(inputs))
        quoted = "mamba-ssm (quoted, H200) {} / {}".format(*QUOTED[shape])
        measured = peer(inputs)
        print(f"B, D, T, N = {shape}: forward {forward}  forward + backward {train} ms; {measured or quoted}")
    inputs = draw(*SHAPES[0])
    kernels(ours(inputs), leaves_of(inputs))
    for site in () if chosen.quick else ("readout", "carried"):
        for m in (1, 2):
            dense = inputs | draw_sources(inputs, m)
            forward, train = both(ours(dense, site=site), leaves_of(dense))
            print(f"{site} m={m} at {SHAPES[0]}: forward {forward}  forward + backward {train} ms")
            kernels(ours(dense, site=site), leaves_of(dense))
    if not chosen.quick:
        first_call()


if __name__ == "__main__":
    main()
