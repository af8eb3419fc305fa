"""Cost of long sequences on one GPU: time and memory per token from 1k to 128k tokens must not grow.

    python benchmarks/lengths.py            # three operations and two whole models, batch 1
    python benchmarks/lengths.py --quick    # every other length

Forward + backward, bfloat16, eager, median [10 %, 90 %] of events. Memory is the peak of a step over its inputs and
weights. Beside it are the bytes of the state that a sequence leaves, which must stay the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from bandwidth import eager
from torch import Tensor

from dense_lab.model import ModelSpec
from dense_lab_kernels.decay_attention import decay_attention
from dense_lab_kernels.selective_scan import selective_scan

LENGTHS = tuple(2**n for n in range(10, 18))
VOCABULARY = 256


class Step(NamedTuple):
    """A forward and backward at one length."""

    run: Callable[[], Any]
    state_bytes: int


def attention(key_size: int, value_size: int, tokens: int) -> Step:
    from ops_decay_attention import inputs

    tensors = inputs((1, tokens, 2, 2, key_size, value_size, "constant"))
    leaves = [x for x in tensors if x.requires_grad]
    upstream = torch.randn_like(tensors[2])
    with torch.no_grad():
        state = decay_attention(*tensors).final_state.nbytes
    return Step(lambda: torch.autograd.grad(decay_attention(*tensors).output, leaves, upstream), state)


def scan(tokens: int) -> Step:
    from ops_selective_scan import draw, leaves_of

    inputs = draw(1, 1024, tokens, 16)
    upstream = torch.randn_like(inputs["u"])
    with torch.no_grad():
        state = selective_scan(**inputs).final_state.nbytes
    return Step(lambda: torch.autograd.grad(selective_scan(**inputs).output, leaves_of(inputs), upstream), state)


def model(core: str, tokens: int) -> Step:
    spec = {"width": 256, "depth": 4, "core": core, "dense": {"kind": "densessm", "span": 1}}
    built = ModelSpec.model_validate(spec).build(VOCABULARY).initialise(0).to("cuda")
    ids = torch.randint(VOCABULARY, (1, tokens + 1), device="cuda")

    def run() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = built.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        built.zero_grad()

    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        states = torch.utils._pytree.tree_leaves(built.features(ids[:, :-1])[1])
    return Step(run, sum(x.nbytes for x in states if isinstance(x, Tensor)))


WORK: dict[str, Callable[[int], Step]] = {
    "decay attention H2 K384 V1536": partial(attention, 384, 1536),
    "decay attention H2 K64 V64": partial(attention, 64, 64),
    "selective scan D1024 N16": scan,
    "retnet, width 256, depth 4, m = 1": partial(model, "retnet"),
    "mamba, width 256, depth 4, m = 1": partial(model, "mamba"),
}


def measure(name: str, tokens: int) -> tuple[float, float]:
    """Print one row; returns ns and bytes per token."""
    torch.cuda.empty_cache()
    step = WORK[name](tokens)
    step.run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step.run()
    peak = torch.cuda.max_memory_allocated() - before
    median, low, high = eager([step.run], rounds=9, count=1)
    print(
        f"{name:34} T {tokens:6}  {median:8.3f} ms [{low:.3f}, {high:.3f}]  {1e6 * median / tokens:7.1f} ns/token  "
        f"{peak / 2**20:8.1f} MiB  {peak / tokens:8.0f} B/token  state {step.state_bytes:,} B",
        flush=True,
    )
    return 1e6 * median / tokens, peak / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    for name in WORK:
        lengths = LENGTHS[::-2][::-1] if options.quick else LENGTHS
        found = {tokens: measure(name, tokens) for tokens in lengths}
        # Below 8k tokens launches and an idle chip decide, not the work.
        busy = min(tokens for tokens in found if tokens >= 2**13)
        time, memory = (long / short for long, short in zip(found[2**17], found[busy], strict=True))
        print(f"    per token, 128k over {busy // 1024}k: time x {time:.2f}, memory x {memory:.2f}", flush=True)


if __name__ == "__main__":
    main()
