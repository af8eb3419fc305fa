"""One model ready to be timed, in training or in decoding, by what runs train and decode with."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from dense_lab.generation import Decoder
from dense_lab.model import LanguageModel
from dense_lab.speeds import corpus
from dense_lab.study import RunSpec
from dense_lab.training.device import Place, peak_memory_bytes, reset_peak_memory
from dense_lab.training.graph import build_step
from dense_lab.training.optimizer import build_optimizer
from dense_lab.training.schedule import plan as schedule

_SETTLE = 4
"""Steps before anything is timed: two eager ones, the recording, a replay."""


class Side(Protocol):
    """One side of a comparison, ready to run."""

    metric: str
    tokens: int
    """Of one step."""
    batch: int
    """Sequences at once."""
    memory: int
    """Peak bytes, or 0 where they are not known for one model alone."""

    def __call__(self) -> object:
        """One step."""
        ...


class Training:
    """A training step on one batch, over and over."""

    metric = "train_tokens_per_second"

    def __init__(self, run: RunSpec, place: Place) -> None:
        data = corpus(run.data)
        plan = schedule(run.train, data.seq_len)
        self._rate = run.train.lr * 1e-3  # The weights should stay as ordinary as they are.
        self.batch, self.tokens = plan.batch_size, plan.tokens_per_step
        self._batch = next(data.train_batches(plan.batch_size, run.seed))
        before = _memory(place.device)
        model = _built(run).to(place.device)
        self._step = build_step(model, build_optimizer(model, run.train), place, plan.micro_size, run.train.clip)
        reset_peak_memory(place.device)
        for _ in range(_SETTLE):
            self()
        self.memory = peak_memory_bytes(place.device) - before if place.device.type == "cuda" else 0

    def __call__(self) -> object:
        """One step."""
        return self._step(self._batch, self._rate)


class Decoding:
    """One token more for each of `batch` sequences, behind prompts as long as the data's."""

    metric = "decode_tokens_per_second"
    memory = 0

    def __init__(self, run: RunSpec, place: Place, batch: int) -> None:
        self.batch = self.tokens = batch
        model = _built(run).to(place.device, place.dtype).eval()
        prompts = next(corpus(run.data).eval_batches("valid", batch, batch * corpus(run.data).seq_len)).inputs
        prompt = prompts.repeat(batch, 1)[:batch].to(place.device)
        self._decoder = Decoder(model, prompt)
        for _ in range(_SETTLE):
            self()

    def __call__(self) -> object:
        """One step."""
        return self._decoder.advance()


def _built(run: RunSpec) -> LanguageModel:
    model = run.model.build(corpus(run.data).vocab_size).initialise(run.seed)
    model.kernels = run.kernels
    return model


def repeats(side: Side, seconds: float, device: torch.device) -> int:
    """Steps that take about `seconds`."""
    return max(1, math.ceil(seconds / seconds_of(side, 1, device)))


def seconds_of(side: Side, times: int, device: torch.device) -> float:
    """Of so many steps."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(times):
        side()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


@contextlib.contextmanager
def released(device: torch.device, sides: list[Any]) -> Iterator[None]:
    """Afterwards the memory of `sides` is free again."""
    try:
        yield
    finally:
        sides.clear()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
