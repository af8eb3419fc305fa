"""Dense hidden connections: layer l reads streams of earlier layers at the same token (DenseSSM, arXiv 2403.00818).

    H = phi(h^{l-1}), ..., phi(h^{l-m})      selective transition, eq. 10-11 of the paper
    h' = Fuse(h, H)                          hidden fusion

They add no recurrent state, so parallel, chunkwise and recurrent forms stay equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, ModelWrapValidatorHandler, model_validator
from torch import Tensor, nn

from dense_lab.components import FusionSlot, PatternSlot, Spec, TransitionSlot
from dense_lab.errors import InputError, did_you_mean
from dense_lab.modules import Selected, Stream
from dense_lab.norms import RMSNorm
from dense_lab.units import Size


class DenseSpec(Spec):
    """A dense connection; `none` and `span: 0` both mean the plain core, parameters included."""

    kind: Literal["densessm"] = "densessm"
    span: Size = 1
    """m, how many earlier layers a layer reads."""
    sites: tuple[str, ...] | Literal["all"] = "all"
    """Names of the core's dense-able streams that are connected, or all of them."""
    pattern: PatternSlot = "recent"  # type: ignore[assignment]
    """Which earlier layers."""
    transition: TransitionSlot = "gated"  # type: ignore[assignment]
    """phi: projection x gate of what is read."""
    site_transitions: dict[str, TransitionSlot] = Field(default={})
    """phi of single sites where it differs from `transition`: the released DenseRetNets gate k and v unlike."""
    fusion: FusionSlot = "add"  # type: ignore[assignment]
    """How it joins the layer's own stream."""
    norm: Literal["none", "rmsnorm"] = "rmsnorm"
    """What the fused stream goes through. The official code has an RMSNorm that the paper's figure lacks."""
    owners: Literal["reading", "every"] = "reading"
    """Which layers own the parameters of a connection: those that have something to read, or every layer, as in the
    official code, whose first layer keeps some that no gradient ever reaches."""

    @model_validator(mode="wrap")
    @classmethod
    def _one_spelling_of_plain(cls, value: Any, handler: ModelWrapValidatorHandler[DenseSpec]) -> DenseSpec:
        """All plain cores are one architecture, so they get one spec and one hash."""
        if value == "none" or (isinstance(value, dict) and value == {"kind": "none"}):
            return handler({"span": 0})
        spec = handler({} if value == "densessm" else value)
        return handler({"span": 0}) if spec.span == 0 and len(spec.model_fields_set) > 1 else spec

    def chosen_sites(self, streams: Sequence[Stream]) -> tuple[Stream, ...]:
        """The streams of a core that are connected; raises InputError for a name the core does not offer."""
        offered = {stream.name: stream for stream in streams if stream.dense}
        sites = tuple(offered) if self.sites == "all" else self.sites
        for key, names, known in (("sites", sites, offered), ("site_transitions", self.site_transitions, sites)):
            for name in names:
                if name not in known:
                    raise InputError(
                        f"{key}: no dense-able stream {name!r}.{did_you_mean(name, known)} It has: {', '.join(known)}"
                    )
        return tuple(offered[name] for name in sites)


class DenseConnection(nn.Module):
    """The dense connection of one site of one layer: own stream and sources in, fused stream out."""

    def __init__(self, spec: DenseSpec, site: Stream, x_width: int, source_widths: Sequence[int], eps: float):
        super().__init__()
        transition = spec.site_transitions.get(site.name, spec.transition)
        self.transition = transition.build(x_width, source_widths, site.width)
        self.fusion = spec.fusion.build(x_width, site.width, len(source_widths))
        self.norm = RMSNorm(site.width, eps) if spec.norm == "rmsnorm" else None

    def forward(self, x: Tensor, own: Tensor, sources: Sequence[Tensor]) -> Tensor:
        """x [B, T, x_width] is the layer's input, own [B, T, W], sources [B, T, source width] each; gives [B, T, W]."""
        selected: Selected = self.transition(x, sources)
        fused: Tensor = self.fusion(own, selected, self.norm)
        return fused
