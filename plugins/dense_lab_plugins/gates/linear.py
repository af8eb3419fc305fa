"""A gate that is linear in the layer's input."""

from typing import Literal

from torch import Tensor, nn

from dense_lab.components import Gate
from dense_lab.modules import Activation, GateModule


class LinearGate(Gate):
    """act(W x_t): one linear map of the layer's input."""

    kind: Literal["linear"] = "linear"
    activation: Literal["silu", "sigmoid"] = "sigmoid"
    """Sigmoid bounds the gate to (0, 1); silu does not."""
    sharing: Literal["shared", "per_source"] = "shared"
    """One gate for all sources of a site, or one for each."""

    def build(self, x_width: int, width: int, sources: int) -> GateModule:
        """[B, T, x_width] -> gates [B, T, width]."""
        count = sources if self.sharing == "per_source" else 1
        return MapGates(nn.Linear(x_width, width * count, bias=False), self.activation, count)


class MapGates(GateModule):
    """Gates cut from the output of one map of x."""

    def __init__(self, map: nn.Module, activation: Activation, count: int):
        super().__init__()
        self.map, self.activation, self.count = map, activation, count

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """`count` tensors [B, T, W], before the activation."""
        gates: Tensor = self.map(x)
        return tuple(gates.chunk(self.count, -1)) if self.count > 1 else (gates,)

    def bottleneck(self) -> tuple[Tensor, Tensor] | None:
        """See `GateModule.bottleneck`."""
        if self.count > 1 or not isinstance(self.map, nn.Sequential):
            return None
        first, _, second = self.map
        return first.weight, second.weight
