"""The window of DenseSSM: the last m layers."""

from typing import Literal

from dense_lab.components import Pattern


class Recent(Pattern):
    """Layers l-1, ..., l-m (DenseSSM, arXiv 2403.00818, eq. 10)."""

    kind: Literal["recent"] = "recent"

    def layers(self, layer: int, span: int) -> tuple[int, ...]:
        """At most `span` layers, nearest first."""
        return tuple(range(layer - 1, max(layer - 1 - span, -1), -1))
