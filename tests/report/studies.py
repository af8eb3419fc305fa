"""Folders of ablations as a search leaves them, made up: no model is trained."""

import json
import math
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

from dense_lab.files import write_json

AWKWARD = '50%_off & #1~\\^{x} | "q" <b>*α*--é'
"""An arm's name with everything in it that some format reads as markup."""
START = datetime(2026, 11, 1, 12, tzinfo=UTC)
ANALYSIS = {
    "metric": "test/loss",
    "direction": "minimize",
    "alpha": 0.05,
    "correction": "holm",
    "smallest_effect": 0.01,
    "power": 0.8,
}


def ablation(
    folder: Path,
    arms: dict[str, dict],
    effects: dict[str, float],
    *,
    seeds: int = 5,
    noise: float = 0.004,
    failing: tuple[tuple[str, int], ...] = (),
    tune: dict | None = None,
    untuned: tuple[str, ...] = (),
    lr: dict[str, float] | None = None,
    analysis: dict | None = None,
    cost: dict[str, float] | None = None,
) -> Path:
    """The first arm is the baseline; `effects` is what each adds to a loss of 2, `cost` what its sizes are times."""
    folder.mkdir(parents=True)
    baseline = next(iter(arms))
    said = {
        "baseline": baseline,
        "arms": arms,
        "seeds": list(range(seeds)),
        "analysis": {**ANALYSIS, **(analysis or {})},
        "tune": tune,
    }
    objective = [{"minimize": "valid/loss", "maximize": None}]
    search = {"sampler": "grid", "trials": len(arms) * seeds, "pruner": "none", "objective": objective, "seed": 0}
    write_json(
        folder / "study.json",
        {"dense_lab": 1, "x-name": folder.name, "x-digest": "d1b2c3d4e5f6", "x-search": search, "x-ablation": said},
    )
    write_json(folder / "manifest.json", {"dense_lab": "0.1.0", "digest": "d1b2c3d4e5f6", "trials": len(arms) * seeds})
    number = 0
    if tune:
        for arm in arms:
            for value in [] if arm in untuned else tune["lr"]:
                params = {"arm": arm, "seed": tune["seed"], "train.lr": value}
                trial(folder, number, arm, "tune", params, 2 + effects.get(arm, 0), lr=value)
                number += 1
    for seed in range(seeds):
        chance = random.Random(seed)
        level = 2 + chance.gauss(0, 0.02)
        for arm in arms:
            loss = level + effects.get(arm, 0) + random.Random(f"{arm} {seed}").gauss(0, noise)
            fails = (arm, seed) in failing
            params = {"arm": arm, "seed": seed}
            rate = (lr or {}).get(arm, 2e-3)
            trial(folder, number, arm, "cell", params, loss, fails=fails, lr=rate, cost=(cost or {}).get(arm, 1.0))
            number += 1
    return folder


def trial(
    folder: Path,
    number: int,
    arm: str,
    role: str,
    params: dict,
    loss: float,
    *,
    fails: bool = False,
    lr: float = 2e-3,
    cost: float = 1.0,
) -> None:
    """One trial's folder."""
    where, seed = folder / "trials" / f"{number:04d}", params["seed"]
    where.mkdir(parents=True)
    started = START + timedelta(minutes=number)
    tags = {"arm": arm, "seed": str(seed), "role": role}
    said = {"number": number, "params": params, "label": arm, "role": role, "digest": f"{number:012x}"}
    write_json(where / "trial.json", {**said, "tags": tags, "started": started.isoformat(), "values": {}})
    train = {"tokens": 80_000, "lr": lr, "weight_decay": 0.1}
    write_json(
        where / "spec.json", {"seed": seed, "train": train, "digest": f"{number:012x}", "plugins": {"builtin": "0.1.0"}}
    )
    lines = [_line(step, loss, seed) for step in range(1, 9)]
    (where / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = {
        "valid/loss": lines[-1]["valid/loss"],
        "test/loss": loss,
        "tokens_per_second": 45_000 / cost,
        "parameters": 1_000_000 * cost,
        "flops_per_token": 6_100_000 * cost,
        "state_bytes": 65_536 * (2 if cost > 1.04 else 1),
        "peak_memory_bytes": 512_000_000 * cost,
        "seconds": 1.8,
    }
    result = {
        "status": "failed" if fails else "complete",
        "reason": "train/loss is nan at step 7 of 20 (lr 0.004); last good step 5, train/loss 3.1" if fails else "",
        "metrics": {} if fails else metrics,
        "tags": {
            **tags,
            "data": "0a1b2c3d4e5f",
            "commit": "2f6c0e3d",
            "device": "cpu (1 threads)",
            "dtype": "float32",
            "torch": "2.11.0",
            "python": "3.11.7",
            "plugins": "builtin=0.1.0",
            "implementations": "decay_attention=vector",
        },
        "started": started.isoformat(),
        "ended": (started + timedelta(seconds=40)).isoformat(),
    }
    write_json(where / "result.json", result)


def _line(step: int, loss: float, seed: int) -> dict:
    wobble = random.Random(f"{seed} {step}").gauss(0, 0.004)
    found = loss + 2.5 * math.exp(-step / 1.8) + wobble
    return {
        "step": step,
        "tokens": 10_000 * step,
        "seconds": 0.2 * step,
        "train/loss": found + 0.02,
        "valid/loss": found,
    }


def small(folder: Path) -> Path:
    """Four arms with a verdict of each kind; one cell has failed, one arm was not tuned, one at the grid's end."""
    return ablation(
        folder,
        {
            "plain": {"model.dense": "none"},
            AWKWARD: {"model.dense.span": 1},
            "worse": {"model.dense.span": 2},
            "same": {"model.dense.span": 4},
        },
        {AWKWARD: -0.03, "worse": 0.05},
        failing=(("same", 3),),
        tune={"lr": [1e-3, 2e-3, 4e-3], "weight_decay": [0.1], "tokens": 5_000_000, "seed": 100},
        untuned=("worse",),
        lr={AWKWARD: 4e-3},
        cost={AWKWARD: 1.012, "worse": 1.05, "same": 1.02},
    )


def factorial(folder: Path) -> Path:
    """Two cores by three dense connections; the second core gains more."""
    cores = ("retnet", "mamba")
    arms = {
        f"{core} {dense}": {"model.core": core, "model.dense": dense}
        for core in cores
        for dense in ("none", "add", "concat")
    }
    effects = {"retnet add": -0.02, "retnet concat": -0.01, "mamba none": 0.05, "mamba add": -0.03}
    return ablation(folder, arms, effects, cost={"mamba add": 1.03})


def large(folder: Path) -> Path:
    """Twenty arms with long names."""
    arms = {"plain retnet": {}}
    arms |= {f"densessm span={i % 5 + 1} gate={'mlp' if i > 9 else 'linear'} #{i}": {"x": i} for i in range(19)}
    return ablation(
        folder,
        arms,
        {arm: 0.002 * (i % 9) - 0.012 for i, arm in enumerate(arms) if i},
        noise=0.006,
        cost={arm: 1 + 0.0004 * ((7 * i) % 19) for i, arm in enumerate(arms)},
    )
