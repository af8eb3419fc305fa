"""Gated Linear Attention for dense-lab. Letters: B batch, T tokens, H heads, K key width, V value width, C chunk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dense_lab.components import Core
from dense_lab.errors import InputError
from dense_lab.hookspecs import hookimpl
from dense_lab.modules import NOTHING_READ, CoreModule, Recurrence, StateReads, StateSite, Stream, Streams
from dense_lab.registry import Registrar
from dense_lab.units import Count

CHUNK = 16


class GLA(Core):
    """Gated Linear Attention (Yang et al. 2023, arXiv 2312.06635, section 4).

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T, o_t = K^-0.5 q_t^T S_t. Dense-able streams: k and v.
    State site: state_readout, o_t = K^-0.5 q_t^T (S_t + sum_i gated S^i_t), S^i the state of an earlier layer.
    """

    kind: Literal["gla"] = "gla"
    heads: Count = 4
    """H; keys are width/2 wide in all, values width."""
    gate_rank: Count = 16
    """Bottleneck of the decay gate (section 4.4)."""

    def build(self, width: int) -> CoreModule:
        """Raises InputError when width and heads do not divide."""
        if width % (2 * self.heads):
            raise InputError(f"core gla: width {width} must be a multiple of {2 * self.heads} (2 x heads)")
        return GLAModule(width, self.heads, self.gate_rank)


class GLAState(NamedTuple):
    """The recurrent state."""

    matrix: Tensor
    """[B, H, K, V]."""


class GLAModule(CoreModule):
    """See GLA."""

    def __init__(self, width: int, heads: int, rank: int):
        super().__init__()
        keys = width // 2
        self.heads = heads
        self.streams = (
            Stream("q", keys),
            Stream("k", keys, dense=True),
            Stream("v", width, dense=True),
            Stream("decay", keys),
            Stream("gate", width),
        )
        sizes = {"heads": heads, "key width of a head": keys // heads}
        self.state_sites = (StateSite("state_readout", width, "readout", "gla", sizes, self.mixing_flops()),)
        self.q = nn.Linear(width, keys, bias=False)
        self.k = nn.Linear(width, keys, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.decay = nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, keys))
        self.gate = nn.Linear(width, width, bias=False)
        self.norm = nn.RMSNorm(width // heads, eps=1e-5)
        self.out = nn.Linear(width, width, bias=False)
        self.out.writes_residual = True

    def project(self, x: Tensor, state: GLAState | None) -> tuple[Streams, GLAState | None]:
        """Queries, keys, values, log decays (<= 0, temperature 16 as in section 4.4) and the output gate."""
        log_decay = nn.functional.logsigmoid(self.decay(x)) / 16
        return {"q": self.q(x), "k": self.k(x), "v": self.v(x), "decay": log_decay, "gate": self.gate(x)}, state

    def mix(
        self, streams: Streams, state: GLAState | None, reads: Mapping[str, StateReads] = NOTHING_READ
    ) -> tuple[Tensor, GLAState]:
        """The recurrence, per-head norm, gate and output map."""
        q = streams["q"].unflatten(-1, (self.heads, -1))
        own = self.recurrence(streams, state, None)
        o, matrix = gated_linear_attention(q, *own.inputs, own.start)
        for read in reads.values():
            sources = [gated_linear_attention(q, *s.inputs, s.start)[0].flatten(-2) for s in read.sources]
            o = read.fused(o.flatten(-2), sources).unflatten(-1, (self.heads, -1))
        return self.out(nn.functional.silu(streams["gate"]) * self.norm(o).flatten(-2)), GLAState(matrix)

    def recurrence(self, streams: Streams, before: GLAState | None, after: GLAState | None) -> Recurrence:
        """Keys, values and log decays by heads, and the matrices [B, H, K, V]."""
        k, v, g = (streams[name].unflatten(-1, (self.heads, -1)) for name in ("k", "v", "decay"))
        start = before.matrix if before else k.new_zeros(k.shape[0], self.heads, k.shape[-1], v.shape[-1])
        return Recurrence((k, v, g), start, after.matrix if after else None)

    def mixing_flops(self) -> float:
        """State update, decay and read: 5 K V per head (section 4.1)."""
        return 5.0 * self.streams[0].width * self.streams[2].width / self.heads


def gated_linear_attention(q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """q, k, g [B, T, H, K], v [B, T, H, V], start [B, H, K, V] -> o [B, T, H, V] and the last state.

    Chunk by chunk, with exponentials of differences only (never of positive numbers), so that no decay overflows.
    """
    outputs, state = [], start
    for qc, kc, vc, gc in zip(*(x.split(CHUNK, 1) for x in (q * q.shape[-1] ** -0.5, k, v, g)), strict=True):
        total = gc.cumsum(1)  # [B, C, H, K]
        causal = torch.ones(qc.shape[1], qc.shape[1], dtype=torch.bool, device=q.device).tril()
        between = (total[:, :, None] - total[:, None]).masked_fill(~causal[None, :, :, None, None], -torch.inf)
        scores = torch.einsum("bthk,bshk,btshk->bhts", qc, kc, between.exp())
        inside = torch.einsum("bhts,bshv->bthv", scores, vc)
        outputs.append(inside + torch.einsum("bthk,bhkv->bthv", qc * total.exp(), state))
        fed = torch.einsum("bshk,bshv->bhkv", kc * (total[:, -1:] - total).exp(), vc)
        state = total[:, -1].exp().unsqueeze(-1) * state + fed
    return torch.cat(outputs, 1), state


@hookimpl
def register_components(register: Registrar) -> None:
    """Register the core."""
    register(GLA)
