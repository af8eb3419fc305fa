"""Dense fusion: a layer's own stream plus gated streams of earlier layers at the same token, then an optional RMSNorm.

    fused = own + sum_i act(gate_i) * source_i
    out   = fused / sqrt(mean(fused^2) + eps) * weight          only when a weight is given

This is the fusion of DenseRetNet (arXiv 2403.00818, section 3.2 and its official code: SiLU gate, one gate shared by
all sources, norm after the sum). Letters: W width, m sources; leading dimensions are free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from dense_lab_kernels._checks import Arguments
from dense_lab_kernels._dispatch import choose, implementation, numba_verdict, triton_verdict

__all__ = ["dense_fuse"]

_OPERATION = "dense_fuse"


def dense_fuse(
    own: Tensor,
    sources: Sequence[Tensor],
    gate: Tensor | Sequence[Tensor] | None = None,
    weight: Tensor | None = None,
    *,
    activation: Literal["none", "silu", "sigmoid"] = "none",
    eps: float = 1e-6,
    impl: str = "auto",
) -> Tensor:
    """Add gated sources to a layer's own stream and normalise; the result has own's shape and dtype.

    own: [..., W]. sources: m >= 1 tensors like own. gate: None (sources are added as they are), one [..., W] shared by
    all sources, or a sequence of m. activation: applied to the gate here, so that callers keep it unactivated.
    weight: [W] of the RMSNorm over the last dimension, None for no norm. eps: added inside the root.
    impl: "auto", "triton" (GPU), "numba" (CPU) or "reference" (any device).

    Differentiable with respect to every tensor.
    Raises ValueError for shapes, dtypes or devices that do not fit; ImplementationError for an impl that cannot run.
    """
    sources = tuple(sources)
    if gate is not None and not isinstance(gate, Tensor):
        gate = tuple(gate)
    _check(own, sources, gate, weight, activation, eps)
    arguments = (own, sources, gate, weight)
    options = {"activation": activation, "eps": eps}
    verdicts = {
        "triton": triton_verdict(_OPERATION, impl, own.device, *arguments, **options),
        "numba": numba_verdict(own.device),
        "reference": None,
    }
    run = implementation(_OPERATION, choose(_OPERATION, impl, verdicts))
    return run(*arguments, **options)


def _check(
    own: Tensor,
    sources: tuple[Tensor, ...],
    gate: Tensor | tuple[Tensor, ...] | None,
    weight: Tensor | None,
    activation: str,
    eps: float,
) -> None:
    given = Arguments(_OPERATION)
    given.one_of("activation", activation, ("none", "silu", "sigmoid"))
    if not eps >= 0:
        raise ValueError(f"{_OPERATION}: eps must be >= 0, got {eps}")
    if not sources:
        raise ValueError(f"{_OPERATION}: sources must hold at least one tensor, got none")
    if isinstance(gate, tuple) and len(gate) != len(sources):
        raise ValueError(f"{_OPERATION}: gate must be one tensor or one per source ({len(sources)}), got {len(gate)}")
    if getattr(own, "ndim", 0) < 1:
        raise ValueError(f"{_OPERATION}: own must have shape [..., W], got {own!r}")
    names = " ".join([*(f"L{i}" for i in range(own.ndim - 1)), "W"])
    given.shape("own", own, names)
    given.positive(names)
    for i, source in enumerate(sources):
        given.shape(f"sources[{i}]", source, names)
    for i, item in enumerate(gate if isinstance(gate, tuple) else (gate,)):
        given.optional(f"gate[{i}]" if isinstance(gate, tuple) else "gate", item, names)
    given.optional("weight", weight, "W")
