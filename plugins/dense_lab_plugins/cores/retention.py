"""What the RetNet family shares: rotation, decay, the row normaliser, per-head norm, gate and output map.

Letters: B batch, T tokens, H heads, K key width of a head, V value width of a head.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dense_lab.errors import InputError
from dense_lab.modules import CoreModule, Stream, Streams
from dense_lab.norms import RMSNorm
from dense_lab_kernels import decay_attention


class RetentionState(NamedTuple):
    """State of a retention core."""

    matrix: Tensor
    """[B, H, K, V]: S_t = gamma S_{t-1} + k_t v_t^T, keys rotated at their positions."""
    position: Tensor
    """[] int64: tokens seen."""


class RetentionCore(CoreModule):
    """A core whose `project` gives q, k, v and an activated gate g, and whose other half is

    y = W_o(g * RMSNorm_head(retention(rotate(q), rotate(k), v))).

    Gives the streams q [H K], k [H K], v [H V], g [H V]; k and v are dense-able, as in DenseRetNet.
    """

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
        o, state = retention(q, k, v, state)
        return self.out_proj(streams["g"] * self.head_norm(o).flatten(-2)), state

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


def retention(q: Tensor, k: Tensor, v: Tensor, state: RetentionState | None) -> tuple[Tensor, RetentionState]:
    """Multi-scale retention of rotated queries and keys (RetNet, arXiv 2307.08621, eq. 5-8).

    q, k [B, T, H, K] before rotation, v [B, T, H, V] -> o [B, T, H, V] and the next state. gamma_h = 1 - 2^(-5-h).
    The official row normaliser 1/sqrt(c_t), c_t = gamma c_{t-1} + 1, is applied, so that all forms equal the official
    recurrent one; it does not depend on the data. Positions, angles and decay are exact whatever the dtype of the model.
    """
    tables = _tables_for(q, state)
    out = decay_attention(
        rotate(q, tables.query),
        rotate(k, tables.key),
        v,
        tables.log_decay,
        initial_state=state.matrix if state is not None else None,
    )
    return out.output, RetentionState(out.final_state, tables.end)


def rotate(x: Tensor, phasors: Tensor) -> Tensor:
    """Pairs (2i, 2i+1) of x [B, T, H, K], read as complex numbers, times phasors [T, 1 or H, K/2]; in fp32 or better."""
    pairs = torch.view_as_complex(x.to(phasors.real.dtype).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * phasors).flatten(-2).to(x.dtype)


class _Tables(NamedTuple):
    """What retention needs to know about the positions of a piece."""

    query: Tensor
    """[T, H, K/2] complex: e^(i t theta) / sqrt(c_t)."""
    key: Tensor
    """[T, 1, K/2] complex: e^(i t theta)."""
    log_decay: Tensor
    """[H] log gamma."""
    end: Tensor
    """[] int64: position after the piece."""


def _tables_for(q: Tensor, state: RetentionState | None) -> _Tables:
    """Tables of the piece that follows `state`; those of a first piece are shared by layers and steps."""
    tokens, heads, key_width = q.shape[1:]
    dtype = torch.promote_types(q.dtype, torch.float32)
    if state is not None:
        return _tables(heads, key_width, tokens, state.position, dtype)
    # A graph must not read memory that a cache may let go, nor may a cache keep what only a replay fills.
    capturing = q.is_cuda and torch.cuda.is_current_stream_capturing()
    build = _first_tables.__wrapped__ if capturing else _first_tables
    return build(heads, key_width, tokens, q.device, dtype)


@functools.lru_cache(maxsize=4)
def _first_tables(heads: int, key_width: int, tokens: int, device: torch.device, dtype: torch.dtype) -> _Tables:
    with torch.inference_mode(False):  # What is kept must serve training too.
        return _tables(heads, key_width, tokens, torch.zeros((), dtype=torch.int64, device=device), dtype)


def _tables(heads: int, key_width: int, tokens: int, start: Tensor, dtype: torch.dtype) -> _Tables:
    log_decay, theta = _constants(heads, key_width, start.device)
    positions = start + torch.arange(tokens, device=start.device)
    angles = positions[:, None, None] * theta  # [T, 1, K/2]
    # c_t = (1 - gamma^(t+1)) / (1 - gamma)
    row = (torch.expm1(log_decay) / torch.expm1(log_decay * (positions[:, None] + 1))).sqrt()  # [T, H]
    complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
    return _Tables(
        torch.polar(row[..., None], angles).to(complex_dtype),
        torch.polar(torch.ones_like(angles), angles).to(complex_dtype),
        log_decay.to(dtype),
        start + tokens,
    )


@functools.lru_cache(maxsize=None)
def _constants(heads: int, key_width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """log gamma [H] and theta [K/2] in fp64. Not buffers of a module, which `half()` would round and `to_empty` lose."""
    log_decay = [math.log1p(-(2.0 ** (-5 - head))) for head in range(heads)]
    # Both ends included: theta_0 = 1 and theta_last = 1e-4, unlike the usual rotary embedding.
    steps = max(key_width // 2 - 1, 1)
    theta = [10000.0 ** (-i / steps) for i in range(key_width // 2)]
    with torch.inference_mode(False):
        return tuple(torch.tensor(values, dtype=torch.float64, device=device) for values in (log_decay, theta))
