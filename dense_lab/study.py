"""What a study says once every open value is closed (RunSpec), and how to search over them (SearchSpec).

Names of numbers carry their unit: losses are nats per token, sizes count tokens or parameters, times are seconds.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import Field, model_validator

from dense_lab.components import DataSlot, Spec
from dense_lab.model import ModelSpec
from dense_lab.units import Count, Fraction, Positive, Size

GRAMMAR = 1
"""Version of the study grammar, the value of the key `dense_lab`."""


class TrainSpec(Spec):
    """How a model is trained: AdamW on a budget of tokens."""

    tokens: Count = 2_000_000
    """Training tokens in all."""
    batch_tokens: Count = 4096
    """Tokens per optimiser step, rounded down to whole sequences."""
    micro_batch_tokens: Count | None = None
    """Tokens per forward pass; fewer than batch_tokens means gradient accumulation. Default: batch_tokens."""
    lr: Positive = 3e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """After warm-up: cosine or linear to lr_end, constant, or constant then linear to lr_end in the last `decay` (wsd)."""
    warmup: Fraction = 0.02
    """Fraction of the steps in which the learning rate rises linearly from zero."""
    decay: Fraction = 0.2
    """Fraction of the steps in which `wsd` decays."""
    lr_end: Fraction = 0.1
    """Last learning rate as a fraction of the peak."""
    weight_decay: float = Field(0.1, ge=0)
    """On matrices only: never on embeddings, norms, biases, or what a core declares undecayed (Mamba's A and D)."""
    beta1: Fraction = 0.9
    """AdamW's first moment."""
    beta2: Fraction = 0.95
    """AdamW's second moment."""
    clip: Positive | None = 1.0
    """Largest global gradient norm; none for no clipping."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the forward and backward pass; auto is bf16 on a GPU and fp32 elsewhere. Weights stay in fp32."""
    evaluations: Count = 8
    """How often the validation loss is measured, the end included."""
    valid_tokens: Count = 65_536
    """Tokens per validation; the same ones every time."""
    test_tokens: Size = 262_144
    """Tokens of the final test, which selection never sees; 0 for none."""
    checkpoints: Size = 0
    """How many checkpoints are written along the way, besides the one at the end."""


class RunSpec(Spec):
    """One run, complete: what is hashed, stored and reproduced."""

    dense_lab: Literal[1] = GRAMMAR
    """Version of the grammar."""
    data: DataSlot = "python_source"  # type: ignore[assignment]
    """Where tokens come from."""
    model: ModelSpec = ModelSpec.model_construct()
    """The architecture."""
    train: TrainSpec = TrainSpec()
    """How it is trained."""
    seed: int = Field(0, ge=0)
    """Of the initial weights and of the order of the data, by generators that are independent of each other."""
    kernels: dict[str, str] = {}
    """Implementation by operation, such as `{decay_attention: reference}`; auto where nothing is said."""

    @model_validator(mode="before")
    @classmethod
    def _fill_model(cls, value: Any) -> Any:
        # The default model has slots, which are looked up when a spec is validated, not when this module is imported.
        return {"model": {}, **value} if isinstance(value, dict) else value

    def canonical(self) -> str:
        """JSON with sorted keys and every default written out."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    def digest(self, plugins: dict[str, str] | None = None) -> str:
        """First 12 hex digits of the sha256 over the canonical spec and the versions of the plugins it uses."""
        text = self.canonical() + json.dumps(plugins or {}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class Objective(Spec):
    """One metric to be minimised or maximised."""

    minimize: str | None = None
    """Name of a metric, such as `valid/loss`."""
    maximize: str | None = None
    """Name of a metric, such as `tokens_per_second`."""

    @model_validator(mode="after")
    def _one_direction(self) -> Objective:
        if (self.minimize is None) == (self.maximize is None):
            raise ValueError("give exactly one of `minimize` and `maximize`")
        return self

    @property
    def metric(self) -> str:
        """The metric's name."""
        return self.minimize or self.maximize or ""

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        """As Optuna calls it."""
        return "minimize" if self.minimize else "maximize"


class SearchSpec(Spec):
    """How open values are chosen."""

    sampler: Literal["tpe", "random", "grid", "nsga2"] = "tpe"
    """Optuna's sampler; tpe models conditional spaces by group."""
    trials: Count = 20
    """Trials in all, resumed ones included."""
    pruner: Literal["none", "median", "asha"] = "none"
    """When a trial is stopped early, judged by the objective at evaluations; single objective only."""
    objective: tuple[Objective, ...] = (Objective(minimize="valid/loss"),)
    """One, or several for a Pareto front."""
    seed: int = Field(0, ge=0)
    """Of the sampler."""

    @model_validator(mode="before")
    @classmethod
    def _single_objective(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("objective"), dict):
            return {**value, "objective": [value["objective"]]}
        return value

    @model_validator(mode="after")
    def _pruning_needs_one(self) -> SearchSpec:
        if self.pruner != "none" and len(self.objective) > 1:
            raise ValueError(f"pruner {self.pruner!r} needs a single objective: Optuna prunes by one value")
        return self
