"""How training reports and ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from dense_lab.errors import DenseLabError

Status = Literal["complete", "pruned", "failed"]


class Evaluation(NamedTuple):
    """What is known after one of the run's evaluations."""

    step: int
    """Optimiser steps done."""
    tokens: int
    """Training tokens seen."""
    seconds: float
    """Since training began, earlier attempts that were continued included."""
    metrics: dict[str, float]
    """The newest value of every metric, such as `valid/loss`, `train/loss`, `tokens_per_second`."""


class Pruned(Exception):
    """Raised by `on_evaluation` to stop a run that is not worth finishing; its text is the reason."""


class TrialFailed(DenseLabError):
    """A run that cannot go on: its loss is not a number, it ran out of memory, a component raised.

    Its text says why, in a sentence, with the last good step; the run's result.json says the same.
    """


@dataclass(frozen=True)
class Result:
    """What result.json holds."""

    status: Status
    reason: str
    """Why it was pruned or failed; empty when complete."""
    metrics: dict[str, float]
    """Final values."""
    tags: dict[str, str]
    """What describes the run but is no number to compare."""
    started: str
    """ISO time, UTC."""
    ended: str
    """ISO time, UTC."""
