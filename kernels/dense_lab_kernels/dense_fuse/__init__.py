"""Dense fusion: a layer's own stream plus gated streams of earlier layers at the same token, then an optional RMSNorm.

    fused = scale * (act_s(own) + sum_i act(gate_i) * act_s(source_i))
    out   = fused / sqrt(mean(fused^2) + eps) * weight          only when a weight is given

This is the fusion of DenseRetNet (arXiv 2403.00818, section 3.2 and its official code: SiLU gate, one gate shared by
all sources, norm after the sum). Letters: W width, m sources, R width of a gate's bottleneck; leading dimensions are
free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from dense_lab_kernels._checks import Arguments
from dense_lab_kernels._dispatch import choose, implementation, numba_verdict, operation, triton_verdict
from dense_lab_kernels.dense_fuse.reference import ACTIVATIONS, Bottleneck

__all__ = ["Bottleneck", "dense_fuse"]

_OPERATION = "dense_fuse"
_RETURNING = ("fused", "fused and own")


@operation
def dense_fuse(
    own: Tensor,
    sources: Sequence[Tensor],
    gate: Tensor | Sequence[Tensor] | Bottleneck | None = None,
    weight: Tensor | None = None,
    *,
    activation: Literal["none", "silu", "sigmoid"] = "none",
    stream_activation: Literal["none", "silu", "sigmoid"] = "none",
    scale: float = 1.0,
    eps: float = 1e-6,
    returning: Literal["fused", "fused and own"] = "fused",
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Add gated sources to a layer's own stream and normalise; the result has own's shape and dtype.

    own: [..., W]. sources: m >= 1 tensors like own. gate: None (sources are added as they are), one [..., W] shared by
    all sources, a sequence of m, or a `Bottleneck`, which is multiplied out here and shared. activation: applied to the
    gate here, so that callers keep it unactivated. stream_activation, scale: of own and sources, and of the sum (> 0).
    weight: [W] of the RMSNorm over the last dimension, None for no norm. eps: added inside the root.
    returning: "fused and own" gives own once more, for later layers to read: their gradient is added to that of own in
    this operation's own pass.
    impl: "auto", "triton" (GPU), "numba" (CPU) or "reference" (any device).

    Differentiable with respect to every tensor.
    Raises ValueError for shapes, dtypes or devices that do not fit; ImplementationError for an impl that cannot run.
    """
    sources = tuple(sources)
    if gate is not None and not isinstance(gate, Tensor | Bottleneck):
        gate = tuple(gate)
    given = _check(own, sources, gate, weight)
    options = {"activation": activation, "stream_activation": stream_activation, "scale": scale, "eps": eps}
    given.one_of("activation", activation, tuple(ACTIVATIONS))
    given.one_of("stream_activation", stream_activation, tuple(ACTIVATIONS))
    given.one_of("returning", returning, _RETURNING)
    if not (eps >= 0 and scale > 0):
        raise ValueError(f"{_OPERATION}: eps must be >= 0 and scale > 0, got {eps} and {scale}")
    arguments = (own, sources, gate, weight)
    verdicts = {
        "triton": triton_verdict(_OPERATION, impl, own.device, *arguments, **options),
        "numba": numba_verdict(own.device),
        "reference": None,
    }
    run = implementation(_OPERATION, choose(_OPERATION, impl, verdicts))
    return run(*arguments, **options, returning=returning)


def _check(
    own: Tensor,
    sources: tuple[Tensor, ...],
    gate: Tensor | tuple[Tensor, ...] | Bottleneck | None,
    weight: Tensor | None,
) -> Arguments:
    given = Arguments(_OPERATION)
    if not sources:
        raise ValueError(f"{_OPERATION}: sources must hold at least one tensor, got none")
    if getattr(own, "ndim", 0) < 1:
        raise ValueError(f"{_OPERATION}: own must have shape [..., W], got {own!r}")
    leading = [f"L{i}" for i in range(own.ndim - 1)]
    names = " ".join([*leading, "W"])
    given.shape("own", own, names)
    given.positive(names)
    for i, source in enumerate(sources):
        given.shape(f"sources[{i}]", source, names)
    _check_gate(given, gate, len(sources), leading)
    given.optional("weight", weight, "W")
    return given


def _check_gate(
    given: Arguments, gate: Tensor | tuple[Tensor, ...] | Bottleneck | None, sources: int, leading: list[str]
) -> None:
    names = " ".join([*leading, "W"])
    if isinstance(gate, Bottleneck):
        given.shape("gate.hidden", gate.hidden, " ".join([*leading, "R"]))
        given.shape("gate.weight", gate.weight, "W R")
    elif isinstance(gate, tuple):
        if len(gate) != sources:
            raise ValueError(f"{_OPERATION}: gate must be one tensor or one per source ({sources}), got {len(gate)}")
        for i, item in enumerate(gate):
            given.shape(f"gate[{i}]", item, names)
    else:
        given.optional("gate", gate, names)
