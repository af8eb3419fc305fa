"""Fusion by concatenation and projection."""

from typing import Literal

import torch
from torch import Tensor, nn

from dense_lab.components import Fusion
from dense_lab.modules import FusionModule, Selected, normalised


class Concat(Fusion):
    """h + W [h; H_1; ...; H_m] (DenseSSM, arXiv 2403.00818, section 3.2 names concatenation).

    W starts at zero, so the fusion is the identity at initialisation, before the norm.
    """

    kind: Literal["concat"] = "concat"

    def build(self, x_width: int, width: int, sources: int) -> FusionModule:
        """One bias-free map from (sources + 1) * width to width."""
        return _ConcatModule(width, sources)


class _ConcatModule(FusionModule):
    def __init__(self, width: int, sources: int):
        super().__init__()
        self.out = nn.Linear(width * (sources + 1), width, bias=False)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.out.weight)

    def forward(self, own: Tensor, selected: Selected, norm: nn.RMSNorm | None) -> Tensor:
        return normalised(own + self.out(torch.cat([own, *selected.gated()], -1)), norm)
