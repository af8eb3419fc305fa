"""The first layers only."""

from typing import Literal

from dense_lab.components import Pattern


class First(Pattern):
    """Layers 0, ..., m-1, as far as they lie below (value residual of ResFormer, arXiv 2410.17897, has m = 1)."""

    kind: Literal["first"] = "first"

    def layers(self, layer: int, span: int) -> tuple[int, ...]:
        """At most `span` layers, nearest first."""
        return tuple(range(min(layer, span) - 1, -1, -1))
