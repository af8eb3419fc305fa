"""What happens at which step: how many steps there are, when to look, and the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dense_lab.errors import InputError, Problem
from dense_lab.study import TrainSpec

_LOG_POINTS = 100
"""About how often the training loss is written down."""


@dataclass(frozen=True)
class Plan:
    """A token budget turned into steps, counted from 1; sizes are in sequences."""

    steps: int
    batch_size: int
    micro_size: int
    tokens_per_step: int
    evaluations: frozenset[int]
    logs: frozenset[int]
    """When the training loss is written down and checked; evaluations and checkpoints are among them."""
    checkpoints: frozenset[int]
    """The one at the end is not among them."""


def plan(spec: TrainSpec, seq_len: int) -> Plan:
    """Raises InputError when a batch has no room for one sequence or the budget none for one batch."""
    batch_size = spec.batch_tokens // seq_len
    micro_size = (spec.micro_batch_tokens or spec.batch_tokens) // seq_len
    for name, value in (("batch_tokens", spec.batch_tokens), ("micro_batch_tokens", spec.micro_batch_tokens)):
        if value is not None and value < seq_len:
            message = f"{value} tokens are less than one sequence of {seq_len}: raise it, or lower `data.seq_len`"
            raise InputError(Problem(message, f"train.{name}"))
    tokens_per_step = batch_size * seq_len
    steps = spec.tokens // tokens_per_step
    if steps == 0:
        message = f"{spec.tokens} tokens are less than one batch of {tokens_per_step}: raise it, or lower batch_tokens"
        raise InputError(Problem(message, "train.tokens"))
    evaluations = _evenly(spec.evaluations, spec.evaluations, steps)
    checkpoints = _evenly(spec.checkpoints, spec.checkpoints + 1, steps)
    every = max(1, steps // _LOG_POINTS)
    logs = frozenset(range(every, steps + 1, every)) | evaluations | checkpoints
    return Plan(steps, batch_size, min(micro_size, batch_size), tokens_per_step, evaluations, logs, checkpoints)


def _evenly(count: int, parts: int, steps: int) -> frozenset[int]:
    """The ends of the first `count` of `parts` equal pieces of the run."""
    return frozenset(step for i in range(1, count + 1) if (step := round(i * steps / parts)) > 0)


def learning_rate(spec: TrainSpec, step: int, steps: int) -> float:
    """Of step 1, ..., steps: linear warm-up to `lr`, then the schedule, whose last step has `lr * lr_end`."""
    warm = math.ceil(spec.warmup * steps)
    if step <= warm:
        return spec.lr * step / warm
    progress = (step - warm) / (steps - warm)
    if spec.schedule == "constant":
        return spec.lr
    if spec.schedule == "cosine":
        remaining = (1 + math.cos(math.pi * progress)) / 2
    elif spec.schedule == "linear":
        remaining = 1 - progress
    else:
        falling = max(1, round(spec.decay * steps))
        remaining = min(1.0, (steps - step) / falling)
    return spec.lr * (spec.lr_end + (1 - spec.lr_end) * remaining)
