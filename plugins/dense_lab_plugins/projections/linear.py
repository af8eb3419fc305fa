"""A linear map of the source, as in the DenseSSM paper."""

from typing import Literal

from torch import nn

from dense_lab.components import Projection


class Linear(Projection):
    """Linear(h) without bias (DenseSSM, arXiv 2403.00818, section 3.2)."""

    kind: Literal["linear"] = "linear"

    def build(self, source_width: int, width: int) -> nn.Module:
        """A bias-free linear map [..., source_width] -> [..., width]."""
        return nn.Linear(source_width, width, bias=False)
