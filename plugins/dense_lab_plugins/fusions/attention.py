"""Fusion by attention over the sources."""

from typing import Literal

import torch
from torch import Tensor, nn

from dense_lab.components import Fusion
from dense_lab.modules import FusionModule, Selected, normalised
from dense_lab.units import Count


class Attention(Fusion):
    """h + softmax_i(q . k_i) H_i over the sources of one token, q from h, k_i from H_i after an RMSNorm.

    DenseSSM (arXiv 2403.00818, section 3.2) names cross-attention; keys are normalised as in Attention Residuals
    (arXiv 2603.15031). The query starts at zero, so every source starts with weight 1/m. Not the identity at
    initialisation.
    """

    kind: Literal["attention"] = "attention"
    head_width: Count = 32
    """Width of queries and keys."""

    def build(self, x_width: int, width: int, sources: int) -> FusionModule:
        """Two bias-free maps width -> head_width."""
        return _AttentionModule(width, self.head_width, sources)


class _AttentionModule(FusionModule):
    def __init__(self, width: int, head_width: int, sources: int):
        super().__init__()
        self.query = nn.Linear(width, head_width, bias=False)
        self.key = nn.Linear(width, head_width, bias=False)
        self.key.applications = sources
        self.key_norm = nn.RMSNorm(width, eps=1e-6)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.query.weight)

    def forward(self, own: Tensor, selected: Selected, norm: nn.RMSNorm | None) -> Tensor:
        values = torch.stack(selected.gated(), -2)  # [B, T, m, W]
        keys = self.key(self.key_norm(values))  # [B, T, m, head_width]
        scores = torch.einsum("btd,btmd->btm", self.query(own), keys) * keys.shape[-1] ** -0.5
        return normalised(own + torch.einsum("btm,btmw->btw", scores.softmax(-1), values), norm)
