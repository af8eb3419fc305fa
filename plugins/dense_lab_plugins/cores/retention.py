"""What the RetNet family shares: rotation, decay, the row normaliser, per-head norm, gate and output map.

Letters: B batch, T tokens, H heads, K key width of a head, V value width of a head.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dense_lab.errors import InputError
from dense_lab.maps import linear_maps
from dense_lab.modules import CoreModule, Stream, Streams
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

    Gives the streams q [H K], k [H K], v [H V], g [H V]; k and v are dense-able, as in DenseRetNet.
    """

    query_activation: Literal["none", "silu"] = "none"

    def __init__(self, width: int, keys: int, values: int, heads: int, norm: RMSNorm):
        """`keys` and `values` count all heads; `norm` acts on the V values of a head."""
        super().__init__()
        self.heads = heads
        self.scale = (keys // heads) ** -0.5
        self.streams = (
            Stream("q", keys),
            Stream("k", keys, dense=True),
            Stream("v", values, dense=True),
            Stream("g", values),
        )
        self.head_norm = norm
        self.out_proj = nn.Linear(values, width, bias=False)
        self.out_proj.writes_residual = True

    def mix(self, streams: Streams, state: RetentionState | None) -> tuple[Tensor, RetentionState]:
        """Retention, per-head norm, gate and output map."""
        q, k, v = (streams[name].unflatten(-1, (self.heads, -1)) for name in ("q", "k", "v"))
        o, state = retention(q, k, v, state, self.query_activation)
        gate = streams["g"].unflatten(-1, (self.heads, -1))
        (y,) = linear_maps(self.head_norm(o, gate).flatten(-2), [self.out_proj.weight])
        return y, state

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
    out = decay_attention(
        rotate(q, start=start, normaliser="retention", activation=query_activation),
        rotate(k, start=start),
        v,
        log_decay(heads, q.device, torch.promote_types(q.dtype, torch.float32)),
        initial_state=matrix,
    )
    end = start + tokens if start is not None else torch.full((), tokens, dtype=torch.int64, device=q.device)
    return out.output, RetentionState(out.final_state, end)


@functools.cache
def log_decay(heads: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """log gamma [H]. Not a buffer of a module, which `half()` would round and `to_empty` lose."""
    values = [math.log1p(-(2.0 ** (-5 - head))) for head in range(heads)]
    with torch.inference_mode(False):  # What is kept must serve training too.
        return torch.tensor(values, dtype=torch.float64, device=device).to(dtype)
