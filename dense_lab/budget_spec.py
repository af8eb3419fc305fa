"""The size that a study brings every architecture to."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from dense_lab.components import Spec
from dense_lab.units import Count, Fraction

Target = Literal["params", "flops_per_token", "state_bytes"]
Unknown = Literal["width", "ffn"]
HIDDEN = ("hidden", "width")
"""Names that a feed-forward layer may give to the field with its own width."""
TARGETS: tuple[Target, ...] = ("params", "flops_per_token", "state_bytes")


LOOSE = 0.15
"""Largest relative difference of what the budget is not about, FLOPs beside parameters or the other way round. Matching
one lets the other move: a projected dense stream trades 7 % of the FLOPs for parameters, a state that is read again
costs 10 % (the method's ablations in `studies/`, 9M parameters). A sixth more compute buys what many a dense connection
does, so that an arm with it is no longer of the same cost."""


class BudgetSpec(Spec):
    """A size that every arm is brought to, so that architectures are compared and not sizes. Exactly one target."""

    params: Count | None = None
    """Parameters that each model should have."""
    flops_per_token: Count | None = None
    """FLOPs of the forward pass per token, those of the head included."""
    state_bytes: Count | None = None
    """Bytes of one sequence's recurrent state."""
    count: Literal["non_embedding", "all"] = "non_embedding"
    """Which parameters: everything but the embedding and an untied head, so that vocabulary and width do not blur the
    comparison (Kaplan et al. 2020, section 2.1), or everything."""
    tolerance: Fraction = 0.05
    """Largest relative difference; a core whose width comes in multiples of s cannot do better by its width alone than
    about s / width."""
    flops_tolerance: Fraction = LOOSE
    """With another target than FLOPs: the largest relative difference of an arm's FLOPs per token from the baseline's
    for which the fairness certificate calls them alike. The solver does not look at it."""
    solve: tuple[Unknown, ...] = Field(("width",), json_schema_extra={"x-also": {"enum": ["width", "ffn"]}})
    """What is chosen to meet the budget, and so left out of the model: `width`; `ffn`, the hidden width of the
    feed-forward layers; or `[width, ffn]`, the width first and the feed-forward layers for the rest."""

    @model_validator(mode="before")
    @classmethod
    def _single_unknown(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("solve"), str):
            return {**value, "solve": [value["solve"]]}
        return value

    @model_validator(mode="after")
    def _one_target(self) -> BudgetSpec:
        given = [name for name in TARGETS if getattr(self, name) is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none of them"
            raise ValueError(f"give exactly one of {', '.join(TARGETS)}; got {got}")
        if not self.solve or len(set(self.solve)) < len(self.solve):
            raise ValueError("solve: name `width`, `ffn` or both, each once")
        if "ffn" in self.solve and self.state_bytes is not None:
            raise ValueError("feed-forward layers have no state: `solve: width` meets state_bytes")
        if "flops_tolerance" in self.model_fields_set and self.flops_per_token is not None:
            raise ValueError("`flops_tolerance` is for other targets: with flops_per_token, `tolerance` says it")
        if "count" in self.model_fields_set and self.params is None:
            raise ValueError(f"`count` says which parameters are counted: leave it out with {given[0]}")
        return self

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unused = {name for name in TARGETS if name != self.target} | ({"count"} if self.params is None else set())
        # Studies from before there was such a key mean the same as those that leave it out.
        unused |= {"flops_tolerance"} if self.flops_tolerance == LOOSE else set()
        dumped = {key: value for key, value in handler(self).items() if key not in unused}
        return {**dumped, "solve": self.solve[0] if len(self.solve) == 1 else list(self.solve)}

    @property
    def target(self) -> Target:
        """What is to be met."""
        return next(name for name in TARGETS if getattr(self, name) is not None)

    @property
    def amount(self) -> int:
        """How much of it."""
        return int(getattr(self, self.target))

    def decides(self, at: tuple[str | int, ...]) -> bool:
        """Whether the value at these keys of a study is what is solved, and so not to be written."""
        is_hidden = at[:1] == ("model",) and at[-2:-1] == ("ffn",) and at[-1] in HIDDEN
        return ("width" in self.solve and at == ("model", "width")) or ("ffn" in self.solve and is_hidden)
