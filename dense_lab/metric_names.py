"""Names of the metrics that a study may go by."""

from __future__ import annotations

from typing import Literal

CURVES = ("valid/loss", "valid/accuracy", "train/loss")
"""Metrics known at every evaluation, by which a trial may be pruned."""
METRICS = (
    *CURVES,
    "valid/loss_best",
    "tokens_per_second",
    "step_seconds",
    "peak_memory_bytes",
    "parameters",
    "embedding_parameters",
    "flops_per_token",
    "state_bytes",
    "seconds",
)
"""Metrics that a search may go by; the test split is not among them."""
REPORTED = ("test/loss", "test/accuracy", *METRICS)
"""Metrics that an ablation may compare its arms by: nothing is selected by them, so the test split is among them."""


def direction(metric: str) -> Literal["minimize", "maximize"]:
    """Where a metric should go."""
    return "maximize" if metric.endswith("/accuracy") or metric == "tokens_per_second" else "minimize"
