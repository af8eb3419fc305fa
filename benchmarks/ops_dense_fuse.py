"""dense_fuse against eager torch and torch.compile on one GPU, in bfloat16: time and share of the copy bandwidth.

    python benchmarks/ops_dense_fuse.py            # training sizes and search-size models
    python benchmarks/ops_dense_fuse.py --quick    # ours only, training sizes
    python benchmarks/ops_dense_fuse.py --sweep    # every launch choice, to check the rule
    python benchmarks/ops_dense_fuse.py --raw      # streams before silu, own read by a later layer, a bottleneck's step

GB/s count the necessary bytes: every input read once, every result written once. Nothing is timed unless right.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from bandwidth import Timing, copy_bandwidth, graphed, line, refuse_if_wrong
from torch import Tensor

from dense_lab_kernels.dense_fuse import Bottleneck, dense_fuse, triton

LARGE = [(16384, 768, 1), (16384, 768, 2), (16384, 3072, 1), (16384, 3072, 2)]  # rows, width, sources
SMALL = [(16384, 32, 1), (16384, 128, 2), (16384, 512, 2), (8192, 257, 1), (16384, 1000, 2)]
SETS = 4  # sets of inputs in rotation; small ones stay in the L2 cache, as they do in training


def draw(rows: int, width: int, m: int) -> tuple[Tensor, ...]:
    """own, m sources, gate, weight, upstream gradient."""
    streams = [torch.randn(rows, width, device="cuda", dtype=torch.bfloat16) for _ in range(m + 3)]
    upstream = streams.pop()
    weight = torch.randn(width, device="cuda", dtype=torch.bfloat16)
    return (*(x.requires_grad_() for x in (*streams, weight)), upstream)


def ours(*tensors: Tensor) -> Tensor:
    own, *sources, gate, weight = tensors
    return dense_fuse(own, sources, gate, weight, activation="silu", impl="triton")


def eager(*tensors: Tensor) -> Tensor:
    own, *sources, gate, weight = tensors
    fused = own + torch.nn.functional.silu(gate) * sum(sources)
    return torch.nn.functional.rms_norm(fused, weight.shape, weight, 1e-6)


def measure(function: Callable[..., Tensor], sets: list[tuple[Tensor, ...]]) -> tuple[Timing, Timing]:
    """Forward without a graph of gradients, and backward alone."""
    with torch.no_grad():
        forward = graphed([partial(function, *tensors[:-1]) for tensors in sets])
    outputs: list[Tensor] = []

    def backward(i: int) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs[i], sets[i][:-1], sets[i][-1], retain_graph=True)

    calls = [partial(backward, i) for i in range(len(sets))]
    return forward, graphed(calls, prepare=lambda: outputs.extend(function(*tensors[:-1]) for tensors in sets))


def necessary_bytes(rows: int, width: int, m: int) -> tuple[int, int]:
    """Forward: own, sources, gate, result. Backward: grad, own, sources, gate; d own, one d source, d gate."""
    return 2 * rows * width * (m + 3), 2 * rows * width * (m + 6)


def compare(shape: tuple[int, int, int], copy: float, peers: bool) -> None:
    sets = [draw(*shape) for _ in range(SETS)]
    own, *sources, gate, weight, _ = sets[0]
    arguments = {"own": own, "sources": tuple(sources), "gate": gate, "weight": weight}
    refuse_if_wrong("dense_fuse", arguments, {"activation": "silu"})
    forms = {"ours": ours}
    if peers:
        torch._dynamo.reset()
        forms |= {"eager torch": eager, "torch.compile": torch.compile(eager, dynamic=False)}
    sizes = necessary_bytes(*shape)
    for name, form in forms.items():
        for kind, timing, size in zip(("forward", "backward"), measure(form, sets), sizes, strict=True):
            print(line(f"{list(shape[:2])} m={shape[2]} {name} {kind}", timing, size, copy), flush=True)


def sweep(shape: tuple[int, int, int], copy: float) -> None:
    """Time launch choices one by one; the rule's own choice comes first."""
    _, width, m = shape
    sets = [draw(*shape) for _ in range(SETS)]
    block = triton.power_of_2(width)
    forward_rule, backward_rule = triton._forward_blocks, triton._backward_blocks
    choices = [forward_rule(width)]
    choices += [triton._Blocks(n, block, warps) for n in (1, 2, 4) for warps in (2, 4, 8, 16) if n * block <= 4096]
    for blocks in choices:
        triton._forward_blocks = lambda _, blocks=blocks: blocks
        with torch.no_grad():
            timing = graphed([partial(ours, *tensors[:-1]) for tensors in sets], replays=20)
        print(line(f"{shape} forward {tuple(blocks[:3])}", timing, necessary_bytes(*shape)[0], copy), flush=True)
    triton._forward_blocks = forward_rule
    choices = [backward_rule(width, 2 * width * (m + 3), "shared")]
    if block <= 1024:
        for rows, warps, programs, registers in (
            (1, 4, 3, None),
            (1, 4, 4, None),
            (1, 4, 5, 96),
            (1, 4, 6, 80),
            (1, 2, 6, None),
            (1, 2, 8, 128),
            (2, 8, 2, None),
            (2, 8, 3, 80),
            (2, 4, 2, None),
            (2, 4, 3, 168),
        ):
            choices += [triton._Blocks(rows, block, warps, stages, programs, registers) for stages in (3, 4)]
    else:
        for warps, programs, registers in ((4, 2, None), (8, 1, None), (8, 2, 128), (16, 1, None), (16, 1, 128)):
            choices += [triton._Blocks(1, block, warps, stages, programs, registers) for stages in (3, 4)]
    for blocks in choices:
        triton._backward_blocks = lambda *_, blocks=blocks: blocks
        timing = measure(ours, sets)[1]
        print(line(f"{shape} backward {tuple(blocks)}", timing, necessary_bytes(*shape)[1], copy), flush=True)
    triton._backward_blocks = backward_rule


RAW = {"activation": "silu", "stream_activation": "silu", "impl": "triton"}


def raw(width: int, copy: float, choices: bool) -> None:
    """Time the forms that the published model runs: 16384 rows, one source; with `choices` launch choices too."""
    sets = [draw(16384, width, 1) for _ in range(SETS)]
    forward_size, backward_size = necessary_bytes(16384, width, 1)

    def fused(own: Tensor, source: Tensor, gate: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return dense_fuse(own, (source,), gate, weight, returning="fused and own", **RAW)

    with torch.no_grad():
        timing = graphed([partial(fused, *tensors[:-1]) for tensors in sets])
    print(line(f"raw W {width} forward", timing, forward_size, copy), flush=True)
    outputs: list[tuple[Tensor, Tensor]] = []

    def backward(i: int) -> tuple[Tensor, ...]:
        # The gradient of own as later layers read it is one more tensor read.
        return torch.autograd.grad(outputs[i], sets[i][:-1], (sets[i][-1], sets[i][1].detach()), retain_graph=True)

    rule = triton._backward_blocks
    block = triton.power_of_2(width)
    others = [(4, 3, 3, 160), (4, 3, 4, 128), (4, 4, 4, 128), (4, 2, 4, 128), (4, 3, 5, 96), (8, 3, 2, 128)]
    if block > 1024:
        others = [(8, 3, 1, None), (8, 4, 1, None), (8, 2, 1, None), (16, 3, 1, 128), (16, 2, 1, 128), (8, 1, 2, 128)]
    tried = [None] + [triton._Blocks(1, block, w, s, p, r) for w, s, p, r in others if choices]
    for blocks in tried:
        triton._backward_blocks = rule if blocks is None else lambda *_, blocks=blocks: blocks
        outputs.clear()
        calls = [partial(backward, i) for i in range(len(sets))]
        prepare = partial(outputs.extend, (fused(*tensors[:-1]) for tensors in sets))
        timing = graphed(calls, prepare=prepare, replays=20)
        print(
            line(
                f"raw W {width} backward {blocks and tuple(blocks[2:])}",
                timing,
                backward_size + 2 * 16384 * width,
                copy,
            )
        )
    triton._backward_blocks = rule


def raw_step(width: int, copy: float) -> None:
    """Time six rows without gradients, the second map of a bottleneck of 48 included."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((6, width), (6, width), (6, 48), (width, 48), (width,))
    low = {"generator": generator, "device": "cuda", "dtype": torch.bfloat16}
    sets = [[torch.randn(shape, **low) for shape in shapes] for _ in range(SETS)]
    calls = [partial(_step, *tensors) for tensors in sets]
    print(line(f"raw W {width} step of 6 rows", graphed(calls), 2 * width * 48, copy), flush=True)


def _step(own: Tensor, source: Tensor, hidden: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    return dense_fuse(own, (source,), Bottleneck(hidden, second), weight, **RAW)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--raw", action="store_true")
    options = parser.parse_args()
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {copy / 1e9:.0f} GB/s")
    if options.raw:
        for width in (3072, 768):
            raw(width, copy, options.sweep)
            raw_step(width, copy)
        return
    for shape in LARGE if options.quick or options.sweep else LARGE + SMALL:
        if options.sweep:
            sweep(shape, copy)
        else:
            compare(shape, copy, peers=not options.quick)


if __name__ == "__main__":
    main()
