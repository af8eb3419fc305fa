"""Every earlier layer."""

from typing import Literal

from dense_lab.components import Pattern


class All(Pattern):
    """Layers l-1, ..., 0, whatever the span (DenseFormer, arXiv 2402.02622; MUDDFormer, arXiv 2502.12170)."""

    kind: Literal["all"] = "all"

    def layers(self, layer: int, span: int) -> tuple[int, ...]:
        """All layers below, nearest first."""
        return tuple(range(layer - 1, -1, -1))
