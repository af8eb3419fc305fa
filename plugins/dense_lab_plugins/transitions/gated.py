"""The selective transition of DenseSSM."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from dense_lab.components import Gate, GateSlot, Projection, ProjectionSlot, Transition
from dense_lab.modules import GateModule, Selected, TransitionModule


class Gated(Transition):
    """phi(h) = projection(h) * gate(x_t) (DenseSSM, arXiv 2403.00818, eq. 12)."""

    kind: Literal["gated"] = "gated"
    projection: ProjectionSlot = "identity"  # type: ignore[assignment]
    """What a source goes through; one module for each source."""
    gate: GateSlot = "mlp"  # type: ignore[assignment]
    """The factor computed from the current layer's input."""

    def build(self, x_width: int, source_widths: Sequence[int], width: int) -> TransitionModule:
        """See `Transition.build`."""
        return _GatedModule(self.projection, self.gate, x_width, source_widths, width)


class _GatedModule(TransitionModule):
    def __init__(self, projection: Projection, gate: Gate, x_width: int, source_widths: Sequence[int], width: int):
        super().__init__()
        self.projections = nn.ModuleList(projection.build(source, width) for source in source_widths)
        self.gate = gate.build(x_width, width, len(source_widths))

    def forward(self, x: Tensor, sources: Sequence[Tensor]) -> Selected:
        values = tuple(projection(source) for projection, source in zip(self.projections, sources, strict=True))
        return Selected(values, self.gate(x), self.gate.activation)

    def scaling(self) -> GateModule | None:
        return self.gate if all(isinstance(projection, nn.Identity) for projection in self.projections) else None
