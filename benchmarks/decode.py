"""Decoding DenseRetNet-350M on one GPU: steps per second of a replayed step, time of a prompt, kernels of a step.

    python benchmarks/decode.py            # m = 0, 1, 2 at batch 6, and the prompts
    python benchmarks/decode.py --profile  # kernels of one step at m = 1 too

Weights and streams in bfloat16, states in float32. Steps: median [10 %, 90 %] of single replays between events.
"""

from __future__ import annotations

import argparse
import itertools
import time
from typing import Literal

import torch

from dense_lab.generation import Decoder
from dense_lab.model import LanguageModel, ModelSpec
from dense_lab.presets import expand

MODELS = {
    0: {"preset": "gau-retnet-350m"},
    1: {"preset": "denseretnet-350m"},
    2: {"preset": "denseretnet-350m", "dense": {"span": 2}},
}
PEERS = """official code, float16, H200: m=1 56.7 steps/s, m=2 39.9 steps/s at batch 6; prompt of 512 tokens 10.6 s
floor by bytes: weights once and states twice, about 1.6 GB a step at batch 6"""


def build(span: int) -> LanguageModel:
    """The published model with `span` sources, in bfloat16."""
    spec = ModelSpec.model_validate(expand(MODELS[span]))
    with torch.device("cuda"):  # Drawn there: a CPU takes seconds.
        model = spec.build(32000).initialise(0)
    return model.to(torch.bfloat16).eval()


def prompt(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(32000, (batch, tokens), generator=torch.Generator().manual_seed(0)).cuda()


def steps(decoder: Decoder, count: int = 200) -> tuple[float, float, float]:
    """Milliseconds of a step: median, 10 %, 90 %."""
    for _ in range(5):
        decoder.advance()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        decoder.advance()
        mark.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in itertools.pairwise(marks))
    return times[count // 2], times[count // 10], times[count * 9 // 10]


def prefill(model: LanguageModel, batch: int, tokens: int, how: Literal["eager", "recorded"]) -> list[float]:
    """Milliseconds from a prompt to its first new token, six times; the first compiles, the second may record."""
    ids, found = prompt(batch, tokens), []
    for _ in range(6):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        Decoder(model, ids, prompt=how).token.tolist()
        found.append((time.perf_counter() - begin) * 1e3)
    return found


def agreement(model: LanguageModel, batch: int = 2, tokens: int = 40) -> float:
    """How far the token chosen by replayed steps is below the largest logit of one pass, over the largest logit."""
    decoder, ids = Decoder(model, prompt(batch, tokens)), prompt(batch, tokens)
    for _ in range(8):
        ids = torch.cat([ids, decoder.token[:, None]], 1)
        decoder.advance()
    with torch.no_grad():
        whole = model(ids)[:, -1].float()
        last = whole.gather(1, decoder.token[:, None])[:, 0]
    return ((whole.max(-1).values - last) / whole.abs().max()).max().item()


def profile(decoder: Decoder) -> None:
    """Print the kernels of one replayed step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(10):
            decoder.advance()
        torch.cuda.synchronize()
    rows = [(e.self_device_time_total / 10, e.count / 10, e.key) for e in found.key_averages()]
    print(f"{sum(r[0] for r in rows):.0f} us in {sum(r[1] for r in rows):.0f} kernels a step")
    for microseconds, count, key in sorted(rows, reverse=True)[:30]:
        print(f"  {microseconds:8.1f} us  x{count:4.0f}  {key[:110]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--spans", type=int, nargs="+", default=list(MODELS), choices=MODELS, help="which m")
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    for span in options.spans:
        model = build(span)
        decoder = Decoder(model, prompt(6, 64))
        median, low, high = steps(decoder)
        print(
            f"m={span} batch 6: {1e3 / median:7.0f} steps/s  {median:.3f} ms [{low:.3f}, {high:.3f}]  {decoder.mode}; "
            f"chosen token below the largest logit by {agreement(model):.1e} of it",
            flush=True,
        )
        if span == 1:
            for batch, how in itertools.product((1, 6), ("eager", "recorded")):
                times = prefill(model, batch, 512, how)
                text = ", ".join(f"{ms:.1f}" for ms in times)
                print(f"m=1 prompt of 512, batch {batch}, {how}: {min(times):.1f} ms of {text}", flush=True)
            if options.profile:
                profile(decoder)
        del model, decoder
        torch.cuda.empty_cache()
    print(PEERS)


if __name__ == "__main__":
    main()
