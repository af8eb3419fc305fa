"""Gated feed-forward layers: SwiGLU, and torchscale's."""

from typing import Literal

from torch import Tensor, nn

from dense_lab.components import FFN
from dense_lab.maps import linear_maps
from dense_lab.units import Count


class SwiGLU(FFN):
    """W2(silu(W1 x) * W3 x) without biases (Shazeer 2020, arXiv 2002.05202)."""

    kind: Literal["swiglu"] = "swiglu"
    hidden: Count | None = None
    """Hidden width; by default 8/3 of the layer's width, rounded up to a multiple of 16."""

    def build(self, width: int) -> nn.Module | None:
        """[B, T, width] -> [B, T, width]."""
        return GatedFFN(width, self.hidden or -(-width * 8 // 3 // 16) * 16, nn.SiLU())


class TorchscaleGLU(FFN):
    """W2(act(W1 x) * W3 x) without biases, as in torchscale's RetNet decoder (arXiv 2307.08621, section 2.3)."""

    kind: Literal["torchscale"] = "torchscale"
    hidden: Count | None = None
    """Hidden width; by default 5/3 of the layer's width, as in torchscale's RetNet configuration."""
    activation: Literal["gelu", "swish"] = "gelu"
    """Exact GELU, or SiLU."""

    def build(self, width: int) -> nn.Module | None:
        """[B, T, width] -> [B, T, width]."""
        act = nn.GELU() if self.activation == "gelu" else nn.SiLU()
        return GatedFFN(width, self.hidden or width * 5 // 3, act)


class GatedFFN(nn.Module):
    """fc2(act(fc1(x)) * gate(x))."""

    def __init__(self, width: int, hidden: int, act: nn.Module):
        super().__init__()
        self.act = act
        self.fc1 = nn.Linear(width, hidden, bias=False)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, width, bias=False)
        self.fc2.writes_residual = True

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        hidden, gate = linear_maps(x, [self.fc1.weight, self.gate.weight])
        (out,) = linear_maps(self.act(hidden) * gate, [self.fc2.weight])
        return out
