"""RetNet's retention layer as torchscale has it."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from dense_lab.components import Core
from dense_lab.maps import linear_maps
from dense_lab.modules import CoreModule, Streams
from dense_lab.norms import RMSNorm
from dense_lab.units import Count, Positive
from dense_lab_plugins.cores.retention import RetentionCore, RetentionState, check_heads


class RetNet(Core):
    """Multi-scale retention (Sun et al. 2023, arXiv 2307.08621, eq. 5-8), the layer of torchscale.

    q, k, v, g = W x; o = retention(rotate(q), rotate(k / sqrt(K)), v); y = W_o(silu(g) * RMSNorm_head(o)).
    Dense-able streams: k and v (DenseRetNet).
    """

    kind: Literal["retnet"] = "retnet"
    heads: Count = 4
    """H; width / heads is the key width K of a head and must be even."""
    value_factor: Positive = 2.0
    """Total value width over layer width; torchscale and the paper use 2."""
    norm_eps: Positive = 1e-6
    """Epsilon of the per-head RMSNorm, which has no weight."""

    def build(self, width: int) -> CoreModule:
        """Raises InputError when width and heads do not divide."""
        values = round(width * self.value_factor)
        check_heads(self.kind, width, values, self.heads)
        return RetNetModule(width, values, self.heads, self.norm_eps)


class RetNetModule(RetentionCore):
    """See RetNet."""

    def __init__(self, width: int, values: int, heads: int, eps: float):
        super().__init__(width, width, values, heads, RMSNorm(values // heads, eps, elementwise_affine=False))
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, values, bias=False)
        self.g_proj = nn.Linear(width, values, bias=False)

    def project(self, x: Tensor, state: RetentionState | None) -> tuple[Streams, RetentionState | None]:
        """q, k (before its scale), v and g (before silu) of x [B, T, width]."""
        maps = (self.q_proj, self.k_proj, self.v_proj, self.g_proj)
        q, k, v, g = linear_maps(x, [linear.weight for linear in maps])
        return {"q": q, "k": k, "v": v, "g": g}, state
