"""Cross-entropy of a piece's rows and their gradient in place (Triton); the products are those of `chunked`.

A program owns one row: it walks over the vocabulary once for the largest logit and the sum of exponentials, and once
more, from the L2 cache, to overwrite logits by softmax minus one-hot. That gradient is not divided by the number of
tokens yet, so that float16 holds it.

Letters: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from dense_lab_kernels._triton import Launch, Sm90Case, compile_once, launch, unsupported_place
from dense_lab_kernels.linear_cross_entropy.chunked import LinearCrossEntropy

__all__ = ["linear_cross_entropy", "sm90_cases", "unsupported"]

_OPERATION = "linear_cross_entropy"


@triton.jit
def _rows_kernel(logits, targets, losses, row_stride, vocabulary, ignored, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    target = tl.load(targets + row)
    column = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        inside = start + column < vocabulary
        value = tl.load(logits + start + column, mask=inside, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(largest, value)
        # Lanes that have seen nothing yet keep a sum of 0, not NaN.
        total = tl.where(higher > float("-inf"), total * tl.exp(largest - higher) + tl.exp(value - higher), 0.0)
        largest = higher
    peak = tl.max(largest, axis=0)
    log_sum = peak + tl.log(tl.sum(tl.where(total > 0, total * tl.exp(largest - peak), 0.0), axis=0))
    scored = target != ignored
    loss = log_sum - tl.load(logits + tl.where(scored, target, 0)).to(tl.float32)
    tl.store(losses + row, tl.where(scored, loss, 0.0))
    if GRADIENT:
        tl.debug_barrier()  # The target's logit is read before it is overwritten.
        for start in range(0, vocabulary, BLOCK):
            inside = start + column < vocabulary
            value = tl.load(logits + start + column, mask=inside, other=float("-inf")).to(tl.float32)
            slope = tl.exp(value - log_sum) - tl.where(start + column == target, 1.0, 0.0)
            slope = tl.where(scored, slope, 0.0)
            tl.store(logits + start + column, slope.to(logits.dtype.element_ty), mask=inside)


def _block(vocabulary: int) -> tuple[int, int]:
    """Columns at a time and warps: 16 elements per thread, one pass where the row is short."""
    block = min(triton.next_power_of_2(vocabulary), 4096)
    return block, max(4, block // 512)


def _rows(logits: Tensor, targets: Tensor, ignored: int, then: Literal["keep", "gradient"]) -> Tensor:
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    block, warps = _block(logits.shape[1])
    sizes = (logits.stride(0), logits.shape[1], ignored)
    options = {"GRADIENT": then == "gradient", "BLOCK": block, "num_warps": warps}
    work = Launch(_rows_kernel, (logits, targets, losses, *sizes), options)
    with torch.cuda.device_of(logits):
        compile_once((_OPERATION, logits.dtype, logits.shape[1] % 16, *options.values()), lambda: [work])
        launch(work.kernel, len(logits), work.arguments, work.options)
    return losses


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, ignored: int) -> Tensor:
    """Mean loss []; arguments as in the public function."""
    return LinearCrossEntropy.apply(x, weight, targets, ignored, _rows)


def unsupported(x: Tensor, *_: Any, **__: Any) -> str | None:
    """Why these arguments cannot run here, or None."""
    return "computes in float32, got float64" if x.dtype == torch.float64 else unsupported_place(x)


def sm90_cases() -> Iterator[Sm90Case]:
    """Training and evaluation, a short and a long vocabulary."""
    for vocabulary, dtype in ((256, "bf16"), (32000, "bf16"), (32000, "fp32")):
        for kind in ("forward", "gradient"):
            block, warps = _block(vocabulary)
            signature = {"logits": f"*{dtype}:16", "targets": "*i64:16", "losses": "*fp32:16"}
            signature |= {"row_stride": "i32:16", "vocabulary": "i32:16", "ignored": "i32"}
            constexprs = {"GRADIENT": kind == "gradient", "BLOCK": block}
            name = f"{kind}-{dtype}-v{block}"
            yield Sm90Case(name, _rows_kernel, signature, constexprs, warps, 3)
