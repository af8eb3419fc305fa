"""causal_conv1d against eager torch and torch.compile on one GPU, in bfloat16: time and share of the copy bandwidth.

    python benchmarks/ops_causal_conv1d.py            # training sizes and one decoding step
    python benchmarks/ops_causal_conv1d.py --quick    # ours only
    python benchmarks/ops_causal_conv1d.py --sweep    # every launch choice, to check the rule

GB/s count the necessary bytes: every input read once, every result written once. Nothing is timed unless right.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from bandwidth import Timing, copy_bandwidth, graphed, line, refuse_if_wrong
from torch import Tensor

from dense_lab_kernels.causal_conv1d import causal_conv1d, triton

SHAPES = [(8, 2048, 2048), (8, 2048, 4096), (16, 512, 256), (6, 1, 4096)]  # batch, tokens, channels
WIDTH = 4
SETS = 4


def draw(batch: int, tokens: int, channels: int) -> tuple[Tensor, ...]:
    """x, weight, bias, upstream gradient."""
    make = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    x, upstream = make(batch, tokens, channels), make(batch, tokens, channels)
    return x.requires_grad_(), (make(channels, WIDTH) / 2).requires_grad_(), make(channels).requires_grad_(), upstream


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return causal_conv1d(x, weight, bias, activation="silu", impl="triton").output


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As the Mamba family writes it: convolution in [B, D, T], cut to the first T."""
    y = torch.nn.functional.conv1d(x.mT, weight[:, None], bias, padding=WIDTH - 1, groups=x.shape[2])
    return torch.nn.functional.silu(y[..., : x.shape[1]]).mT


def shifted(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As a sum of shifted copies, which torch.compile fuses best."""
    padded = torch.nn.functional.pad(x, (0, 0, WIDTH - 1, 0))
    y = bias + sum(padded[:, j : j + x.shape[1]] * weight[:, j] for j in range(WIDTH))
    return torch.nn.functional.silu(y)


def measure(function: Callable[..., Tensor], sets: list[tuple[Tensor, ...]]) -> tuple[Timing, Timing]:
    """Forward without a graph of gradients, and backward alone."""
    with torch.no_grad():
        forward = graphed([partial(function, *tensors[:-1]) for tensors in sets])
    outputs: list[Tensor] = []

    def backward(i: int) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs[i], sets[i][:-1], sets[i][-1], retain_graph=True)

    calls = [partial(backward, i) for i in range(len(sets))]
    return forward, graphed(calls, prepare=lambda: outputs.extend(function(*tensors[:-1]) for tensors in sets))


def compare(shape: tuple[int, int, int], copy: float, peers: bool) -> None:
    sets = [draw(*shape) for _ in range(SETS)]
    arguments = dict(zip(("x", "weight", "bias"), sets[0], strict=False))
    refuse_if_wrong("causal_conv1d", arguments, {"activation": "silu"})
    forms = {"ours": ours}
    if peers:
        torch._dynamo.reset()
        forms |= {"eager torch": eager, "torch.compile": torch.compile(shifted, dynamic=False)}
    size = 2 * shape[0] * shape[1] * shape[2]
    for name, form in forms.items():
        for kind, timing, passes in zip(("forward", "backward"), measure(form, sets), (2, 3), strict=True):
            print(line(f"{list(shape)} {name} {kind}", timing, passes * size, copy), flush=True)


def sweep(shape: tuple[int, int, int], copy: float) -> None:
    """Time launch choices one by one; the rule's own choice comes first."""
    sets, rule, size = [draw(*shape) for _ in range(SETS)], triton._blocks, 2 * shape[0] * shape[1] * shape[2]
    choices = [None]
    for block in (64, 128, 256):
        choices += [triton._Blocks(block, unroll, n) for unroll in (4, 8, 16) for n in (32, 64, 128, 256)]
    for blocks in choices:
        if blocks is not None:
            triton._blocks = lambda *given, blocks=blocks: blocks._replace(
                segment=blocks.segment - (given[2] if len(given) > 2 else 0)
            )
        for kind, timing, passes in zip(("forward", "backward"), measure(ours, sets), (2, 3), strict=True):
            print(line(f"{list(shape)} {kind} {blocks and tuple(blocks)}", timing, passes * size, copy), flush=True)
    triton._blocks = rule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {copy / 1e9:.0f} GB/s")
    for shape in SHAPES[:1] if options.sweep else SHAPES:
        if options.sweep:
            sweep(shape, copy)
        else:
            compare(shape, copy, peers=not options.quick)


if __name__ == "__main__":
    main()
