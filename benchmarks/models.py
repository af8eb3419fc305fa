"""Whole training steps on one GPU, of the published model and of a search trial: speed, memory, time to the first step.

    python benchmarks/models.py                      # all: speed and memory, then first steps with empty caches
    python benchmarks/models.py speed 350m-m1        # some of: 350m-m0 350m-m1 350m-m2 trial trial-gau trial-mamba
    python benchmarks/models.py speed trial --eager  # the same step without a graph
    python benchmarks/models.py profile 350m-m1      # kernels of one step by time
    python benchmarks/models.py first trial          # time to the first step, in a process of its own
    python benchmarks/models.py first trial --compiled ahead  # the same with all kernels compiled side by side before

bf16 autocast over float32 weights, AdamW, clipping, dropout as the model has it; random tokens. Step times are those of
single steps between events: median [10 %, 90 %]. 350m: DenseRetNet-350M (m earlier layers), B8 T2048, 32,000 tokens.
trial: RetNet, width 256, depth 6, dense m = 1, B16 T512, 4,096 tokens.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

STARTED = time.perf_counter()

import torch  # noqa: E402 - the clock runs before

from dense_lab import registry as registries  # noqa: E402
from dense_lab.corpus import Batch  # noqa: E402
from dense_lab.model import LanguageModel, ModelSpec  # noqa: E402
from dense_lab.presets import expand  # noqa: E402
from dense_lab.study import TrainSpec  # noqa: E402
from dense_lab.training.device import Place  # noqa: E402
from dense_lab.training.graph import GraphStep  # noqa: E402
from dense_lab.training.optimizer import build_optimizer  # noqa: E402
from dense_lab.training.step import EagerStep, StepFunction  # noqa: E402

PEERS = """peers, measured 2026-11 on an H200 (torch 2.11, bf16, B8 T2048 unless said):
    official DenseRetNet-350M code   m=0 60,700 tokens/s, 39.4 GiB; m=1 56,400, 46.2 GiB; m=2 55,300, 47.8 GiB
    fla RetNet 380M in transformers  94,800 tokens/s, 16.3 GiB, first step 242 s
    fla RetNet 5.6M, B16 T512        233,000 tokens/s (35 ms/step), first step 162 s, next shape 106 s"""


class Case(NamedTuple):
    """What is trained, and on how much."""

    model: dict[str, Any]
    vocabulary: int
    batch: int
    tokens: int


def trial(core: str | dict[str, Any], width: int = 256, depth: int = 6, span: int = 1, sites: Any = "all") -> Case:
    """A trial of an architecture search."""
    model = {"width": width, "depth": depth, "core": core, "dense": {"span": span, "sites": sites}}
    return Case({**model, "ffn": "swiglu"}, 4096, 16, 512)


CASES = {
    "350m-m0": Case({"preset": "gau-retnet-350m"}, 32000, 8, 2048),
    "350m-m1": Case({"preset": "denseretnet-350m"}, 32000, 8, 2048),
    "350m-m2": Case({"preset": "denseretnet-350m", "dense": {"span": 2}}, 32000, 8, 2048),
    "trial": trial("retnet"),
    "trial-gau": trial("gau_retnet"),
    "trial-mamba": trial("mamba"),
    "trial-retnet-readout": trial("retnet", sites=["state_readout"]),
    "trial-mamba-readout": trial("mamba", sites=["state_readout"]),
    "trial-mamba-carried": trial("mamba", sites=["state_carried"]),
}
NEXT = {"350m-m1": ["350m-m2"], "trial": ["next-heads", "next-width", "trial-gau", "trial-mamba"]}
OTHERS = {
    "next-heads": trial({"kind": "retnet", "heads": 8}),
    "next-width": trial("retnet", width=192, depth=4, span=2),
}


class Training:
    """A model with its optimiser, ready for steps on random tokens."""

    def __init__(self, case: Case, mode: str = "graph", drawn: str = "on the GPU") -> None:
        spec = ModelSpec.model_validate(expand(case.model))
        self.case, train = case, TrainSpec()
        with torch.device("cuda" if drawn == "on the GPU" else "cpu"):
            self.model: LanguageModel = spec.build(case.vocabulary).initialise(0).to("cuda")
        place = Place(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16)
        kind = GraphStep if mode == "graph" else EagerStep
        arguments = (self.model, build_optimizer(self.model, train), place, case.batch, train.clip)
        self.step: StepFunction = kind(*arguments)
        self.generator = torch.Generator().manual_seed(0)

    def compile_ahead(self) -> None:
        """Have the step's kernels compiled."""
        ids = torch.zeros(self.case.batch, self.case.tokens, dtype=torch.int64, device="cuda")
        with registries.default().compiled_ahead(), torch.autocast("cuda", torch.bfloat16):
            self.model.loss(ids, ids)

    def run(self, steps: int) -> Iterator[torch.Tensor]:
        """Yields the loss of each step, still on the device."""
        for _ in range(steps):
            shape = (self.case.batch, self.case.tokens + 1)
            ids = torch.randint(self.case.vocabulary, shape, generator=self.generator)
            yield self.step(Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()), 1e-4).loss


def speed(name: str, mode: str, steps: int = 20) -> None:
    """Print tokens per second, milliseconds per step and the peak of the memory."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    case = CASES[name]
    training = Training(case, mode)
    losses = [loss.item() for loss in training.run(5)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark, loss in zip(marks[1:], training.run(steps), strict=True):  # noqa: B007 - the last one is printed
        mark.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in itertools.pairwise(marks))
    median, low, high = times[steps // 2], times[steps // 10], times[steps * 9 // 10]
    peak = torch.cuda.max_memory_allocated() / 2**30
    reserved = torch.cuda.max_memory_reserved() / 2**30
    rate = case.batch * case.tokens / median * 1e3
    size = sum(p.numel() for p in training.model.parameters()) / 1e6
    print(
        f"{name:12} {size:6.1f}M {training.step.mode[:40]:6} {rate:9,.0f} tokens/s "
        f"{median:7.2f} ms [{low:.2f}, {high:.2f}] "
        f"peak {peak:.2f} GiB (reserved {reserved:.2f}) loss {losses[0]:.4f} -> {loss.item():.4f}",
        flush=True,
    )


def profile(name: str, rows: int = 45) -> None:
    """Print the kernels of one step, the longest first, and how long the device was idle."""
    training = Training(CASES[name])
    for _ in training.run(5):
        pass
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as found:
        for _ in training.run(3):
            pass
        torch.cuda.synchronize()
    kernels = [(e.self_device_time_total / 3e3, e.count / 3, e.key) for e in found.key_averages()]
    total, count = sum(k[0] for k in kernels), sum(k[1] for k in kernels)
    print(f"{name}: {total:.2f} ms in {count:.0f} kernels a step")
    for milliseconds, times, key in sorted(kernels, reverse=True)[:rows]:
        print(f"  {milliseconds:8.3f} ms  x{times:5.0f}  {key[:110]}")


def first(name: str, most: int, compiled: str) -> None:
    """Print how long the first steps take in this process, and those of further architectures.

    compiled: "as met", or "ahead": a pass before the first step that launches nothing, with all kernels side by side.
    """
    torch.ones(1, device="cuda").sum().item()
    print(f"{name}: imports and CUDA {time.perf_counter() - STARTED:.1f} s", flush=True)
    for each in [name, *NEXT.get(name, ())][:most]:
        begin = time.perf_counter()
        training = Training({**CASES, **OTHERS}[each], drawn="on the CPU")  # As a run does it.
        torch.cuda.synchronize()
        built, seconds = time.perf_counter() - begin, []
        if compiled == "ahead":
            begin = time.perf_counter()
            training.compile_ahead()
            print(f"  {each:12} compiled ahead in {time.perf_counter() - begin:.2f} s", flush=True)
        for _ in range(4):
            begin = time.perf_counter()
            next(training.run(1)).item()
            seconds.append(time.perf_counter() - begin)
        text = ", ".join(f"{s:.3f}" for s in seconds)
        print(f"  {each:12} built in {built:.2f} s; steps 1 to 4 (the third records): {text} s", flush=True)
        del training
        torch.cuda.empty_cache()


def first_in_subprocess(name: str) -> None:
    """`first` with an empty Triton cache."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TRITON_CACHE_DIR": folder}
        subprocess.run([sys.executable, __file__, "first", name], env=environment, check=True, timeout=180)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["all", "speed", "profile", "first"], default="all")
    parser.add_argument("names", nargs="*", default=[])
    parser.add_argument("--eager", action="store_true", help="without a graph")
    parser.add_argument("--most", type=int, default=9, help="architectures of `first`")
    parser.add_argument("--compiled", choices=["as met", "ahead"], default="as met", help="kernels of `first`")
    options = parser.parse_args()
    if options.what == "first":
        first(options.names[0] if options.names else "trial", options.most, options.compiled)
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    for name in options.names or CASES:
        if options.what == "profile":
            profile(name)
        else:
            speed(name, "eager" if options.eager else "graph")
    if options.what == "all":
        print(PEERS, flush=True)
        for name in NEXT:
            first_in_subprocess(name)


if __name__ == "__main__":
    main()
