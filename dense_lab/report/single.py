"""What the report says of a single run."""

from __future__ import annotations

import json

from dense_lab.report import plots, tables
from dense_lab.report.section import Section
from dense_lab.report.table import Table, comma_separated
from dense_lab.results import StudyResults, TrialView
from dense_lab.space_frozen import plain
from dense_lab.units import human

LOSSES = ("valid/loss", "test/loss")
"""What a sentence about a run says."""
NOTES = ("digest", "plugins")
"""Keys of spec.json that the table of provenance has already."""


def summary(trial: TrialView) -> str:
    """How it stands: its state, how far it got, its losses, why it ended."""
    planned, done = trial.tokens_planned, trial.curve[-1].get("tokens", 0) if trial.curve else 0
    far = f" after {human(done)} of {human(planned)} tokens" if planned and trial.state != "complete" else ""
    losses = [f"{name} {trial.metrics[name]:.4f}" for name in LOSSES if name in trial.metrics]
    return ", ".join([f"{trial.state}{far}", *losses]) + (f": {trial.reason}" if trial.reason else "")


def run_section(results: StudyResults) -> Section:
    """The section of a single run, complete or not."""
    (trial,) = results.trials
    measured = tuple((name, tables.metric_text(name, value)) for name, value in sorted(trial.metrics.items()))
    spec = {key: value for key, value in trial.spec.items() if key not in NOTES}
    settings = tuple((path, _said(value)) for path, value in plain(spec).items())
    metrics = Table("What was measured", ("metric", "value"), measured, name="metrics")
    return Section(
        results,
        (f"A single run, {summary(trial)}.",),
        (metrics,) if measured else (),
        tuple(plots.run_pictures(results)),
        (Table("Settings", ("key", "value"), settings, name="settings", left=2), tables.provenance(results)),
        {"metrics.csv": comma_separated(metrics)},
    )


def _said(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
