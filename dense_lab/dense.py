"""Dense hidden connections: layer l reads streams of earlier layers at the same token (DenseSSM, arXiv 2403.00818).

    H = phi(h^{l-1}), ..., phi(h^{l-m})      selective transition, eq. 10-11 of the paper
    h' = Fuse(h, H)                          hidden fusion

On streams they add no recurrent state, so parallel, chunkwise and recurrent forms stay equal. On the recurrent state
itself (DenseMamba, figure 1 of the paper) there are two exact forms, in which h^{l-i} is the state of layer l-i's own
recurrence without anything fused into it:

    readout: y_t = C_t (h_t + sum_i g_i h^{l-i}_t)                       the state handed on stays unfused
    carried: h'_t = A_t h'_{t-1} + B_t x_t + sum_i g_i h^{l-i}_t         the state handed on is the fused one

A layer reads states by running the earlier layers' recurrences again, so that none is ever stored over time. `readout`
adds no recurrent state. `carried` adds the unfused state of each layer that is read and is itself fused, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, ModelWrapValidatorHandler, model_validator
from torch import Tensor

from dense_lab.components import FusionSlot, PatternSlot, Spec, TransitionSlot
from dense_lab.errors import InputError, did_you_mean
from dense_lab.maps import rounded
from dense_lab.modules import (
    CoreModule,
    GateModule,
    RawFusionModule,
    RawGate,
    RawStreams,
    Selected,
    StateConnection,
    StateSite,
    Stream,
    activated,
)
from dense_lab.norms import RMSNorm
from dense_lab.units import Size


class DenseSpec(Spec):
    """A dense connection; `none` and `span: 0` both mean the plain core, parameters included."""

    kind: Literal["densessm"] = "densessm"
    span: Size = 1
    """m, how many earlier layers a layer reads."""
    sites: tuple[str, ...] | Literal["all"] = "all"
    """Names of the core's dense-able streams and state sites that are connected; `all`: every such stream, no state."""
    pattern: PatternSlot = "recent"  # type: ignore[assignment]
    """Which earlier layers."""
    transition: TransitionSlot = "gated"  # type: ignore[assignment]
    """phi: projection x gate of what is read."""
    site_transitions: dict[str, TransitionSlot] = Field(default={})
    """phi of single sites where it differs from `transition`: the released DenseRetNets gate k and v unlike."""
    fusion: FusionSlot = "add"  # type: ignore[assignment]
    """How it joins the layer's own stream."""
    norm: Literal["none", "rmsnorm"] = "rmsnorm"
    """What a fused stream goes through; states never do. The official code has an RMSNorm that the paper's figure
    lacks."""
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

    def build(
        self, site: Stream | StateSite, x_width: int, source_widths: Sequence[int], eps: float
    ) -> DenseConnection:
        """The connection of one site of one layer."""
        return DenseConnection(self, site, x_width, source_widths, eps)

    def chosen_sites(self, core: CoreModule) -> tuple[Stream | StateSite, ...]:
        """The places of a core that are connected; raises InputError for a name the core does not offer."""
        streams = {stream.name: stream for stream in core.streams if stream.dense}
        offered: dict[str, Stream | StateSite] = {**streams, **{site.name: site for site in core.state_sites}}
        sites = tuple(streams) if self.sites == "all" else self.sites
        for key, names, known in (("sites", sites, offered), ("site_transitions", self.site_transitions, sites)):
            for name in names:
                if name not in known:
                    raise InputError(
                        f"{key}: no dense-able stream {name!r}.{did_you_mean(name, known)} It has: {', '.join(known)}"
                    )
        return tuple(offered[name] for name in sites)


class DenseConnection(StateConnection):
    """The dense connection of one site of one layer: own stream and sources in, fused stream out.

    The identity at initialisation when the fusion is and there is no norm.
    """

    def __init__(
        self, spec: DenseSpec, site: Stream | StateSite, x_width: int, source_widths: Sequence[int], eps: float
    ):
        super().__init__()
        self.width, self._site, self._fuses = site.width, site.name, spec.fusion
        transition = spec.site_transitions.get(site.name, spec.transition)
        self.transition = transition.build(x_width, source_widths, site.width)
        self.fusion = spec.fusion.build(x_width, site.width, len(source_widths))
        self.norm = RMSNorm(site.width, eps) if spec.norm == "rmsnorm" and isinstance(site, Stream) else None
        if isinstance(site, StateSite) and site.form == "carried" and self._scaling() is None:
            raise InputError(
                f"site {site.name} sums gated states inside the recurrence: it needs projection identity and fusion "
                f"add, got transition {transition.model_dump()} and fusion {spec.fusion.kind_name()}; "
                f"a readout site takes any"
            )

    def _scaling(self) -> GateModule | None:
        """The gate, when the connection is own + sum of gate * source."""
        return self.transition.scaling() if self.norm is None and self.fusion.joins == "by_adding" else None

    def forward(self, x: Tensor, own: Tensor, sources: Sequence[Tensor]) -> Tensor:
        """x [B, T, x_width] is the layer's input, own [B, T, W], sources [B, T, source width] each; gives [B, T, W]."""
        selected: Selected = self.transition(x, sources)
        return self._checked(self.fusion(own, selected, self.norm), own)

    def _checked(self, fused: Tensor, own: Tensor) -> Tensor:
        """`fused`; raises InputError when it cannot take the place of own."""
        # Where shapes broadcast, a wrong one would train silently.
        if fused.shape != own.shape:
            raise InputError(
                f"fusion {self._fuses.kind_name()!r} (defined at {self._fuses.origin()}) makes a tensor of shape "
                f"{list(fused.shape)} of stream {self._site}, expected {list(own.shape)}, the shape of the layer's own"
            )
        return fused

    def takes_raw(self) -> bool:
        """Whether `fuse_raw` can be called."""
        return isinstance(self.fusion, RawFusionModule) and self.transition.scaling() is not None

    def first_map(self) -> list[Tensor]:
        """Weights whose product with x `fuse_raw` wants."""
        gate = self.transition.scaling()
        weights = gate.bottleneck() if gate is not None else None
        return [] if weights is None else [weights[0]]

    def fuse_raw(self, x: Tensor, raw: RawStreams, mapped: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """As `forward` on what `project` gave; also gives own as it came, see `RawFusionModule.fuse_raw`.

        mapped: x by the maps of `first_map`.
        """
        gate = self.transition.scaling()
        if gate is None or not isinstance(self.fusion, RawFusionModule):
            raise TypeError(f"{type(self.fusion).__name__} takes finished streams only")
        weights = gate.bottleneck()
        if weights is None:
            found = RawGate(gate(x), None, None, gate.activation)
        else:
            (hidden,) = mapped
            found = RawGate((), hidden, rounded(weights[1], hidden.dtype), gate.activation)
        fused, own = self.fusion.fuse_raw(raw, found, self.norm)
        return self._checked(fused, raw.own), own

    def gates(self, x: Tensor, sources: int) -> tuple[Tensor, ...] | None:
        """Activated gates [B, T, W], one per source, when the connection is own + sum of gate * source, else None."""
        gate = self._scaling()
        if gate is None:
            return None
        found = tuple(activated(value, gate.activation) for value in gate(x))
        found = found or (x.new_ones(()).expand(*x.shape[:2], self.width),)
        return found * sources if len(found) == 1 else found
