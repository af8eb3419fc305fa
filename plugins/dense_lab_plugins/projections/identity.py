"""No projection at all, as in the official DenseSSM code."""

from typing import Literal

from torch import nn

from dense_lab.components import Projection
from dense_lab.errors import InputError


class Identity(Projection):
    """The source as it is (official DenseSSM code; the released weights hold no projections)."""

    kind: Literal["identity"] = "identity"

    def build(self, source_width: int, width: int) -> nn.Module:
        """An identity; raises InputError when the widths differ."""
        if source_width != width:
            raise InputError(
                f"projection identity cannot map a source of width {source_width} to {width}: use linear or low_rank"
            )
        return nn.Identity()
