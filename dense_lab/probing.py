"""Trying a component on random inputs: what the conformance kit and the look before training have in common.

Letters: T tokens, W width of a stream.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dense_lab.components import FFN, Component, Core, Fusion, Gate, Projection, Transition
from dense_lab.modules import Selected, State

ROUNDING = 1e-11
"""Largest difference, relative to the largest value, between two fp64 ways to compute the same thing."""
Part = Callable[[Tensor], Tensor]
"""Changes tensors [2, T, ...], or cuts rows or tokens out of them."""


def relative_difference(got: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute value expected (at least 1)."""
    assert got.shape == expected.shape, f"expected shape {tuple(expected.shape)}, got {tuple(got.shape)}"
    if expected.numel() == 0:
        return 0.0
    got, expected = got.detach(), expected.detach()
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1))


def tensors(tree: State) -> list[Tensor]:
    """All tensors of a state, in order."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def seeded(module: Any, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """The module in `dtype` with small random weights, none of them zero, so that no term goes unseen."""
    generator = torch.Generator().manual_seed(seed)
    module = module.to(dtype)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=dtype)
        parameter.data.add_(noise * 0.1 if parameter.ndim < 2 else noise * parameter.shape[-1] ** -0.5)
    return module


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def leaks(function: Callable[[Part], Tensor]) -> dict[str, float]:
    """What the outputs of `function(part)` [2, T, ...] depend on that they must not see, and by how much, relative to
    the largest.

    The function applies `part` to all it reads, tensors [2, T, ...]. In all of them at once later tokens become like
    the first one, or one row like the other: that changes their means too.
    """
    whole = function(lambda tensor: tensor)
    tokens = whole.shape[1]

    def other(row: int) -> float:
        return relative_difference(function(lambda tensor: tensor[[row, row]])[row], whole[row])

    return {
        # Two cuts, of which one lies within a chunk of any even length.
        "later tokens": max(foreseen(function, whole, cut) for cut in (tokens // 3, 2 * tokens // 3)),
        # What runs over the rows as if they were one long sequence shows in the second alone.
        "other rows of the batch": max(other(0), other(1)),
    }


def foreseen(function: Callable[[Part], Tensor], whole: Tensor, cut: int) -> float:
    """How much outputs before the cut depend on tokens from there on, see `leaks`; whole: those of nothing changed."""
    changed = function(lambda tensor: torch.cat([tensor[:, :cut], tensor[:, :1].expand_as(tensor[:, cut:])], 1))
    return relative_difference(changed[:, :cut], whole[:, :cut])


def called(
    component: Component, width: int, stream: int, sources: int, tokens: int, dtype: torch.dtype = torch.float64
) -> Callable[[Part], Tensor] | None:
    """The component's module with random weights, applied to random inputs [2, tokens, ...] changed by a part; its
    outputs side by side. None for a component without one.

    `width` is the layer's, `stream` that of the stream and of each of `sources`.
    """
    x, own = random(2, tokens, width, dtype=dtype), random(2, tokens, stream, seed=9, dtype=dtype)
    reads = [random(2, tokens, stream, seed=1 + i, dtype=dtype) for i in range(sources)]
    module = _built(component, width, stream, sources)
    if module is None:
        return None
    module = seeded(module, dtype=dtype)

    def apply(part: Part) -> Tensor:
        match component:
            case Core():
                found = module(part(x))[0]
            case Projection():
                found = module(part(own))
            case Gate():
                found = torch.cat([part(own)[..., :0], *module(part(x))], -1)
            case Transition():
                found = torch.cat(module(part(x), [part(read) for read in reads]).gated(), -1)
            case Fusion():
                found = module(part(own), Selected(tuple(map(part, reads)), (part(own).flip(-1),), "silu"), None)
            case _:
                found = module(part(x))
        output: Tensor = found
        return output

    return apply


def _built(component: Component, width: int, stream: int, sources: int) -> Any:
    match component:
        case Core() | FFN():
            return component.build(width)
        case Projection():
            return component.build(stream, stream)
        case Gate() | Fusion():
            return component.build(width, stream, sources)
        case Transition():
            return component.build(width, [stream] * sources, stream)
    return None
