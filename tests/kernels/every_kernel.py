"""Call every Triton kernel once, forward and backward, with sizes beside every tile: what `sanitize.sh` watches.

Results are judged elsewhere (`test_triton_*.py`); here only each read and write counts, so shapes are tiny.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from dense_lab_kernels.add_rms_norm import add_rms_norm
from dense_lab_kernels.causal_conv1d import causal_conv1d
from dense_lab_kernels.decay_attention import decay_attention
from dense_lab_kernels.dense_fuse import dense_fuse
from dense_lab_kernels.linear_cross_entropy import linear_cross_entropy
from dense_lab_kernels.rms_norm import rms_norm
from dense_lab_kernels.rotate import rotate
from dense_lab_kernels.selective_scan import ScanSource, selective_scan

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DTYPE = torch.float16 if DEVICE == "cpu" else torch.bfloat16  # the interpreter computes bf16 wrongly


def draw(*size: int, dtype: torch.dtype = DTYPE) -> Tensor:
    """A leaf that wants a gradient."""
    return torch.randn(*size, device=DEVICE, dtype=dtype).requires_grad_()


def decays(tokens: int, heads: int) -> Tensor:
    return -torch.rand(1, tokens, heads, device=DEVICE)


def attention(tokens: int, groups: int, heads: int, sizes: tuple[int, int], decay: Tensor, start: bool) -> object:
    key_size, value_size = sizes
    state = draw(1, heads, key_size, value_size, dtype=torch.float32) if start else None
    q, k, v = (draw(1, tokens, n, size) for n, size in ((groups, key_size), (groups, key_size), (heads, value_size)))
    return decay_attention(q, k, v, decay, initial_state=state, impl="triton")


def scan(tokens: int, channels: int, states: int, sources: int, site: str) -> object:
    def recurrence() -> tuple[Tensor, ...]:
        rate = -torch.rand(channels, states, device=DEVICE)
        return draw(1, tokens, channels), draw(1, tokens, channels), rate.requires_grad_(), draw(1, tokens, 1, states)

    read, skip, bias = draw(1, tokens, 1, states), draw(channels), draw(channels)
    others = [ScanSource(*recurrence(), bias) for _ in range(sources)]
    gates = [draw(1, tokens, channels) for _ in others]
    z, state = draw(1, tokens, channels), draw(1, channels, states, dtype=torch.float32)
    given = {"initial_state": state, "sources": others, "gates": gates, "site": site}
    return selective_scan(*recurrence(), read, skip, z, bias, **given, impl="triton")


def convolution(tokens: int, channels: int, width: int) -> object:
    arguments = draw(2, tokens, channels), draw(channels, width), draw(channels)
    return causal_conv1d(*arguments, activation="silu", initial_state=draw(2, channels, width - 1), impl="triton")


def fusion(rows: int, width: int, m: int, gates: str, norm: bool) -> object:
    sources = tuple(draw(rows, width) for _ in range(m))
    gate = {"none": None, "shared": draw(rows, width), "each": tuple(draw(rows, width) for _ in sources)}[gates]
    weight = draw(width) if norm else None
    return dense_fuse(draw(rows, width), sources, gate, weight, activation="silu", impl="triton")


def cross_entropy(rows: int, width: int, vocabulary: int) -> object:
    targets = torch.randint(vocabulary, (rows,), device=DEVICE)
    targets[0] = -100
    return linear_cross_entropy(draw(rows, width), draw(vocabulary, width), targets, impl="triton")


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call of every case."""
    constant = -torch.rand(2, device=DEVICE)
    yield "decay attention, constant", partial(attention, 77, 2, 2, (20, 33), constant, start=True)
    yield (
        "decay attention, per token",
        partial(attention, 77, 2, 2, (33, 20), decays(77, 2).requires_grad_(), start=True),
    )
    yield (
        "decay attention, shared keys",
        partial(attention, 77, 1, 2, (17, 40), decays(77, 2).requires_grad_(), start=False),
    )
    if DEVICE == "cuda":
        yield "decay attention, wide", partial(attention, 300, 1, 1, (130, 1030), constant[:1], start=True)
    for sources, site in ((0, "readout"), (1, "readout"), (1, "carried")):
        yield f"selective scan, {sources} sources, {site}", partial(scan, 13, 37, 5, sources, site)
    if DEVICE == "cuda":
        for sources, site in ((0, "readout"), (1, "readout"), (1, "carried")):
            yield f"selective scan in segments, {sources} sources, {site}", partial(scan, 150, 37, 5, sources, site)
    for tokens, channels, width in ((37, 33, 4), (1, 70, 2)):
        yield f"convolution of {tokens} tokens", partial(convolution, tokens, channels, width)
    for gates, norm in (("none", True), ("shared", True), ("each", True), ("each", False)):
        yield f"fusion, gates {gates}", partial(fusion, 9, 257, 2, gates, norm)
    yield "RMSNorm", lambda: rms_norm(draw(9, 257), draw(257), draw(9, 257), activation="silu", impl="triton")
    seed = torch.tensor([1, 2], device=DEVICE)
    x, y, weight = draw(9, 257, dtype=torch.float32), draw(9, 257), draw(257, dtype=torch.float32)
    yield "sum and norm", lambda: tuple(add_rms_norm(x, y, weight, dropout=0.5, seed=seed, impl="triton"))
    yield "rotation", lambda: rotate(draw(1, 9, 3, 34), normaliser="retention", activation="silu", impl="triton")
    yield "cross-entropy", partial(cross_entropy, 9, 24, 101)


def main() -> None:
    begin = time.perf_counter()
    for name, call in calls():
        found = call()
        results = [x for x in (found if isinstance(found, tuple) else (found,)) if isinstance(x, Tensor)]
        torch.autograd.backward(
            [x for x in results if x.requires_grad], [torch.ones_like(x) for x in results if x.requires_grad]
        )
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        print(f"{time.perf_counter() - begin:6.1f} s  {name}", flush=True)
    tokens = [draw(2, 1, 2, 33).detach() for _ in range(3)]
    state = torch.randn(2, 2, 33, 33, device=DEVICE)
    for given in (None, state):
        decay_attention(*tokens, -torch.rand(2, device=DEVICE), initial_state=given, impl="triton")
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print(f"{time.perf_counter() - begin:6.1f} s  one token")


if __name__ == "__main__":
    main()
