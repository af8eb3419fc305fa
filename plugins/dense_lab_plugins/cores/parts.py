"""One linear map read as several."""

from __future__ import annotations

from torch import Tensor, nn

from dense_lab.maps import linear_maps


def in_parts(linear: nn.Linear, x: Tensor, parts: int) -> list[Tensor]:
    """The output of `linear` in `parts` equal parts, each contiguous; see `linear_maps`."""
    if linear.bias is None:
        return linear_maps(x, [linear.weight], [parts])
    pairs = zip(linear.weight.chunk(parts), linear.bias.chunk(parts), strict=True)
    return [nn.functional.linear(x, weight, bias) for weight, bias in pairs]
