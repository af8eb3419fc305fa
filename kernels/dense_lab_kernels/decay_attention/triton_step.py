"""Decay attention of a single token (decoding): state update and read in one pass over the state, in place if allowed.

    S = exp(g) S + k v^T        o = q^T S

It moves the state once in and once out and does little else, so a program owns a strip of value columns of one head
and walks over the keys. Letters: B batch, H heads, G groups, K key size, V value size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dense_lab_kernels._dispatch import may_reuse_states
from dense_lab_kernels._triton import Launch, Sm90Case, cdiv, launch, power_of_2

__all__ = ["serves", "sm90_cases", "step"]


@triton.jit(do_not_specialize=["heads"])
def _step(
    q,
    k,
    v,
    log_decay,
    before,  # may be the same tensor as after: every element is read before it is written
    after,
    out,
    q_batch,
    q_group,
    k_batch,
    k_group,
    v_batch,
    v_head,
    decay_batch,  # 0 for a constant decay
    decay_head,
    heads,
    per_group,
    key_size,
    value_size,
    STARTED: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    strips = tl.cdiv(value_size, BV)
    unit = tl.program_id(0) // strips
    batch = (unit // heads).to(tl.int64)
    head = unit % heads
    group = head // per_group
    col = (tl.program_id(0) % strips) * BV + tl.arange(0, BV)
    inside = col < value_size
    value = tl.load(v + batch * v_batch + head * v_head + col, mask=inside, other=0.0).to(tl.float32)
    decay = tl.exp(tl.load(log_decay + batch * decay_batch + head * decay_head).to(tl.float32))
    base = unit.to(tl.int64) * key_size * value_size
    total = tl.zeros([BV], tl.float32)
    for start in range(0, key_size, BK):
        row = start + tl.arange(0, BK)
        real = row < key_size
        key = tl.load(k + batch * k_batch + group * k_group + row, mask=real, other=0.0).to(tl.float32)
        query = tl.load(q + batch * q_batch + group * q_group + row, mask=real, other=0.0).to(tl.float32)
        place = base + row[:, None] * value_size + col[None, :]
        mask = real[:, None] & inside[None, :]
        state = key[:, None] * value[None, :]
        if STARTED:
            state += decay * tl.load(before + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(after + place, state.to(after.dtype.element_ty), mask=mask)
        total += tl.sum(query[:, None] * state, axis=0)
    tl.store(out + unit.to(tl.int64) * value_size + col, total.to(out.dtype.element_ty), mask=inside)


def serves(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial_state: Tensor | None) -> bool:
    """Whether this is a single token that no gradient is wanted for."""
    given = (q, k, v, log_decay, *(() if initial_state is None else (initial_state,)))
    return v.shape[1] == 1 and not (torch.is_grad_enabled() and any(x.requires_grad for x in given))


def _tile(key_size: int, value_size: int) -> tuple[int, int]:
    """64 keys x 64 values, 32 numbers per thread: enough programs and bytes on their way at any batch size."""
    rows, cols = (min(64, max(16, power_of_2(size))) for size in (key_size, value_size))
    return rows, cols


def _launch(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, before: Tensor | None, after: Tensor, out: Tensor
) -> Launch:
    heads, value_size = v.shape[2:]
    groups, key_size = q.shape[2:]
    rows, cols = _tile(key_size, value_size)
    strides = (q.stride(0), q.stride(2), k.stride(0), k.stride(2), v.stride(0), v.stride(2))
    decay = (0, log_decay.stride(0)) if log_decay.ndim == 1 else (log_decay.stride(0), log_decay.stride(2))
    tensors = (q, k, v, log_decay, after if before is None else before, after, out)
    sizes = (heads, heads // groups, key_size, value_size)
    options = {"STARTED": before is not None, "BK": rows, "BV": cols, "num_warps": 4}
    return Launch(_step, (*tensors, *strides, *decay, *sizes), options)


def step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output [B, 1, H, V] in v's dtype and final state [B, H, K, V] in float32, in initial_state's place if allowed."""
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    batch, _, heads, value_size = v.shape
    after = initial_state
    whole = after is not None and after.is_contiguous() and after.dtype == torch.float32
    if not (whole and may_reuse_states()):
        after = torch.empty(batch, heads, q.shape[3], value_size, dtype=torch.float32, device=v.device)
    before = None if initial_state is None else initial_state.contiguous()
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    work = _launch(q, k, v, log_decay, before, after, out)
    with torch.cuda.device_of(v):
        launch(work.kernel, batch * heads * cdiv(value_size, work.options["BV"]), work.arguments, work.options)
    return out, after


def sm90_cases() -> Iterator[Sm90Case]:
    """Wide and narrow heads, with and without a state before."""
    for key_size, value_size, before in ((384, 1536, "started"), (384, 1536, "first"), (16, 32, "started")):
        stream, state, size = "*bf16:16", "*fp32:16", "i32:16"
        tensors = dict.fromkeys(("q", "k", "v"), stream) | dict.fromkeys(("log_decay", "before", "after"), state)
        strides = ("q_batch", "q_group", "k_batch", "k_group", "v_batch", "v_head", "key_size", "value_size")
        small = ("decay_batch", "decay_head", "heads", "per_group")
        signature: dict[str, Any] = (
            tensors | {"out": stream} | dict.fromkeys(strides, size) | dict.fromkeys(small, "i32")
        )
        rows, cols = _tile(key_size, value_size)
        constexprs = {"STARTED": before == "started", "BK": rows, "BV": cols}
        yield Sm90Case(f"step-{before}-k{rows}-v{cols}", _step, signature, constexprs, 4, 3)
