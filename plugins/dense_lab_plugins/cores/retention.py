"""What the RetNet family shares: rotation, decay, the row normaliser, per-head norm, gate and output map.

Letters: B batch, T tokens, H heads, K key width of a head, V value width of a head.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dense_lab.errors import InputError
from dense_lab.maps import linear_maps
from dense_lab.modules import NOTHING_READ, CoreModule, Recurrence, StateReads, StateSite, Stream, Streams
from dense_lab.norms import RMSNorm
from dense_lab_kernels import decay_attention, rotate


class RetentionState(NamedTuple):
    """State of a retention core."""

    matrix: Tensor
    """[B, H, K, V]: S_t = gamma S_{t-1} + k_t v_t^T, keys rotated at their positions."""
    position: Tensor
    """[] int64: tokens seen."""


class RetentionCore(CoreModule):
    """A core whose `project` gives q (before its activation), k, v and a gate g before its silu; its other half is

    y = W_o(silu(g) * RMSNorm_head(retention(rotate(act(q)), rotate(k), v))).

    Gives the streams q [H K], k [H K], v [H V], g [H V]; k and v are dense-able, as in DenseRetNet. State site:

    state_readout: o_t = q_t^T (S_t + sum_i gated S^i_t), S^i the state of an earlier layer, whose keys are rotated at
    the same positions as this layer's; gates one per value channel; any projection and fusion can act on q_t^T S^i_t.
    """

    query_activation: Literal["none", "silu"] = "none"
    stream_activation: Literal["none", "silu"] = "none"
    """Of k and v, which `project` gives before it, and k before its scale too."""

    def __init__(self, width: int, keys: int, values: int, heads: int, norm: RMSNorm):
        """`keys` and `values` count all heads; `norm` acts on the V values of a head."""
        super().__init__()
        self.heads = heads
        activation = self.stream_activation
        self.streams = (
            Stream("q", keys),
            Stream("k", keys, dense=True, activation=activation, scale=(keys // heads) ** -0.5),
            Stream("v", values, dense=True, activation=activation),
            Stream("g", values),
        )
        sizes = {"heads": heads, "key width of a head": keys // heads}
        flops = 5.0 * keys * values / heads + 2 * values
        self.state_sites = (StateSite("state_readout", values, "readout", "retention", sizes, flops),)
        self.head_norm = norm
        self.out_proj = nn.Linear(values, width, bias=False)
        self.out_proj.writes_residual = True

    def mix(
        self, streams: Streams, state: RetentionState | None, reads: Mapping[str, StateReads] = NOTHING_READ
    ) -> tuple[Tensor, RetentionState]:
        """Retention, per-head norm, gate and output map."""
        q, k, v, gate = (streams[name].unflatten(-1, (self.heads, -1)) for name in ("q", "k", "v", "g"))
        start = state.position if state is not None else None
        o, state = retention(q, k, v, state, self.query_activation)
        for read in reads.values():
            rotated = rotate(q, start=start, normaliser="retention", activation=self.query_activation)
            sources = [_readout(rotated, source).flatten(-2) for source in read.sources]
            o = read.fused(o.flatten(-2), sources).unflatten(-1, (self.heads, -1))
        (y,) = linear_maps(self.head_norm(o, gate).flatten(-2), [self.out_proj.weight])
        return y, state

    def recurrence(self, streams: Streams, before: RetentionState | None, after: RetentionState) -> Recurrence:
        """Rotated keys and values, of which a single token needs none, and the matrices [B, H, K, V]."""
        if streams["k"].shape[1] == 1:
            return Recurrence(None, None, after.matrix)
        matrix, start = before if before is not None else (None, None)
        k, v = (streams[name].unflatten(-1, (self.heads, -1)) for name in ("k", "v"))
        return Recurrence((rotate(k, start=start), v), matrix, after.matrix)

    def mixing_flops(self) -> float:
        """State update and read, 4 K V per head, plus its decay, K V (RetNet, arXiv 2307.08621, eq. 6)."""
        keys, values = self.streams[1].width, self.streams[2].width
        return 5.0 * keys * values / self.heads


def check_heads(core: str, keys: int, values: int, heads: int) -> None:
    """Raise InputError unless keys and values divide into heads of even key width."""
    if keys % (2 * heads) or values % heads or not keys:
        raise InputError(
            f"core {core}: key width {keys} and value width {values} must divide into {heads} heads of even key width; "
            f"try a width that is a multiple of {4 * heads}"
        )


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: RetentionState | None,
    query_activation: Literal["none", "silu"] = "none",
) -> tuple[Tensor, RetentionState]:
    """Multi-scale retention of rotated queries and keys (RetNet, arXiv 2307.08621, eq. 5-8).

    q, k [B, T, H, K] before rotation (q before its activation too), v [B, T, H, V] -> o [B, T, H, V] and the next
    state. gamma_h = 1 - 2^(-5-h). The official row normaliser 1/sqrt(c_t), c_t = gamma c_{t-1} + 1, is applied, so that
    all forms equal the official recurrent one; it does not depend on the data. Positions, angles and decay are exact
    whatever the dtype of the model.
    """
    tokens, heads = q.shape[1:3]
    matrix, start = state if state is not None else (None, None)
    queries, keys = rotate(q, k, start=start, normaliser="retention", activation=query_activation)
    out = decay_attention(
        queries,
        keys,
        v,
        log_decay(heads, q.device, torch.promote_types(q.dtype, torch.float32)),
        initial_state=matrix,
    )
    end = torch.full((), tokens, dtype=torch.int64, device=q.device) if start is None else _moved(start, tokens)
    return out.output, RetentionState(out.final_state, end)


def _moved(start: Tensor, tokens: int) -> Tensor:
    """start + tokens. Layers that start from one and the same tensor get one and the same: a launch for each saved."""
    if start.is_inference():  # It has no version that would tell whether it was written to since.
        return start + tokens
    known = getattr(start, "_moved", None)
    end = known[1]() if known is not None and known[0] == (start._version, tokens) else None
    if end is None:
        end = start + tokens
        start._moved = (start._version, tokens), weakref.ref(end)
    return end


def _readout(q: Tensor, source: Recurrence) -> Tensor:
    """q_t^T S_t [B, T, H, V] of rotated queries, S the state of an earlier layer; a single token finds it ready."""
    if q.shape[1] == 1:
        return (q[:, 0, :, :, None] * source.end).sum(-2).unsqueeze(1).to(q.dtype)
    k, v = source.inputs
    decay = log_decay(q.shape[2], q.device, torch.promote_types(q.dtype, torch.float32))
    return decay_attention(q, k, v, decay, initial_state=source.start).output


@functools.cache
def log_decay(heads: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """log gamma [H]. Not a buffer of a module, which `half()` would round and `to_empty` lose."""
    values = [math.log1p(-(2.0 ** (-5 - head))) for head in range(heads)]
    with torch.inference_mode(False):  # What is kept must serve training too.
        return torch.tensor(values, dtype=torch.float64, device=device).to(dtype)
