"""One linear map read as several."""

from __future__ import annotations

from torch import Tensor, nn


def in_parts(linear: nn.Linear, x: Tensor, parts: int) -> list[Tensor]:
    """The output of `linear` in `parts` equal parts, each contiguous.

    Cutting the weight is cheaper than cutting the output, whose parts would have to be copied, and whose gradients joined.
    """
    biases = linear.bias.chunk(parts) if linear.bias is not None else [None] * parts
    return [nn.functional.linear(x, w, b) for w, b in zip(linear.weight.chunk(parts), biases, strict=True)]
