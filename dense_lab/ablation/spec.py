"""What a study says of an ablation: arms, the baseline, seeds, how learning rates are tuned, how arms are compared."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from dense_lab.components import Spec
from dense_lab.errors import did_you_mean
from dense_lab.metric_names import REPORTED
from dense_lab.units import Count, NonNegative, Positive, Size, number

Overrides = Annotated[dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)]
"""What an arm changes, by dotted path; nothing is the study as written."""
ArmName = Annotated[str, Field(pattern=r"^\S(.{0,58}\S)?$")]


def _numbered(value: Any) -> Any:
    """`5` as the seeds 0 to 4."""
    plain = value if isinstance(value, (bool, list, tuple)) else number(value)
    return tuple(range(plain)) if isinstance(plain, int) and not isinstance(plain, bool) else plain


class TuneSpec(Spec):
    """A grid of learning rates and weight decays that every arm is given, before its cells are trained."""

    lr: tuple[Positive, ...] = ()
    """Peak learning rates to try; empty for the arm's own."""
    weight_decay: tuple[NonNegative, ...] = ()
    """Weight decays to try; empty for the arm's own."""
    tokens: Count | None = None
    """Training tokens of a tuning run; by default those of the study."""
    seed: Size = 100
    """Of the tuning runs; none of `seeds`, so that no cell is chosen by its own luck."""

    @model_validator(mode="after")
    def _something(self) -> TuneSpec:
        if not self.lr and not self.weight_decay:
            raise ValueError("give values to try, such as `lr: [1e-3, 2e-3, 4e-3]`")
        for name, values in (("lr", self.lr), ("weight_decay", self.weight_decay)):
            if len(set(values)) < len(values):
                raise ValueError(f"a value of {name} is here twice")
        return self

    def grid(self) -> list[dict[str, float]]:
        """The points, by dotted path, in the order in which ties are decided."""
        lrs = [{"train.lr": lr} for lr in self.lr] or [{}]
        decays = [{"train.weight_decay": decay} for decay in self.weight_decay] or [{}]
        return [{**lr, **decay} for lr in lrs for decay in decays]


class AnalysisSpec(Spec):
    """How arms are compared with the baseline."""

    metric: str | None = None
    """By default `test/loss`, or `valid/loss` where nothing is tested."""
    alpha: Annotated[float, BeforeValidator(number), Field(gt=0, lt=1)] = 0.05
    """Chance, over all arms, of claiming a difference that is none."""
    correction: Literal["holm", "dunnett", "none"] = "holm"
    """How that chance is kept when there are several arms."""
    smallest_effect: Positive | None = None
    """Smallest difference worth claiming, in units of the metric; by it an arm is called underpowered."""
    power: Annotated[float, BeforeValidator(number), Field(gt=0, lt=1)] = 0.8
    """Chance of finding the smallest effect that `dense-lab power` plans for."""

    @field_validator("metric")
    @classmethod
    def _known(cls, metric: str | None) -> str | None:
        if metric is not None and metric not in REPORTED:
            hint = did_you_mean(metric, REPORTED)
            raise ValueError(f"no metric named {metric!r}.{hint} Metrics: {', '.join(REPORTED)}")
        return metric


class AblateSpec(Spec):
    """Arms made from the study's own open values."""

    plan: Literal["one_at_a_time", "factorial"] = "one_at_a_time"
    """Each value changed by itself, starting from the baseline; or every combination."""
    baseline: dict[str, Any] = Field(default_factory=dict)
    """The point that arms are compared with, by path; where nothing is said, the first option or the lower end."""


class AblationSpec(Spec):
    """The keys of a study that make it an ablation."""

    arms: dict[ArmName, Overrides] = Field(default_factory=dict)
    """The architectures compared: name and what it changes in the study, by dotted path."""
    baseline: str | None = None
    """Name of the arm that the others are compared with; needed with `arms`."""
    seeds: Annotated[
        tuple[Size, ...],
        BeforeValidator(_numbered),
        Field(json_schema_extra={"x-also": {"type": "integer", "minimum": 1}}),
    ] = (0, 1, 2, 3, 4)
    """Every arm is trained with each of them; a number n stands for 0 to n - 1."""
    ablate: AblateSpec | None = None
    """Instead of `arms` and `baseline`: arms made from the study's open values."""
    tune: TuneSpec | None = None
    """Learning rates and weight decays that every arm may choose from; without it all use those written."""
    analysis: AnalysisSpec = AnalysisSpec()
    """How arms are compared."""

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds:
            raise ValueError("an ablation needs a seed at least: write `seeds: 5`")
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is here twice")
        return seeds


KEYS = tuple(AblationSpec.model_fields)
"""The keys of a study that make it an ablation."""
