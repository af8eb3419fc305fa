"""No feed-forward layer."""

from typing import Literal

from torch import nn

from dense_lab.components import FFN


class NoFFN(FFN):
    """The core alone, as in Mamba (arXiv 2312.00752) and the official DenseRetNet."""

    kind: Literal["none"] = "none"

    def build(self, width: int) -> nn.Module | None:
        """None."""
        return None
