"""How fast a device trains, and what computes each operation on it."""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from dense_lab import registry as registries
from dense_lab.components import Data
from dense_lab.model import ModelSpec
from dense_lab.results import TrialView, read_study
from dense_lab.study import RunSpec, TrainSpec
from dense_lab.training.device import Place

if TYPE_CHECKING:
    from dense_lab.corpus import Corpus

EFFICIENCY = 0.2
"""Part of the matrix-product rate that small models reach in training on a CPU: an order of magnitude."""
REHEARSED = 32
"""Tokens of a rehearsal: who computes an operation depends on whether it is one token, not on how many more."""
OVERHEAD = "overhead.json"
"""What `dense-lab overhead` leaves in a study's folder."""
Source = Literal["measured", "scaled", "guessed"]


def corpus(data: Data) -> Corpus:
    """The prepared data; the last few are kept."""
    return _corpus(type(data), data.model_dump_json())


@functools.lru_cache(4)
def _corpus(kind: type[Data], text: str) -> Corpus:
    return kind.model_validate_json(text).prepare()


class Speeds:
    """How many FLOPs of the forward pass a device trains in a second, an evaluation and all else included."""

    def __init__(self, place: Place, measured: dict[str, list[tuple[float, float]]]) -> None:
        """`measured`: for each arm, FLOPs per token and tokens per second of its runs on this device."""
        self._place = place
        self._measured = measured
        rates = [flops * speed for runs in measured.values() for flops, speed in runs]
        self._typical = statistics.median(rates) if rates else None

    def seconds(self, name: str, flops: float, train: TrainSpec) -> tuple[float, Source]:
        """Of one run, and how that is known."""
        evaluated = train.evaluations * train.valid_tokens + train.test_tokens
        tokens = train.tokens + evaluated / 3  # A step is about three forward passes.
        if runs := [speed for known, speed in self._measured.get(name, []) if known == flops]:
            return tokens / statistics.median(runs), "measured"
        if self._typical:
            return tokens * flops / self._typical, "scaled"
        return tokens * 3 * flops / (EFFICIENCY * self._matrix_rate), "guessed"

    @functools.cached_property
    def _matrix_rate(self) -> float:
        """FLOPs per second of a matrix product, in the dtype that training uses."""
        size = 8192 if self._place.device.type == "cuda" else 1024
        a = torch.randn(size, size, device=self._place.device, dtype=self._place.dtype)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            (a @ a)[0, 0].item()  # Waits for a GPU.
            times.append(time.perf_counter() - start)
        return 2.0 * size**3 / min(times)

    def told(self, sources: Collection[Source]) -> str:
        """How times were found, in a sentence."""
        words: dict[Source, str] = {
            "measured": "measured: tokens/s of the same arm on such a device",
            "scaled": "scaled: by FLOPs, from other arms on such a device",
            "guessed": f"guessed: {EFFICIENCY:.0%} of this device's matrix-product rate, which may be off several "
            "times over; a small model on a GPU takes longer",
        }
        return "; ".join(text for source, text in words.items() if source in sources)


def measured(folder: Path | None, place: Place) -> dict[str, list[tuple[float, float]]]:
    """FLOPs per token and tokens per second of a study's arms on such a device: of the finished runs in its folder,
    else of `dense-lab overhead`."""
    if folder is None:
        return {}
    from dense_lab.cli.live import brief

    here = _device_kind(place.describe())
    found: dict[str, list[tuple[float, float]]] = {}
    for trial in read_study(folder).having("complete") if (folder / "study.json").exists() else ():
        if _device_kind(trial.tags.get("device", "")) == here and (known := _speed(trial)):
            found.setdefault(trial.label or brief(trial.params), []).append(known)
    return {**_timed(folder / OVERHEAD, here), **found}


def _timed(file: Path, here: str) -> dict[str, list[tuple[float, float]]]:
    rows = json.loads(file.read_text()) if file.exists() else []
    known: dict[tuple[str, str], float] = {}
    for row in rows:
        if _device_kind(row["device"]) == here:
            known[row["arm"], row["metric"]] = row["dense"]
            known[row["twin"], row["metric"]] = row["plain"]
    trained = {arm: speed for (arm, metric), speed in known.items() if metric == "train_tokens_per_second"}
    return {arm: [(known[arm, "flops_per_token"], speed)] for arm, speed in trained.items()}


def _device_kind(described: str) -> str:
    """Without the number of a GPU."""
    return described.split(" ", 1)[-1]


def _speed(trial: TrialView) -> tuple[float, float] | None:
    flops, speed = trial.metrics.get("flops_per_token"), trial.metrics.get("tokens_per_second")
    return (flops, speed) if flops and speed else None


def implementations(runs: Sequence[RunSpec], place: Place, patience: float = 2.0) -> dict[str, dict[str, str]]:
    """What would compute each operation on this device, by core: found by a rehearsal over a few tokens through two
    layers of one architecture of each core, a dense one if there is one: its first layer is a plain one.

    Empty for a core whose turn is after `patience` s.
    """
    chosen: dict[tuple[str, bool], RunSpec] = {}
    for run in runs:
        for layer in run.model.layers():
            dense = layer.dense or run.model.dense
            chosen.setdefault((layer.core.kind_name(), dense.span > 0), run)
    found: dict[str, dict[str, str]] = {core: {} for core, _ in chosen}
    start = time.perf_counter()
    for core in found:
        if time.perf_counter() - start < patience:
            run = chosen[(core, True)] if (core, True) in chosen else chosen[(core, False)]
            found[core] = dict(sorted(_ran(run, place).items()))
    return found


def _ran(run: RunSpec, place: Place) -> dict[str, str]:
    data = corpus(run.data)
    model = run.model
    blocks = model.blocks and tuple(block.model_copy(update={"repeat": min(block.repeat, 2)}) for block in model.blocks)
    short: ModelSpec = model.model_copy(update={"blocks": blocks, "depth": min(model.depth, 2)})
    module = short.build(data.vocab_size).to(place.device)
    module.kernels = run.kernels
    ids = torch.zeros(1, min(data.seq_len, REHEARSED), dtype=torch.long, device=place.device)
    with place.autocast(), registries.default().rehearsed():
        module.loss(ids, ids)
    return dict(module.ran)
