"""The rotation written down with complex numbers: the specification that every other implementation must equal.

Also the constants that all implementations share. Letters: T tokens, H heads, K key width of a head.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from dense_lab_kernels._checks import compute_dtype


def rotate(
    x: Tensor, also: Tensor | None, *, start: Tensor | None, normaliser: str, activation: str, scale: float
) -> Tensor | tuple[Tensor, Tensor]:
    """As the public function."""
    rotated = _rotate(x, start, normaliser, activation, scale)
    return rotated if also is None else (rotated, _rotate(also, start, "none", "none", 1.0))


def _rotate(x: Tensor, start: Tensor | None, normaliser: str, activation: str, scale: float) -> Tensor:
    dtype = compute_dtype(x)
    active = x.to(dtype)
    if activation == "silu":
        active = torch.nn.functional.silu(active)
    scaled = active if scale == 1 else active * scale
    return turn(scaled, _factors(x, start, normaliser, dtype)).to(x.dtype)


def turn(x: Tensor, phasors: Tensor) -> Tensor:
    """Pairs (2i, 2i+1) of x [..., T, H, K], read as complex numbers, times phasors [T, 1 or H, K/2]."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * phasors).flatten(-2)


def _factors(x: Tensor, start: Tensor | None, normaliser: str, dtype: torch.dtype) -> Tensor:
    """[T, 1 or H, K/2] complex: r_t e^(i t theta). Those of a first piece are shared by layers and steps."""
    tokens, heads, width = x.shape[1:]
    heads = heads if normaliser == "retention" else 1
    if start is not None:
        return _phasors(start, tokens, heads, width, normaliser, dtype)
    # A graph must not read memory that a cache may let go, nor may a cache keep what only a replay fills.
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    build = _first_phasors.__wrapped__ if capturing else _first_phasors
    return build(x.device, tokens, heads, width, normaliser, dtype)


@functools.lru_cache(maxsize=8)
def _first_phasors(
    device: torch.device, tokens: int, heads: int, width: int, normaliser: str, dtype: torch.dtype
) -> Tensor:
    with torch.inference_mode(False):  # What is kept must serve training too.
        return _phasors(torch.zeros((), dtype=torch.int64, device=device), tokens, heads, width, normaliser, dtype)


def _phasors(start: Tensor, tokens: int, heads: int, width: int, normaliser: str, dtype: torch.dtype) -> Tensor:
    theta = angles(width, start.device)
    positions = (start + torch.arange(tokens, device=start.device))[:, None, None]
    size = torch.ones((), dtype=torch.float64, device=start.device)
    if normaliser == "retention":
        decay = log_decays(heads, start.device)[:, None]
        size = (torch.expm1(decay) / torch.expm1(decay * (positions + 1))).sqrt()  # [T, H, 1]
    turned = positions * theta
    phasors = torch.polar(size.expand(tokens, heads, width // 2), turned.expand(tokens, heads, width // 2))
    return phasors.to(torch.complex128 if dtype == torch.float64 else torch.complex64)


# Not buffers of a module, which `half()` would round and `to_empty` lose.
@functools.cache
def angles(width: int, device: torch.device) -> Tensor:
    """theta [K/2] in fp64, radians per token."""
    steps = max(width // 2 - 1, 1)
    with torch.inference_mode(False):
        values = [10000.0 ** (-i / steps) for i in range(width // 2)]
        return torch.tensor(values, dtype=torch.float64, device=device)


@functools.cache
def log_decays(heads: int, device: torch.device) -> Tensor:
    """log gamma [H] in fp64."""
    with torch.inference_mode(False):
        values = [math.log1p(-(2.0 ** (-5 - head))) for head in range(heads)]
        return torch.tensor(values, dtype=torch.float64, device=device)
