"""Fusion by addition, the paper's default."""

from typing import Literal

from torch import Tensor, nn

from dense_lab.components import Fusion
from dense_lab.modules import FusionModule, RawFusionModule, RawGate, RawStreams, Selected
from dense_lab_kernels import dense_fuse
from dense_lab_kernels.dense_fuse import Bottleneck


class Add(Fusion):
    """h + sum of the selected sources (DenseSSM, arXiv 2403.00818, section 3.2), norm included in one pass."""

    kind: Literal["add"] = "add"

    def build(self, x_width: int, width: int, sources: int) -> FusionModule:
        """A module without parameters."""
        return _AddModule()


class _AddModule(RawFusionModule):
    joins = "by_adding"

    def forward(self, own: Tensor, selected: Selected, norm: nn.RMSNorm | None) -> Tensor:
        gate = selected.gates[0] if len(selected.gates) == 1 else selected.gates or None
        weight, eps = (norm.weight, norm.eps) if norm is not None else (None, None)
        return dense_fuse(own, selected.values, gate, weight, activation=selected.activation, eps=eps or 1e-6)

    def fuse_raw(self, raw: RawStreams, gate: RawGate, norm: nn.RMSNorm | None) -> tuple[Tensor, Tensor]:
        factors = gate.factors[0] if len(gate.factors) == 1 else gate.factors or None
        if gate.hidden is not None and gate.second is not None:
            factors = Bottleneck(gate.hidden, gate.second)
        weight, eps = (norm.weight, norm.eps) if norm is not None else (None, None)
        return dense_fuse(
            raw.own,
            raw.sources,
            factors,
            weight,
            activation=gate.activation,
            stream_activation=raw.stream.activation,
            scale=raw.stream.scale,
            eps=eps or 1e-6,
            returning="fused and own",
        )
