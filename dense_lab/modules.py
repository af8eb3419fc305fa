"""Interfaces of the torch modules that components build. Letters: B batch, T tokens, W stream width, m sources.

State is explicit, in and out, always: `None` stands for the zero state before the first token.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
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
    activation: Activation = "none"
    scale: float = 1.0
    """What `project` leaves to be done: the stream is scale * activation(what it gives). A fusion may do it in its own
    pass over memory."""

    def finished(self, raw: Tensor) -> Tensor:
        """The stream [B, T, width] from what `project` gives."""
        stream = activated(raw, self.activation)
        return stream if self.scale == 1 else stream * self.scale


class StateSite(NamedTuple):
    """A place where the recurrent state itself is connected: it reads the states of earlier layers at the same token.

    The states that it reads are those of the earlier layers' own recurrences, without what is fused into them, and are
    never stored over time.
    """

    name: str
    width: int
    """W: of what is read out of a state, and of the gates."""
    form: Literal["readout", "carried"]
    """`readout`: only what is read out of the state is fused, so that every projection and fusion can act on it.
    `carried`: the fused state is the one handed on. Inside a recurrence there is only a sum of gated states."""
    family: str
    """Layers of one family can run each other's recurrences; others are passed over."""
    sizes: Mapping[str, int]
    """What must be equal in both layers, by name."""
    flops: float
    """FLOPs per token to run one source's recurrence and read it, in recurrent form."""


@dataclass
class Recurrence:
    """The recurrence of one layer over one piece, without what is fused into its state, for later layers."""

    inputs: Any
    """What layers of the family agreed on."""
    start: Tensor | None
    """State before the piece; None is zero."""
    end: Tensor | None
    """State after it; None until a reader that ran the recurrence has put it here."""


class StateConnection(nn.Module):
    """The dense connection of one state site of one layer."""

    @abstractmethod
    def forward(self, x: Tensor, own: Tensor, sources: Sequence[Tensor]) -> Tensor:
        """The layer's input x and read-outs [B, T, W] of its own state and of the sources -> the fused one."""

    @abstractmethod
    def gates(self, x: Tensor, sources: int) -> tuple[Tensor, ...] | None:
        """Activated gates [B, T, W], one per source, when the connection is own + sum of gate * source, else None."""


class StateReads(NamedTuple):
    """What one state site of a layer reads in one pass."""

    x: Tensor
    """[B, T, x_width], the layer's (normalised) input."""
    connection: StateConnection
    sources: tuple[Recurrence, ...]
    """Nearest first."""

    def gates(self) -> tuple[Tensor, ...] | None:
        """One [B, T, W] per source, or None; see `StateConnection.gates`."""
        return self.connection.gates(self.x, len(self.sources))

    def fused(self, own: Tensor, sources: Sequence[Tensor]) -> Tensor:
        """Read-outs [B, T, W] of this layer's state and of the sources' -> the fused one."""
        fused: Tensor = self.connection(self.x, own, sources)
        return fused


NOTHING_READ: Mapping[str, StateReads] = {}


class CoreModule(nn.Module):
    """A sequence mixer in two halves, between which dense connections act.

    Promises (`dense_lab.testing.CoreTests`): one pass = passes over pieces with the state handed on = token by token;
    outputs up to t do not depend on tokens after t; gradients are finite.
    """

    streams: tuple[Stream, ...]
    """Every tensor that `project` returns, in order."""
    state_sites: tuple[StateSite, ...] = ()
    """Where its state can be connected; a core with any takes `reads` in `mix` and has `recurrence`."""

    @abstractmethod
    def project(self, x: Tensor, state: State) -> tuple[Streams, State]:
        """Per-token tensors of x [B, T, width], each as its `Stream` declares, and the state with whatever this half
        carries moved on."""

    def finished(self, raw: Streams, besides: Collection[str] = ()) -> Streams:
        """What `mix` reads, from what `project` gives; the streams named `besides` stay raw."""
        return raw | {s.name: s.finished(raw[s.name]) for s in self.streams if s.name not in besides}

    @abstractmethod
    def mix(self, streams: Streams, state: State) -> tuple[Tensor, State]:
        """The recurrence: y [B, T, width] and the state after the last token.

        Cores with state sites take a third argument, `reads: Mapping[str, StateReads] = NOTHING_READ`, by site.
        """

    def recurrence(self, streams: Streams, before: State, after: State) -> Recurrence:
        """For later layers that read this layer's state: the recurrence that `mix` ran on `streams` from `before`, as
        `project` left it, to `after`."""
        raise NotImplementedError(f"{type(self).__name__} has no state sites")

    @abstractmethod
    def mixing_flops(self) -> float:
        """FLOPs per token of the recurrence alone (a multiply-add is 2), in recurrent form; linear maps are counted
        from their weights. The docstring names the source."""

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """The core without dense connections."""
        streams, state = self.project(x, state)
        return self.mix(self.finished(streams), state)

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
        gates = [activated(gate, self.activation) for gate in self.gates]
        gates = gates * len(self.values) if len(gates) == 1 else gates
        return [gate * value for gate, value in zip(gates, self.values, strict=True)]


_ACTIVATIONS = {"none": lambda x: x, "silu": nn.functional.silu, "sigmoid": torch.sigmoid}


def activated(gate: Tensor, activation: Activation) -> Tensor:
    """The gate as it multiplies."""
    result: Tensor = _ACTIVATIONS[activation](gate)
    return result


class GateModule(nn.Module):
    """Computes the gates of one site of one layer."""

    activation: Activation

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """() for no gate, one tensor [B, T, W] shared by all sources, or one for each, before the activation."""

    def bottleneck(self) -> tuple[Tensor, Tensor] | None:
        """Weights [R, x_width] and [W, R], if all there is to this gate is second(silu(first(x))), shared."""
        return None


class TransitionModule(nn.Module):
    """phi of one site of one layer."""

    @abstractmethod
    def forward(self, x: Tensor, sources: Sequence[Tensor]) -> Selected:
        """x [B, T, x_width] is the layer's own (normalised) input; sources are [B, T, source width] each."""

    def scaling(self) -> GateModule | None:
        """The gate, if multiplying sources by it is all that this transition does."""
        return None


class FusionModule(nn.Module):
    """Joins the selected sources with the layer's own stream."""

    joins: Literal["by_adding", "otherwise"] = "otherwise"
    """`by_adding`: own + sum of the gated sources. Inside a recurrence nothing else is possible."""

    @abstractmethod
    def forward(self, own: Tensor, selected: Selected, norm: nn.RMSNorm | None) -> Tensor:
        """The fused stream [B, T, W], normalised at the end when `norm` is given."""


class RawFusionModule(FusionModule):
    """A fusion that can finish the streams itself (`Stream.finished`), in its own pass over memory."""

    @abstractmethod
    def fuse_raw(self, raw: RawStreams, gate: RawGate, norm: nn.RMSNorm | None) -> tuple[Tensor, Tensor]:
        """The fused stream [B, T, W], and the layer's own as it came, for later layers: what they do with it enters
        its gradient in this fusion's own pass."""


class RawStreams(NamedTuple):
    """What is to be fused, as `project` gave it."""

    own: Tensor
    sources: tuple[Tensor, ...]
    """m tensors [B, T, W], whose `Stream` is like that of own."""
    stream: Stream


class RawGate(NamedTuple):
    """The factor of the sources, before its activation: from `factors`, or second(silu(hidden))."""

    factors: tuple[Tensor, ...]
    """As a `GateModule` gives them."""
    hidden: Tensor | None
    """[B, T, R]"""
    second: Tensor | None
    """[W, R]"""
    activation: Activation


def normalised(x: Tensor, norm: nn.RMSNorm | None) -> Tensor:
    """`norm(x)`, or x itself when there is none."""
    return x if norm is None else norm(x)
