"""Training speed on a CPU: our cores, plain and dense, beside transformers' Mamba and Llama, in one run.

    python benchmarks/cpu_training.py [--rounds 15] [--threads 2] [--clock wall]

A step is forward, loss, backward and AdamW. A round is one step of every model, each second round in reverse (A B C C B
A ...), a dense model beside its plain twin, so that whatever else the machine does meets all of them and its drift
cancels. A ratio is taken within each round; what is judged is the median of the rounds' ratios, which stands between
their quarters. The exit code is 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn

from dense_lab.model import ModelSpec

WIDTH, DEPTH, VOCABULARY, BATCH, TOKENS = 128, 4, 256, 8, 256
CORES = ("retnet", "gau_retnet", "mamba")
THEIR_MAMBA, LLAMA = "transformers Mamba", "transformers Llama"
BARS = [
    ("mamba", THEIR_MAMBA, 60.0),
    ("mamba", LLAMA, 0.3),
    ("retnet", LLAMA, 0.7),
    *((f"{core} dense m=2", core, 0.85) for core in CORES),
]
"""(model, over which, at least this ratio of tokens/s)."""

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Step = Callable[[], None]


def our_step(core: str, span: int) -> tuple[nn.Module, Step]:
    """One of our models with the default transition and fusion at all its default sites."""
    spec = ModelSpec.model_validate({"width": WIDTH, "depth": DEPTH, "core": core, "dense": {"span": span}})
    model = spec.build(VOCABULARY).initialise(0)
    return model, training_step(model, lambda ids: model.loss(ids[:, :-1], ids[:, 1:]))


def their_step(kind: str) -> tuple[nn.Module, Step]:
    """transformers' model of the same width, depth and vocabulary, as its configuration class has it otherwise."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "use_cache": False}
    torch.manual_seed(0)
    if kind == THEIR_MAMBA:
        model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))
    else:
        # A SwiGLU layer of 8/3 the width, as Llama has it at every size.
        config = transformers.LlamaConfig(**sizes, intermediate_size=344, num_attention_heads=4)
        model = transformers.LlamaForCausalLM(config)
    return model, training_step(model, lambda ids: model(input_ids=ids[:, :-1], labels=ids[:, :-1]).loss)


def training_step(model: nn.Module, loss_of: Callable[[Tensor], Tensor]) -> Step:
    """Forward, loss, backward and AdamW on BATCH sequences of TOKENS."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids = torch.randint(VOCABULARY, (BATCH, TOKENS + 1), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        loss_of(ids).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def measure(
    steps: dict[str, Step], rounds: int, rare: set[str], clock: Callable[[], float]
) -> dict[str, list[float | None]]:
    """Seconds of one step by model and round; the `rare` (slow) ones are measured in every eighth round only."""
    seconds: dict[str, list[float | None]] = {name: [] for name in steps}
    for name, step in steps.items():  # Compile, allocate, warm up.
        for _ in range(1 if name in rare else 3):
            step()
    for round_ in range(rounds):
        for name, step in list(steps.items())[:: -1 if round_ % 2 else 1]:
            if name in rare and round_ % 8:
                seconds[name].append(None)
                continue
            start = clock()
            step()
            seconds[name].append(clock() - start)
    return seconds


def ratios(seconds: dict[str, list[float | None]], model: str, over: str) -> list[float]:
    """tokens/s of `model` over that of `over`, round by round."""
    return [b / a for a, b in zip(seconds[model], seconds[over], strict=True) if a and b]


def report(models: dict[str, nn.Module], seconds: dict[str, list[float | None]]) -> bool:
    """Print the figures; whether all bars hold."""
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}")
    sizes = f"width {WIDTH}, depth {DEPTH}, vocabulary {VOCABULARY}, B{BATCH} x T{TOKENS}"
    print(f"{sizes}, fp32, threads {torch.get_num_threads()}")
    print(f"\n{'model':24}{'parameters':>12}{'tokens/s':>12}{'10 % to 90 %':>20}{'best':>10}{'rounds':>8}")
    for name, model in models.items():
        speeds = sorted(BATCH * TOKENS / t for t in seconds[name] if t)
        low, high = speeds[len(speeds) // 10], speeds[-1 - len(speeds) // 10]
        parameters = sum(p.numel() for p in model.parameters())
        middle, spread = statistics.median(speeds), f"{low:,.0f} to {high:,.0f}"
        print(f"{name:24}{parameters:12,}{middle:12,.0f}{spread:>20}{speeds[-1]:10,.0f}{len(speeds):8}")
    print(f"\n{'ratio of tokens/s':48}{'median':>8}{'25 % to 75 %':>16}{'of bests':>10}{'bar':>8}")
    good = True
    for model, over, bar in BARS:
        found = sorted(ratios(seconds, model, over))
        median, quarter = statistics.median(found), len(found) // 4
        spread = f"{found[quarter]:.2f} to {found[-1 - quarter]:.2f}"
        best = min(t for t in seconds[over] if t) / min(t for t in seconds[model] if t)
        good &= median >= bar
        verdict = "holds" if median >= bar else "MISSED"
        print(f"{f'{model} / {over}':48}{median:8.2f}{spread:>16}{best:10.2f}{bar:8.2f}  {verdict}")
    return good


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    help_ = "wall seconds, or processor seconds for a machine shared with others (use one thread then)"
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help=help_)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    built = {}
    for core in CORES:
        built[core] = our_step(core, 0)
        built[f"{core} dense m=2"] = our_step(core, 2)
    built |= {LLAMA: their_step(LLAMA), THEIR_MAMBA: their_step(THEIR_MAMBA)}
    steps = {name: step for name, (_, step) in built.items()}
    seconds = measure(steps, options.rounds, {THEIR_MAMBA}, CLOCKS[options.clock])
    print(f"seconds of the {options.clock} clock")
    return 0 if report({name: model for name, (model, _) in built.items()}, seconds) else 1


if __name__ == "__main__":
    sys.exit(main())
