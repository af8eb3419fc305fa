"""RetNet's retention layer as torchscale has it."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from dense_lab.components import Core
from dense_lab.errors import InputError
from dense_lab.modules import CoreModule, Stream, Streams
from dense_lab.units import Count, Positive
from dense_lab_plugins.cores.retention import Retention, RetentionState


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
        if width % (2 * self.heads) or values % self.heads:
            raise InputError(
                f"core retnet: width {width} and value width {values} must divide into {self.heads} heads of even key "
                f"width; try a width that is a multiple of {2 * self.heads}"
            )
        return RetNetModule(width, values, self.heads, self.norm_eps)


class RetNetModule(CoreModule):
    """See RetNet. Letters: H heads, K key width of a head, V value width of a head."""

    def __init__(self, width: int, values: int, heads: int, eps: float):
        super().__init__()
        self.heads, self.eps, self.scale = heads, eps, (width // heads) ** -0.5
        self.streams = (
            Stream("q", width),
            Stream("k", width, dense=True),
            Stream("v", values, dense=True),
            Stream("g", values),
        )
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, values, bias=False)
        self.g_proj = nn.Linear(width, values, bias=False)
        self.out_proj = nn.Linear(values, width, bias=False)
        self.out_proj.writes_residual = True
        self.retention = Retention(heads, width // heads)

    def project(self, x: Tensor, state: RetentionState | None) -> tuple[Streams, RetentionState | None]:
        """q, k (scaled), v and g of x [B, T, width]."""
        k = self.k_proj(x) * self.scale
        return {"q": self.q_proj(x), "k": k, "v": self.v_proj(x), "g": self.g_proj(x)}, state

    def mix(self, streams: Streams, state: RetentionState | None) -> tuple[Tensor, RetentionState]:
        """Retention, per-head norm, gate and output map."""
        q, k, v = (streams[name].unflatten(-1, (self.heads, -1)) for name in ("q", "k", "v"))
        o, state = self.retention(q, k, v, state)
        o = nn.functional.rms_norm(o, o.shape[-1:], eps=self.eps).flatten(-2)
        return self.out_proj(nn.functional.silu(streams["g"]) * o), state

    def mixing_flops(self) -> float:
        """State update and read, 4 K V per head, plus its decay, K V (RetNet, section 2.2)."""
        keys, values = self.streams[1].width, self.streams[2].width
        return 5.0 * keys * values / self.heads
