"""Decay attention in chunks: matrix products within a chunk, one state per chunk between them (any device).

The four steps are those of SSD (Dao and Gu 2024, arXiv 2405.21060, section 6 and listing 1):

    1. within chunk      O = (Q K^T * fade) V             fade[t, s] = exp(g_{s+1} + ... + g_t) for s <= t, else 0
    2. chunk states      U = (leave * K)^T V              leave[s] = exp(g_{s+1} + ... + g_C)
    3. across chunks     S_{c+1} = whole_c S_c + U_c      whole = exp(g_1 + ... + g_C)
    4. states to output  O += (enter * Q) S_c             enter[t] = exp(g_1 + ... + g_t)

Only sums of log decays between two tokens are exponentiated, so nothing overflows for g <= 0. The sums are differences
of one running sum; it is kept in float64, else a strong decay would cost the weak ones after it their digits.

Letters: B batch, T tokens, G groups, H heads, K key size, V value size, C tokens in a chunk, n chunks. Inside this file
the layout is [n, B, H, C, .].
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dense_lab_kernels._checks import compute_dtype


def _longest_chunk(key_size: int, value_size: int) -> int:
    """Tokens in a chunk: the work C (K + V) within it should not outgrow the work 2 K V between chunks (measured)."""
    return 32 if key_size * value_size <= 64 * 64 else 64


def decay_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, V] in v's dtype and final state [B, H, K, V]; arguments as in the public function."""
    batch, tokens, heads, value_size = v.shape
    dtype = compute_dtype(v)
    chunks = math.ceil(tokens / _longest_chunk(q.shape[-1], value_size))
    if initial_state is None:
        initial_state = v.new_zeros(batch, heads, q.shape[-1], value_size, dtype=dtype)
    constant = log_decay.ndim == 1
    steps = log_decay.expand(1, tokens, heads) if constant else log_decay
    output, state = _Chunked.apply(
        *(_split(x.to(dtype), chunks) for x in (q, k, v)),
        _split(steps.to(dtype).unsqueeze(-1), chunks).squeeze(-1),
        initial_state.to(dtype),
        constant,
    )
    output = output.permute(1, 0, 3, 2, 4).reshape(batch, -1, heads, value_size)
    return output[:, :tokens].to(v.dtype), state


def _split(x: Tensor, chunks: int) -> Tensor:
    """[B, T, H, K] -> [n, B, H, C, K]; zeros fill the last chunk (an empty token without decay changes no state)."""
    length = math.ceil(x.shape[1] / chunks)
    missing = chunks * length - x.shape[1]
    if missing:
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing))
    return x.unflatten(1, (chunks, length)).permute(1, 0, 3, 2, 4).contiguous()


def _decays(log_decay: Tensor, constant: bool) -> tuple[Tensor, Tensor, Tensor]:
    """fade [n, B, H, C, C], enter and leave [n, B, H, C] of log_decay [n, B, H, C] (n = 1 in fade when constant)."""
    total = log_decay.double().cumsum(-1)
    # The first chunk is full, so its decays serve all; tokens that fill up the last chunk meet zeros there.
    within = total[:1] if constant else total
    future = torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool, device=total.device).triu(1)
    between = (within.unsqueeze(-1) - within.unsqueeze(-2)).masked_fill_(future, -math.inf)
    after = total[..., -1:] - total
    return tuple(x.to(log_decay.dtype).exp_() for x in (between, total, after))


def _per_head(grouped: Tensor, scale: Tensor) -> Tensor:
    """[n, B, G, C, .] times [n, B, H, C, .] -> [n, B, H, C, .]: every head of a group reads the group's tensor."""
    return (grouped.unsqueeze(3) * scale.unflatten(2, (grouped.shape[2], -1))).flatten(2, 3)


def _per_group(heads: Tensor, groups: int) -> Tensor:
    """Sum over the heads of each group; the adjoint of reading."""
    return heads if heads.shape[2] == groups else heads.unflatten(2, (groups, -1)).sum(3)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total += left @ right in place, batched over all leading dimensions."""
    total.flatten(0, -3).baddbmm_(left.flatten(0, -3), right.flatten(0, -3))
    return total


class _Chunked(torch.autograd.Function):
    """The four steps with a hand-written backward; q, k [n, B, G, C, K], v [n, B, H, C, V], state [B, H, K, V]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, constant: bool
    ) -> tuple[Tensor, Tensor]:
        """Output [n, B, H, C, V] and the last state."""
        fade, enter, leave = _decays(log_decay, constant)
        whole = enter[..., -1:, None]
        chunks, batch, heads = v.shape[:3]
        # 1. within chunk
        output = _per_head(q @ k.mT, fade) @ v
        # 2. chunk states
        states = v.new_empty(chunks + 1, batch, heads, k.shape[-1], v.shape[-1])
        torch.matmul(_per_head(k, leave.unsqueeze(-1)).mT, v, out=states[1:])
        # 3. across chunks
        states[0] = state
        for c in range(chunks):
            states[c + 1].addcmul_(whole[c], states[c])
        # 4. states to output
        _add_product(output, _per_head(q, enter.unsqueeze(-1)), states[:-1])
        ctx.save_for_backward(q, k, v, fade, enter, leave, states)
        ctx.decay_batch = log_decay.shape[1]
        return output, states[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v, log_decay and state: the four steps in reverse."""
        q, k, v, fade, enter, leave, states = ctx.saved_tensors
        d_output = d_output.contiguous()  # it is read four times, each of which would copy it
        whole = enter[..., -1:, None]
        groups, chunks = q.shape[2], v.shape[0]
        weights = _per_head(q @ k.mT, fade)
        into, outof = _per_head(q, enter.unsqueeze(-1)), _per_head(k, leave.unsqueeze(-1))
        # 4. states to output, and 3. across chunks
        d_states = torch.empty_like(states)
        torch.matmul(into.mT, d_output, out=d_states[:-1])
        d_states[-1] = d_state
        for c in reversed(range(chunks)):
            d_states[c].addcmul_(whole[c], d_states[c + 1])
        d_into = d_output @ states[:-1].mT
        # 2. chunk states
        d_outof = v @ d_states[1:].mT
        d_v = _add_product(outof @ d_states[1:], weights.mT, d_output)
        # 1. within chunk
        d_weights = d_output @ v.mT
        d_decay = None
        if ctx.needs_input_grad[3]:
            d_whole = (states[:-1] * d_states[1:]).sum((-2, -1), keepdim=True) * whole
            d_decay = _decay_gradient(weights * d_weights, into * d_into, outof * d_outof, d_whole.squeeze(-1))
            d_decay = d_decay.sum(1, keepdim=True) if ctx.decay_batch == 1 else d_decay
        d_scores = _per_group(d_weights.mul_(fade), groups)
        d_q = _add_product(_per_group(d_into.mul_(enter.unsqueeze(-1)), groups), d_scores, k)
        d_k = _add_product(_per_group(d_outof.mul_(leave.unsqueeze(-1)), groups), d_scores.mT, q)
        return d_q, d_k, d_v, d_decay, d_states[0], None


def _decay_gradient(pairs: Tensor, into: Tensor, outof: Tensor, whole: Tensor) -> Tensor:
    """Gradient of log_decay [n, B, H, C]: what crosses each step between a token and the one before it.

    pairs[t, s] is the share of the objective that passes from s to t in a chunk, into[t] from the state to t, outof[s]
    from s to the state, whole from state to state. Sums only, no differences: nothing cancels.
    """
    length = pairs.shape[-1]
    upto = torch.ones(length, length, dtype=pairs.dtype, device=pairs.device).tril()  # [t', t]: t <= t'
    before = upto.tril(-1)  # [t, s]: s < t
    crossing = ((upto.mT @ pairs) * before).sum(-1)
    return crossing + into.sum(-1) @ upto + outof.sum(-1) @ before.mT + whole
