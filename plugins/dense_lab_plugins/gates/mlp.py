"""The gate of the DenseSSM paper and code: a two-layer perceptron with a bottleneck."""

from typing import Literal

from torch import nn

from dense_lab.components import Gate
from dense_lab.modules import GateModule
from dense_lab.units import Count
from dense_lab_plugins.gates.linear import MapGates


class MLPGate(Gate):
    """act(W2 silu(W1 x_t)) through a narrow bottleneck (DenseSSM, arXiv 2403.00818, section 3.2)."""

    kind: Literal["mlp"] = "mlp"
    bottleneck: Count | None = None
    """Hidden width; by default the layer's width divided by `reduction`."""
    reduction: Count = 32
    """The official code's divisor of the layer's width."""
    activation: Literal["silu", "sigmoid"] = "silu"
    """The official code applies silu a second time at the output, so that its gate is unbounded."""
    sharing: Literal["shared", "per_source"] = "shared"
    """One gate for all sources of a site, as in the official code, or one for each."""

    def build(self, x_width: int, width: int, sources: int) -> GateModule:
        """[B, T, x_width] -> gates [B, T, width]."""
        hidden = self.bottleneck or max(1, x_width // self.reduction)
        count = sources if self.sharing == "per_source" else 1
        layers = (nn.Linear(x_width, hidden, bias=False), nn.SiLU(), nn.Linear(hidden, width * count, bias=False))
        return MapGates(nn.Sequential(*layers), self.activation, count)
