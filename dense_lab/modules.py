"""Interfaces of the torch modules that components build. Letters: B batch, T tokens, W stream width, m sources.

State is explicit, in and out, always: `None` stands for the zero state before the first token.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

Activation = Literal["none", "silu", "sigmoid"]
State = Any
"""A pytree (NamedTuple, tuple) of tensors whose first dimension is the batch; a 0-dimensional integer counts tokens."""
Streams = dict[str, Tensor]


class Stream(NamedTuple):
    """A per-token tensor [B, T, width] inside a core."""

    name: str
    width: int
    dense: bool = False
    """Whether later layers may read it and this layer may fuse earlier ones into it."""


class CoreModule(nn.Module):
    """A sequence mixer in two halves, between which dense connections act.

    Promises (`dense_lab.testing.CoreTests`): one pass = passes over pieces with the state handed on = token by token;
    outputs up to t do not depend on tokens after t; gradients are finite.
    """

    streams: tuple[Stream, ...]
    """Every tensor that `project` returns, in order."""

    @abstractmethod
    def project(self, x: Tensor, state: State) -> tuple[Streams, State]:
        """Per-token tensors of x [B, T, width], and the state with whatever this half carries moved on."""

    @abstractmethod
    def mix(self, streams: Streams, state: State) -> tuple[Tensor, State]:
        """The recurrence: y [B, T, width] and the state after the last token."""

    @abstractmethod
    def mixing_flops(self) -> float:
        """FLOPs per token of the recurrence alone (a multiply-add is 2), in recurrent form; linear maps are counted
        from their weights. The docstring names the source."""

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """The core without dense connections."""
        streams, state = self.project(x, state)
        return self.mix(streams, state)

    def undecayed(self) -> set[str]:
        """Names of parameters (relative to this module) that weight decay leaves alone, besides norms, biases."""
        return set()


class Selected(NamedTuple):
    """Sources after their projection, with the gates still to be applied, so that a fusion may do it in one pass."""

    values: tuple[Tensor, ...]
    """m tensors [B, T, W]."""
    gates: tuple[Tensor, ...]
    """Empty, one shared gate, or m gates, each [B, T, W], before the activation."""
    activation: Activation

    def gated(self) -> list[Tensor]:
        """m tensors [B, T, W] with the gates applied."""
        if not self.gates:
            return list(self.values)
        gates = [_ACTIVATIONS[self.activation](gate) for gate in self.gates]
        gates = gates * len(self.values) if len(gates) == 1 else gates
        return [gate * value for gate, value in zip(gates, self.values, strict=True)]


_ACTIVATIONS = {"none": lambda x: x, "silu": nn.functional.silu, "sigmoid": torch.sigmoid}


class GateModule(nn.Module):
    """Computes the gates of one site of one layer."""

    activation: Activation

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """() for no gate, one tensor [B, T, W] shared by all sources, or one for each, before the activation."""


class TransitionModule(nn.Module):
    """phi of one site of one layer."""

    @abstractmethod
    def forward(self, x: Tensor, sources: Sequence[Tensor]) -> Selected:
        """x [B, T, x_width] is the layer's own (normalised) input; sources are [B, T, source width] each."""


class FusionModule(nn.Module):
    """Joins the selected sources with the layer's own stream."""

    @abstractmethod
    def forward(self, own: Tensor, selected: Selected, norm: nn.RMSNorm | None) -> Tensor:
        """The fused stream [B, T, W], normalised at the end when `norm` is given."""


def normalised(x: Tensor, norm: nn.RMSNorm | None) -> Tensor:
    """`norm(x)`, or x itself when there is none."""
    return x if norm is None else norm(x)
