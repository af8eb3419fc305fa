"""Do kernels train as references do? Loss curves with both from the same seed, beside those of other seeds.

    python benchmarks/loss_curves.py                            # 200 steps each on a GPU, about a minute
    python benchmarks/loss_curves.py --device cpu --steps 20    # the compiled CPU loops
    python benchmarks/loss_curves.py --draw runs/bench/loss_curves.json docs/figures/loss_curves.svg

Each core, plain and with dense connections, is trained by what "auto" chooses and by `kernels: {every operation:
reference}`, with the same weights, data and precision. Two further seeds (of weights and data) say what noise is; one
run with kernels whose weights begin half a rounding away says what rounding alone does in so many steps. Text: the
Python source of the standard library, in bytes. The exit code is 1 when a difference exceeds the noise of seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dense_lab import registry
from dense_lab.model import ModelSpec
from dense_lab.study import TrainSpec
from dense_lab.training.device import Place, choose_place
from dense_lab.training.evaluate import evaluate
from dense_lab.training.graph import build_step
from dense_lab.training.optimizer import build_optimizer
from dense_lab.training.schedule import learning_rate

CORES = ("retnet", "gau_retnet", "mamba")
DENSE: dict[str, Any] = {"plain": "none", "dense": {"kind": "densessm", "span": 1}}
SEEDS = (0, 1, 2)
BATCH, TOKENS, VALID = 16, 128, 32768


class Curve(NamedTuple):
    """One run."""

    arm: str
    seed: int
    by: str
    """ "kernels", "references" or "nudged"."""
    ran: str
    train: list[float]
    """Loss of every step, nats per byte."""
    valid: float
    """Loss on the same validation text for all, at the end."""
    seconds: float


def run(corpus: Any, arm: str, seed: int, by: str, place: Place, steps: int) -> Curve:
    """Train one model; nothing is written."""
    begin = time.perf_counter()
    core, kind = arm.split()
    spec = ModelSpec.model_validate({"width": 64, "depth": 3, "core": core, "dense": DENSE[kind]})
    model = spec.build(corpus.vocab_size).initialise(seed).to(place.device)
    if by == "references":
        model.kernels = {name: "reference" for library in registry.default().kernels for name in library.OPERATIONS}
    if by == "nudged":
        nudge(model, torch.finfo(place.dtype).eps / 2)
    train = TrainSpec(lr=3e-3)
    step = build_step(model, build_optimizer(model, train), place, BATCH, train.clip)
    batches = corpus.train_batches(BATCH, seed, skip=0)
    losses = [step(next(batches), learning_rate(train, i + 1, steps)).loss for i in range(steps)]
    valid = evaluate(model, corpus, "valid", BATCH, VALID if steps >= 100 else 4096, place)["valid/loss"]
    ran = ",".join(sorted(set(model.ran.values())))
    return Curve(arm, seed, by, ran, torch.stack(losses).tolist(), valid, time.perf_counter() - begin)


@torch.no_grad()
def nudge(model: torch.nn.Module, size: float) -> None:
    """Change every weight by about `size` of itself."""
    for parameter in model.parameters():
        parameter.mul_(1 + size * torch.randn_like(parameter))


def compare(curves: list[Curve]) -> bool:
    """Print the table; whether every difference lies within the noise of seeds."""
    print(f"\n{'valid/loss':18}{'kernels':>9}{'references':>12}{'difference':>12}{'rounding':>10}{'seeds':>9}")
    good = True
    for arm in dict.fromkeys(curve.arm for curve in curves):
        mine = [curve for curve in curves if curve.arm == arm]
        kernels = [curve for curve in mine if curve.by == "kernels"]
        reference, nudged = (next(c for c in mine if c.by == by) for by in ("references", "nudged"))
        first, spread = kernels[0], statistics.stdev(curve.valid for curve in kernels)
        difference = first.valid - reference.valid
        apart = max(abs(a - b) for a, b in zip(smooth(first.train), smooth(reference.train), strict=True))
        noise = statistics.mean(map(statistics.stdev, zip(*(smooth(c.train) for c in kernels), strict=True)))
        good &= abs(difference) <= spread
        print(
            f"{arm:18}{first.valid:9.4f}{reference.valid:12.4f}{difference:+12.5f}{first.valid - nudged.valid:+10.5f}"
            f"{spread:9.4f}  {'within' if abs(difference) <= spread else 'BEYOND'}; on the way at most {apart:.4f}, "
            f"seeds {noise:.4f}; ran {first.ran}"
        )
    print("nats per byte; rounding: kernels - kernels from nudged weights; seeds: standard deviation of valid/loss")
    return good


def smooth(values: list[float], width: int = 10) -> list[float]:
    """Means of `width` neighbouring steps."""
    return [statistics.mean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def draw(curves: list[Curve], path: Path) -> None:
    """One panel for each arm."""
    from matplotlib.figure import Figure

    arms = list(dict.fromkeys(curve.arm for curve in curves))
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    rows = min(2, len(arms))
    panels = figure.subplots(rows, len(arms) // rows, sharex=True, sharey=True, squeeze=False)
    for axes, arm in zip(panels.T.flat, arms, strict=True):
        for curve in (c for c in curves if c.arm == arm and c.by != "nudged"):
            style: dict[str, Any] = {
                "color": "#bbbbbb",
                "linewidth": 0.8,
                "label": "other seeds" if curve.seed == 1 else None,
            }
            if curve.seed == 0:
                style = {"color": "#0072b2", "linewidth": 2.2, "alpha": 0.6, "label": "kernels"}
            if curve.by == "references":
                style = {"color": "#d55e00", "linewidth": 1, "linestyle": "--", "label": "references"}
            axes.plot(smooth(curve.train), **style)
        axes.set_title(arm, fontsize=10)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("train/loss, nats per byte (mean of 10 steps)", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)


def train_all(device: str, steps: int) -> Iterable[Curve]:
    """Every arm: all seeds with kernels, the first with references."""
    place = choose_place(device, "auto")
    name = torch.cuda.get_device_name() if place.device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {place.dtype}, {steps} steps of B{BATCH} T{TOKENS}", flush=True)
    data = registry.default().find("data", "python_source")
    corpus = data.model_validate({"tokenizer": "byte", "seq_len": TOKENS}).prepare()
    for arm in (f"{core} {kind}" for core in CORES for kind in DENSE):
        for seed, by in (*((seed, "kernels") for seed in SEEDS), (0, "nudged"), (0, "references")):
            curve = run(corpus, arm, seed, by, place, steps)
            print(f"{arm:18} seed {seed} {by:10} valid/loss {curve.valid:.4f}  {curve.seconds:.1f} s", flush=True)
            yield curve


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/loss_curves.json"))
    parser.add_argument("--draw", nargs=2, type=Path, metavar=("JSON", "PICTURE"), help="draw what was measured")
    options = parser.parse_args()
    if options.draw:
        curves = [Curve(**curve) for curve in json.loads(options.draw[0].read_text())]
        draw(curves, options.draw[1])
        return 0 if compare(curves) else 1
    curves = list(train_all(options.device, options.steps))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps([curve._asdict() for curve in curves]))
    return 0 if compare(curves) else 1


if __name__ == "__main__":
    sys.exit(main())
