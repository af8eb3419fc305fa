"""A plugin whose components are wrong in the ways that a look before training is to find; loaded as a loose file."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dense_lab.components import FFN, Core, Fusion, Gate
from dense_lab.hookspecs import hookimpl
from dense_lab.modules import CoreModule, FusionModule, GateModule, Selected, State, Stream, Streams

How = Literal["fine", "next", "chunk", "evaluating", "batch", "row", "shape", "device", "nan", "drifting", "table"]
_calls = itertools.count()


def spoiled(x: Tensor, how: How) -> Tensor:
    """x [B, T, W], and a little of what it must not see."""
    match how:
        case "next":
            return x + 0.01 * nn.functional.pad(x, (0, 0, 0, 1))[:, 1:]
        case "chunk":  # Of 64 tokens: each sees the one behind it.
            return x + nn.functional.pad(x, (0, 0, 0, 64))[:, 64:]
        case "batch":
            return x - x.mean((0, 1))
        case "row":
            return x + torch.cat([0 * x[:1], x[:-1]])
        case "drifting":
            return x + torch.linspace(0, next(_calls), x.shape[-1])
        case "shape":
            return x[..., :-1]
        case "table":  # Of 64 positions.
            return x + torch.zeros(64, x.shape[-1])[: x.shape[1]]
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
        how = "fine" if self.how == "evaluating" and self.training else self.how
        return spoiled(sum(selected.gated(), own), "next" if how == "evaluating" else how)


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


class OddGate(Gate):
    """A gate that sees the next token."""

    kind: Literal["odd"] = "odd"

    def build(self, x_width: int, width: int, sources: int) -> GateModule:
        """The module."""
        return _Gate(x_width, width, bias=False)


class _Gate(nn.Linear, GateModule):
    activation = "none"

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (spoiled(super().forward(x), "next"),)


class ManyFusion(Fusion):
    """A fusion that sees the next token once there are two sources."""

    kind: Literal["many"] = "many"

    def build(self, x_width: int, width: int, sources: int) -> FusionModule:
        """The module."""
        return _Fusion("next" if sources > 1 else "fine")


@hookimpl
def register_components(register: Any) -> None:
    """All of them."""
    for component in (OddFusion, OddCore, OddFFN, OddGate, ManyFusion):
        register(component)
