"""A plugin whose components are wrong in the ways that a look before training is to find; loaded as a loose file."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from dense_lab.components import FFN, Core, Fusion
from dense_lab.hookspecs import hookimpl
from dense_lab.modules import CoreModule, FusionModule, Selected, State, Stream, Streams

How = Literal["fine", "next", "batch", "shape", "device", "nan"]


def spoiled(x: Tensor, how: How) -> Tensor:
    """x [B, T, W], and a little of what it must not see."""
    match how:
        case "next":
            return x + 0.01 * nn.functional.pad(x, (0, 0, 0, 1))[:, 1:]
        case "batch":
            return x - x.mean((0, 1))
        case "shape":
            return x[..., :-1]
        case "device":
            raise RuntimeError("needs a\nGPU")
        case "nan":
            return x / 0 - x / 0
    return x


class OddFusion(Fusion):
    """A fusion."""

    kind: Literal["odd"] = "odd"
    how: How = "fine"
    """What it does wrong."""

    def build(self, x_width: int, width: int, sources: int) -> FusionModule:
        """The module."""
        return _Fusion(self.how)


class _Fusion(FusionModule):
    def __init__(self, how: How) -> None:
        super().__init__()
        self.how = how

    def forward(self, own: Tensor, selected: Selected, norm: nn.RMSNorm | None) -> Tensor:
        return spoiled(sum(selected.gated(), own), self.how)


class OddCore(Core):
    """A core that has no memory."""

    kind: Literal["odd"] = "odd"
    how: How = "fine"
    """What it does wrong."""

    def build(self, width: int) -> CoreModule:
        """The module."""
        return _Core(width, self.how)


class _Core(CoreModule):
    def __init__(self, width: int, how: How) -> None:
        super().__init__()
        self.streams = (Stream("v", width, dense=True),)
        self.how = how

    def project(self, x: Tensor, state: State) -> tuple[Streams, State]:
        return {"v": x}, state

    def mix(self, streams: Streams, state: State) -> tuple[Tensor, State]:
        return spoiled(streams["v"], self.how), state

    def mixing_flops(self) -> float:
        return 1.0


class OddFFN(FFN):
    """A feed-forward layer that normalises over the batch."""

    kind: Literal["odd"] = "odd"

    def build(self, width: int) -> nn.Module:
        """The module."""
        return _Normed(width)


class _Normed(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = torch.transpose(super().forward(x.transpose(1, 2)), 1, 2)
        return normed


@hookimpl
def register_components(register: Any) -> None:
    """All of them."""
    for component in (OddFusion, OddCore, OddFFN):
        register(component)
