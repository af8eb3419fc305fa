"""What a study says once every open value is closed (RunSpec, StudySpec), and how to search over them (SearchSpec).

Names of numbers carry their unit: losses are nats per token, sizes count tokens or parameters, times are seconds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from dense_lab.ablation.spec import AblationSpec
from dense_lab.budget_spec import BudgetSpec as BudgetSpec
from dense_lab.components import Component, DataSlot, Spec
from dense_lab.errors import did_you_mean
from dense_lab.metric_names import CURVES
from dense_lab.metric_names import METRICS as METRICS
from dense_lab.model import ModelSpec
from dense_lab.registry import Registry
from dense_lab.units import Count, Fraction, NonNegative, Positive, Size

GRAMMAR: Literal[1] = 1
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
    """After warm-up: cosine or linear to lr_end; constant; wsd: constant, then linear to lr_end in the last `decay`."""
    warmup: Fraction = 0.02
    """Fraction of the steps in which the learning rate rises linearly from zero."""
    decay: Fraction = 0.2
    """Fraction of the steps in which `wsd` decays."""
    lr_end: Fraction = 0.1
    """Last learning rate as a fraction of the peak."""
    weight_decay: NonNegative = 0.1
    """On matrices only: never on embeddings, norms, biases, or what a core declares undecayed (Mamba's A and D)."""
    beta1: Fraction = 0.9
    """AdamW's first moment."""
    beta2: Fraction = 0.95
    """AdamW's second moment."""
    clip: Annotated[Positive | None, BeforeValidator(lambda value: None if value == "none" else value)] = Field(
        1.0, json_schema_extra={"x-also": {"const": "none"}}
    )
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
    seed: Size = 0
    """Of the initial weights and of the order of the data, by generators that are independent of each other."""
    kernels: dict[str, str] = Field(default_factory=dict)
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
        if self.metric.startswith("test/"):
            raise ValueError(f"{self.metric!r} cannot be an objective: the test split has no part in selection")
        if self.metric not in METRICS:
            hint = did_you_mean(self.metric, METRICS)
            raise ValueError(f"no metric named {self.metric!r}.{hint} Metrics: {', '.join(METRICS)}")
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
    objective: tuple[Objective, ...] = Field(
        (Objective(minimize="valid/loss"),), json_schema_extra={"x-also": {"$ref": "#/$defs/Objective"}}
    )
    """One, or several for a Pareto front."""
    seed: Size = 0
    """Of the sampler."""

    @model_validator(mode="before")
    @classmethod
    def _single_objective(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("objective"), dict):
            return {**value, "objective": [value["objective"]]}
        return value

    @model_validator(mode="after")
    def _pruning_needs_one(self) -> SearchSpec:
        if not self.objective:
            raise ValueError("name a metric, such as `objective: {minimize: valid/loss}`")
        if self.pruner != "none" and len(self.objective) > 1:
            raise ValueError(f"pruner {self.pruner!r} needs a single objective: Optuna prunes by one value")
        if self.pruner != "none" and self.objective[0].metric not in CURVES:
            known = ", ".join(CURVES)
            raise ValueError(f"pruner {self.pruner!r} needs an objective that is known while a trial runs: {known}")
        return self


class StudySpec(AblationSpec, RunSpec):
    """A study, closed at one point: a run, and how it was found."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Of the study, of its folder and of its experiment in MLflow; by default the file's name without `.yaml`."""
    budget: BudgetSpec | None = None
    """The size of every model; without it widths are as written."""
    search: SearchSpec = SearchSpec()
    """How open values are chosen; without open values there is one run."""

    def run(self) -> RunSpec:
        """The run alone."""
        return RunSpec.model_construct(**{name: getattr(self, name) for name in RunSpec.model_fields})


def components_of(spec: Spec) -> Iterator[Component]:
    """Every component within `spec`, itself included, from the outside in."""
    if isinstance(spec, Component):
        yield spec
    for name in type(spec).model_fields:
        value = getattr(spec, name)
        within = tuple(value.values()) if isinstance(value, dict) else value
        for item in within if isinstance(within, tuple) else (within,):
            if isinstance(item, Spec):
                yield from components_of(item)


def plugins_used(spec: Spec, registry: Registry) -> dict[str, str]:
    """Versions of the plugins that brought the components of `spec`, by name."""
    owners = [registry.owner(component.slot, component.kind_name()) for component in components_of(spec)]
    return {plugin.name: plugin.version for plugin in sorted(owners, key=lambda plugin: plugin.name)}
