"""Selective scan: Mamba's recurrence (Gu and Dao 2023, arXiv 2312.00752, algorithm 2), with optional dense sources.

    dt_t = act(dt_t + dt_bias)
    h_t  = exp(dt_t A) h_{t-1} + dt_t B_t u_t       A: zero-order hold; B: Euler, as Mamba does it
    y_t  = sum_n C_t h_t + D u_t                    out = y * silu(z)

A *source* is the recurrence of an earlier layer, run again beside the layer's own on the same tokens, so that its state
is there to be read without ever being stored over time (hidden states of DenseSSM, arXiv 2403.00818, section 3.3):

    readout: y_t = sum_n C_t (h_t + sum_i g_i h^(i)_t) + D u_t          the carried state stays unfused
    carried: h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t + sum_i g_i h^(i)_t       the carried state is the fused one

Letters: B batch, T tokens, D channels, N state size, G groups of channels that share B and C.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from dense_lab_kernels._checks import Arguments
from dense_lab_kernels._dispatch import choose, implementation, numba_verdict, operation, preferring, triton_verdict

__all__ = ["ScanSource", "SelectiveScanOutput", "selective_scan"]

_OPERATION = "selective_scan"


class ScanSource(NamedTuple):
    """The raw (unfused) recurrence of an earlier layer: u, dt [B, T, D], A [D, N], B [B, T, G, N], dt_bias [D] or None.

    G is the source's own; D and N are those of the reading layer, and so is the activation of dt.
    """

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    dt_bias: Tensor | None = None


class SelectiveScanOutput(NamedTuple):
    """`output` [B, T, D] in u's dtype; `final_state` and all `source_states` [B, D, N] in float32 or float64."""

    output: Tensor
    final_state: Tensor
    source_states: tuple[Tensor, ...]


@operation
def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_activation: Literal["softplus", "none"] = "softplus",
    initial_state: Tensor | None = None,
    sources: Sequence[ScanSource] = (),
    gates: Sequence[Tensor] = (),
    site: Literal["readout", "carried"] = "readout",
    source_states: Sequence[Tensor] | None = None,
    impl: str = "auto",
) -> SelectiveScanOutput:
    """Scan tokens with Mamba's selective recurrence; see the module for the formulas.

    u, dt, z: [B, T, D]. A: [D, N], negative. B, C: [B, T, G, N], group g serves channels g D/G .. (g+1) D/G - 1.
    D, dt_bias: [D]. dt_activation: what is done to dt + dt_bias. initial_state: [B, D, N]; None means zeros.
    sources: one ScanSource per earlier layer. gates: one [B, T, D] per source, used as given (already activated).
    site: where the sources' states join. source_states: one [B, D, N] per source; None means zeros.
    impl: "auto", "triton" (GPU), "numba" (CPU) or "reference" (any device).

    Differentiable with respect to every tensor; gradients flow from all results.
    Raises ValueError for shapes, dtypes or devices that do not fit; ImplementationError for an impl that cannot run.
    """
    sources, gates = tuple(ScanSource(*source) for source in sources), tuple(gates)
    states = None if source_states is None else tuple(source_states)
    _check(u, dt, A, B, C, D, z, dt_bias, initial_state)
    _check_sources(u, A, sources, gates, states)
    choices = Arguments(_OPERATION)
    choices.one_of("dt_activation", dt_activation, ("softplus", "none"))
    choices.one_of("site", site, ("readout", "carried"))
    arguments = (u, dt, A, B, C, D, z, dt_bias)
    options = {
        "dt_activation": dt_activation,
        "initial_state": initial_state,
        "sources": sources,
        "gates": gates,
        "site": site,
        "source_states": states,
    }
    verdicts = {
        "triton": triton_verdict(_OPERATION, impl, u.device, *arguments, **options),
        "numba": numba_verdict(u.device),
        "reference": None,
    }
    if u.device.type == "cpu" and u.shape[1] == 1:  # one token is one step of the recurrence
        verdicts = preferring("reference", verdicts)
    run = implementation(_OPERATION, choose(_OPERATION, impl, verdicts))
    return SelectiveScanOutput(*run(*arguments, **options))


def _check(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    given = Arguments(_OPERATION)
    given.shape("u", u, "B T D")
    given.shape("dt", dt, "B T D")
    given.shape("A", A, "D N")
    given.shape("B", B, "B T G N")
    given.shape("C", C, "B T G N")
    given.positive("B T D N G")
    given.divides("G", "D", "channels share B and C in equal groups")
    given.optional("D", D, "D")
    given.optional("z", z, "B T D")
    given.optional("dt_bias", dt_bias, "D")
    given.optional("initial_state", initial_state, "B D N")


def _check_sources(
    u: Tensor,
    A: Tensor,
    sources: tuple[ScanSource, ...],
    gates: tuple[Tensor, ...],
    states: tuple[Tensor, ...] | None,
) -> None:
    for name, items in (("gates", gates), ("source_states", states)):
        if items is not None and len(items) != len(sources):
            raise ValueError(
                f"{_OPERATION}: {name} must have one entry per source, got {len(items)} for {len(sources)} sources"
            )
    given = Arguments(_OPERATION)
    given.shape("u", u, "B T D")
    given.shape("A", A, "D N")
    for i, source in enumerate(sources):
        given.shape(f"sources[{i}].u", source.u, "B T D")
        given.shape(f"sources[{i}].dt", source.dt, "B T D")
        given.shape(f"sources[{i}].A", source.A, "D N")
        given.shape(f"sources[{i}].B", source.B, f"B T G{i} N")
        given.divides(f"G{i}", "D", f"channels of sources[{i}] share B in equal groups")
        given.optional(f"sources[{i}].dt_bias", source.dt_bias, "D")
        given.shape(f"gates[{i}]", gates[i], "B T D")
        if states is not None:
            given.shape(f"source_states[{i}]", states[i], "B D N")
