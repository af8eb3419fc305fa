"""No gate."""

from typing import Literal

from torch import Tensor

from dense_lab.components import Gate
from dense_lab.modules import GateModule


class NoGate(Gate):
    """Sources pass ungated."""

    kind: Literal["none"] = "none"

    def build(self, x_width: int, width: int, sources: int) -> GateModule:
        """A module that gives no gates."""
        return _NoGates()


class _NoGates(GateModule):
    activation = "none"

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return ()
