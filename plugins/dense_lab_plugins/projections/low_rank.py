"""A linear map of low rank."""

from typing import Literal

from torch import nn

from dense_lab.components import Projection
from dense_lab.units import Count


class LowRank(Projection):
    """Two bias-free linear maps through a bottleneck: a cheap form of `linear`."""

    kind: Literal["low_rank"] = "low_rank"
    rank: Count = 16
    """Width of the bottleneck."""

    def build(self, source_width: int, width: int) -> nn.Module:
        """[..., source_width] -> [..., rank] -> [..., width]."""
        return nn.Sequential(nn.Linear(source_width, self.rank, bias=False), nn.Linear(self.rank, width, bias=False))
