"""Do kernels train as references do? Loss curves with both from the same seed, beside those of other seeds.

    python benchmarks/loss_curves.py                            # 200 steps each on a GPU, two to three minutes
    python benchmarks/loss_curves.py --twins 1 --references 1   # a minute
    python benchmarks/loss_curves.py --device cpu --steps 20    # the compiled CPU loops
    python benchmarks/loss_curves.py --add FILE.json --arms "retnet dense" --references 4      # more of some arms
    python benchmarks/loss_curves.py --draw runs/bench/loss_curves.json docs/figures/loss_curves.svg

Each core, plain and with dense connections, is trained by what "auto" chooses and by `kernels: {every operation:
reference}`, with the same weights, data and precision. Other seeds (of weights and data) say what noise is. Twins
begin from the first seed's weights, half a rounding away: they say what rounding alone does in so many steps, and
their mean is compared. References in float32 (`--exact`) say which of two means that differ is the nearer one. Text:
the Python source of the standard library, in bytes. The exit code is 1 when kernels and references differ by more than
the standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
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
ARMS = [f"{core} {kind}" for core in CORES for kind in DENSE]
VALID = 32768


class Size(NamedTuple):
    """Sequences, their length, and steps."""

    batch: int
    tokens: int
    steps: int


class Curve(NamedTuple):
    """One run."""

    arm: str
    seed: int
    by: str
    """ "kernels", "references", or "exact": references in float32."""
    ran: str
    train: list[float]
    """Loss of every step, nats per byte."""
    valid: float
    """Loss on the same validation text for all, at the end."""
    seconds: float
    twin: int = 0
    """Of those that begin half a rounding away from the first, which is 0."""


def run(corpus: Any, arm: str, by: str, start: tuple[int, int], place: Place, size: Size) -> Curve:
    """Train one model from `start`, (seed, twin); nothing is written."""
    seed, twin = start
    begin = time.perf_counter()
    core, kind = arm.split()
    spec = ModelSpec.model_validate({"width": 64, "depth": 3, "core": core, "dense": DENSE[kind]})
    model = spec.build(corpus.vocab_size).initialise(seed).to(place.device)
    if by == "exact":
        place = place._replace(dtype=torch.float32)
    if by != "kernels":
        model.kernels = {name: "reference" for library in registry.default().kernels for name in library.OPERATIONS}
    if twin:
        nudge(model, torch.finfo(place.dtype).eps / 2, twin)
    train = TrainSpec(lr=3e-3)
    step = build_step(model, build_optimizer(model, train), place, size.batch, train.clip)
    batches = corpus.train_batches(size.batch, seed, skip=0)
    losses = [step(next(batches), learning_rate(train, i + 1, size.steps)).loss for i in range(size.steps)]
    tokens = VALID if size.steps >= 100 else 4096
    valid = evaluate(model, corpus, "valid", size.batch, tokens, place)["valid/loss"]
    ran = ",".join(sorted(set(model.ran.values())))
    return Curve(arm, seed, by, ran, torch.stack(losses).tolist(), valid, time.perf_counter() - begin, twin)


@torch.no_grad()
def nudge(model: torch.nn.Module, size: float, seed: int) -> None:
    """Change every weight by about `size` of itself."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.mul_(1 + size * torch.randn(parameter.shape, generator=generator).to(parameter.device))


def compare(curves: list[Curve]) -> bool:
    """Print the table; whether every difference lies within the noise of seeds."""
    print(f"\n{'valid/loss':18}{'kernels':>9}{'references':>12}{'difference':>12}{'twins':>9}{'seeds':>9}")
    good = True
    for arm in dict.fromkeys(curve.arm for curve in curves):
        mine = [curve for curve in curves if curve.arm == arm]
        twins = {by: [c.valid for c in mine if c.by == by and c.seed == 0] for by in ("kernels", "references")}
        seeds = [curve.valid for curve in mine if curve.by == "kernels" and not curve.twin]
        kernels, references = (statistics.mean(found) for found in twins.values())
        rounding = statistics.stdev(twins["kernels"]) if len(twins["kernels"]) > 1 else float("nan")
        difference, spread = kernels - references, statistics.stdev(seeds)
        good &= abs(difference) <= spread
        exact = [curve.valid for curve in mine if curve.by == "exact"]
        against = f"; in float32 {statistics.mean(exact):.4f} ({len(exact)} twins)" if exact else ""
        print(
            f"{arm:18}{kernels:9.4f}{references:12.4f}{difference:+12.5f}{rounding:9.5f}{spread:9.5f}  "
            f"{'within' if abs(difference) <= spread else 'BEYOND'}; {len(seeds)} seeds, {len(twins['kernels'])} and "
            f"{len(twins['references'])} twins; ran {next(c.ran for c in mine if c.by == 'kernels')}{against}"
        )
    print("nats per byte, means over twins; twins: standard deviation over twins with kernels; seeds: over other seeds")
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
        for curve in sorted((c for c in curves if c.arm == arm and not c.twin), key=lambda c: -c.seed):
            style: dict[str, Any] = {"color": "#bbbbbb", "linewidth": 0.8}
            if curve.seed == 1:
                style["label"] = "kernels, other seeds"
            if curve.seed == 0:
                style = {"color": "#0072b2", "linewidth": 2.2, "alpha": 0.6, "label": "kernels"}
            if curve.by == "exact":
                continue
            if curve.by == "references":
                style = {"color": "#d55e00", "linewidth": 1, "linestyle": "--", "label": "references, same seed"}
            axes.plot(smooth(curve.train), **style)
        axes.set_title(arm, fontsize=10)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("train/loss, nats per byte (mean of 10 steps)", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)


class Plan(NamedTuple):
    """What is trained of every arm."""

    arms: list[str]
    seeds: int
    twins: int
    references: int
    exact: int

    def runs(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """(by, (seed, twin))."""
        yield from (("kernels", (seed, 0)) for seed in range(self.seeds))
        yield from (("kernels", (0, twin)) for twin in range(1, self.twins))
        yield from (("references", (0, twin)) for twin in range(self.references))
        yield from (("exact", (0, twin)) for twin in range(self.exact))


def train_all(plan: Plan, device: str, size: Size, known: list[Curve]) -> Iterator[Curve]:
    """What is known, and what the plan has beyond it."""
    place = choose_place(device, "auto")
    name = torch.cuda.get_device_name() if place.device.type == "cuda" else "CPU"
    print(
        f"{name}, torch {torch.__version__}, {place.dtype}, {size.steps} steps of B{size.batch} T{size.tokens}",
        flush=True,
    )
    data = registry.default().find("data", "python_source")
    corpus = data.model_validate({"tokenizer": "byte", "seq_len": size.tokens}).prepare()
    for arm in ARMS:
        mine = [curve for curve in known if curve.arm == arm]
        yield from mine
        done = {(curve.by, (curve.seed, curve.twin)) for curve in mine}
        for by, start in plan.runs() if arm in plan.arms else ():
            if (by, start) in done:
                continue
            curve = run(corpus, arm, by, start, place, size)
            twin = f" twin {curve.twin}" if curve.twin else ""
            print(
                f"{arm:18} seed {curve.seed}{twin} {by:10} valid/loss {curve.valid:.4f}  {curve.seconds:.1f} s",
                flush=True,
            )
            yield curve


def read(path: Path) -> list[Curve]:
    """Curves of an earlier run."""
    return [Curve(**curve) for curve in json.loads(path.read_text())]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--seeds", type=int, default=8, help="with kernels")
    parser.add_argument("--twins", type=int, default=4, help="of the first seed, with kernels")
    parser.add_argument("--references", type=int, default=2, help="of its twins that are trained with references too")
    parser.add_argument("--exact", type=int, default=0, help="of its twins that are trained with references in float32")
    parser.add_argument("--add", type=Path, metavar="JSON", help="go on from what was measured")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/loss_curves.json"))
    parser.add_argument("--draw", nargs=2, type=Path, metavar=("JSON", "PICTURE"), help="draw what was measured")
    options = parser.parse_args()
    if options.draw:
        curves = read(options.draw[0])
        draw(curves, options.draw[1])
        return 0 if compare(curves) else 1
    plan = Plan(options.arms, options.seeds, options.twins, options.references, options.exact)
    size = Size(options.batch, options.tokens, options.steps)
    known = read(options.add) if options.add else []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    curves = []
    for curve in train_all(plan, options.device, size, known):
        curves.append(curve)
        options.out.write_text(json.dumps([each._asdict() for each in curves]))
    return 0 if compare(curves) else 1


if __name__ == "__main__":
    sys.exit(main())
