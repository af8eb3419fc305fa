"""The block of the official DenseRetNet: a gated attention unit with retention inside."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from dense_lab.components import Core
from dense_lab.maps import linear_maps
from dense_lab.modules import CoreModule, Streams
from dense_lab.norms import RMSNorm
from dense_lab.units import Count, Positive
from dense_lab_plugins.cores.retention import RetentionCore, RetentionState, check_heads


class GAURetNet(Core):
    """Gated-attention-unit RetNet (official DenseSSM code of arXiv 2403.00818; GAU: Hua et al. 2022, arXiv 2202.10447).

    q = silu(W_q x); k = silu(W_k x) / sqrt(K); v, g = silu(W_h x); o = retention(rotate(q), rotate(k), v);
    y = W_o(g * RMSNorm_head(o)), one norm weight shared by all heads. It needs no feed-forward layer behind it.
    Dense-able streams: k and v, after silu and scale and before rotation.
    """

    kind: Literal["gau_retnet"] = "gau_retnet"
    heads: Count = 2
    """H; the official 350M model has 2, the 1.3B model 4."""
    key_factor: Positive = 0.5
    """Total key width over layer width (query_key_dim over hidden_size)."""
    value_factor: Positive = 2.0
    """Total value width over layer width (v_factor)."""
    norm_eps: Positive = 1e-6
    """Epsilon of the per-head RMSNorm."""

    def build(self, width: int) -> CoreModule:
        """Raises InputError when width and heads do not divide."""
        keys, values = round(width * self.key_factor), round(width * self.value_factor)
        check_heads(self.kind, keys, values, self.heads)
        return GAURetNetModule(width, keys, values, self.heads, self.norm_eps)


class GAURetNetModule(RetentionCore):
    """See GAURetNet."""

    query_activation = stream_activation = "silu"

    def __init__(self, width: int, keys: int, values: int, heads: int, eps: float):
        super().__init__(width, keys, values, heads, RMSNorm(values // heads, eps))
        self.q_proj = nn.Linear(width, keys, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        # Values first, then the gate.
        self.hidden_proj = nn.Linear(width, 2 * values, bias=False)

    def project(self, x: Tensor, state: RetentionState | None) -> tuple[Streams, RetentionState | None]:
        """q, k, v and g of x [B, T, width], all before silu; that of q and g belongs to the other half."""
        maps = (self.q_proj.weight, self.k_proj.weight, self.hidden_proj.weight)
        q, k, v, g = linear_maps(x, maps, (1, 1, 2))
        return {"q": q, "k": k, "v": v, "g": g}, state
