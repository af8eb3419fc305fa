"""Decay attention: a matrix state per head that fades by a scalar and takes one outer product per token.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T        o_t = q_t^T S_t

With a constant decay per head it is retention (Sun et al. 2023, arXiv 2307.08621, eq. 6); with a decay per token it is
Mamba-2's SSD (Dao and Gu 2024, arXiv 2405.21060, section 6) and simple gated linear attention; with g = 0 it is plain
linear attention. There is no scale and no normaliser: callers fold them into q, k or what follows.

Letters: B batch, T tokens, H heads, G groups of heads that share q and k, K key size, V value size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dense_lab_kernels._checks import Arguments
from dense_lab_kernels._dispatch import choose, implementation, numba_verdict, operation, preferring, triton_verdict

__all__ = ["DecayAttentionOutput", "decay_attention"]

_OPERATION = "decay_attention"
# Numbers in a head's state up to which a CPU walks over the tokens; beyond, the state leaves the nearest cache and
# products of matrices are faster.
_LARGEST_STATE = 64 * 128


class DecayAttentionOutput(NamedTuple):
    """`output` [B, T, H, V] in v's dtype; `final_state` [B, H, K, V] in float32 (float64 for float64 inputs)."""

    output: Tensor
    final_state: Tensor


@operation
def decay_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    impl: str = "auto",
) -> DecayAttentionOutput:
    """Mix values over time: S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = q_t^T S_t.

    q, k: [B, T, G, K] with G dividing H; head h reads group h // (H / G). G = H is the usual case.
    v: [B, T, H, V]. The dtypes of q, k, v and log_decay may differ, except that float64 does not mix.
    log_decay: g <= 0, natural logarithm: [H] (constant over time) or [B, T, H]. Positive values are not refused.
    initial_state: [B, H, K, V]; None means zeros.
    impl: "auto", "triton" (GPU), "numba" (CPU), "chunked" (matrix form in torch, any device) or "reference".

    Differentiable with respect to every tensor; gradients flow from both results.
    Raises ValueError for shapes, dtypes or devices that do not fit; ImplementationError for an impl that cannot run.
    """
    _check(q, k, v, log_decay, initial_state)
    arguments = (q, k, v, log_decay)
    verdicts = {
        "triton": triton_verdict(_OPERATION, impl, v.device, *arguments, initial_state=initial_state),
        "numba": numba_verdict(v.device) or _no_walk(log_decay),
        "chunked": None,
        "reference": None,
    }
    if v.device.type == "cpu":
        verdicts = preferring(_best_on_cpu(q, v), verdicts)
    run = implementation(_OPERATION, choose(_OPERATION, impl, verdicts))
    return DecayAttentionOutput(*run(*arguments, initial_state=initial_state))


def _best_on_cpu(q: Tensor, v: Tensor) -> str:
    if v.shape[1] == 1:  # one token is one step of the recurrence
        return "reference"
    return "numba" if q.shape[-1] * v.shape[-1] <= _LARGEST_STATE else "chunked"


def _no_walk(log_decay: Tensor) -> str | None:
    """Why the walk over tokens cannot serve these decays."""
    if log_decay.requires_grad and torch.is_grad_enabled():
        return "it has no gradient of log_decay"
    return None


def _check(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial_state: Tensor | None) -> None:
    given = Arguments(_OPERATION)
    given.shape("q", q, "B T G K")
    given.shape("k", k, "B T G K")
    given.shape("v", v, "B T H V")
    given.positive("B T G H K V")
    given.divides("G", "H", "heads share q and k in equal groups")
    given.shape("log_decay", log_decay, "H" if getattr(log_decay, "ndim", 0) == 1 else "B T H")
    given.optional("initial_state", initial_state, "B H K V")
