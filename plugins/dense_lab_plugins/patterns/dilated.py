"""Every k-th layer."""

from typing import Literal

from dense_lab.components import Pattern
from dense_lab.units import Count


class Dilated(Pattern):
    """Layers l-k, l-2k, ..., l-mk (dilation of DenseFormer, arXiv 2402.02622, section 3, counted from l)."""

    kind: Literal["dilated"] = "dilated"
    dilation: Count = 2
    """k, the distance between layers read."""

    def layers(self, layer: int, span: int) -> tuple[int, ...]:
        """At most `span` layers, nearest first."""
        return tuple(i for i in (layer - self.dilation * j for j in range(1, span + 1)) if i >= 0)
