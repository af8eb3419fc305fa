"""Causal depthwise convolution over time: every channel has its own short filter over its last W inputs.

    y_t = act( sum_{j < W} weight_j x_{t-W+1+j} + bias )          the last tap sees the current token

Used in front of the scan by the Mamba family (arXiv 2312.00752, figure 3). Letters: B batch, T tokens, D channels,
W filter width.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from dense_lab_kernels._checks import Arguments
from dense_lab_kernels._dispatch import choose, implementation, numba_verdict, operation, preferring, triton_verdict

__all__ = ["CausalConv1dOutput", "causal_conv1d"]

_OPERATION = "causal_conv1d"


class CausalConv1dOutput(NamedTuple):
    """`output` [B, T, D] and `final_state` [B, D, W-1] (the last inputs, oldest first), both in x's dtype."""

    output: Tensor
    final_state: Tensor


@operation
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["none", "silu"] = "none",
    initial_state: Tensor | None = None,
    impl: str = "auto",
) -> CausalConv1dOutput:
    """Filter each channel of x over time, seeing no later token.

    x: [B, T, D]. weight: [D, W], last tap = current token. bias: [D]. activation: applied to the result.
    initial_state: [B, D, W-1], the inputs before x, oldest first; None means zeros.
    impl: "auto", "triton" (GPU), "numba" (CPU) or "reference" (any device).

    Differentiable with respect to every tensor; gradients flow from both results.
    Raises ValueError for shapes, dtypes or devices that do not fit; ImplementationError for an impl that cannot run.
    """
    _check(x, weight, bias, activation, initial_state)
    arguments = (x, weight, bias)
    options = {"activation": activation, "initial_state": initial_state}
    verdicts = {
        "triton": triton_verdict(_OPERATION, impl, x.device, *arguments, **options),
        "numba": numba_verdict(x.device),
        "reference": None,
    }
    if x.device.type == "cpu" and x.shape[1] == 1:  # one token is one product
        verdicts = preferring("reference", verdicts)
    run = implementation(_OPERATION, choose(_OPERATION, impl, verdicts))
    return CausalConv1dOutput(*run(*arguments, **options))


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, initial_state: Tensor | None) -> None:
    given = Arguments(_OPERATION)
    given.one_of("activation", activation, ("none", "silu"))
    given.shape("x", x, "B T D")
    given.shape("weight", weight, "D W")
    given.positive("B T D W")
    given.optional("bias", bias, "D")
    given.sizes["W-1"] = given.sizes["W"] - 1
    given.optional("initial_state", initial_state, "B D W-1")
