"""Mamba's scan with the states of earlier layers joined to its own (DenseSSM, arXiv 2403.00818, figure 1).

    readout: y_t = C_t (s_t + sum_i g_i s^i_t) + D u_t                  the state s handed on stays unfused
    carried: s'_t = exp(dt A) s'_{t-1} + dt B u + sum_i g_i s^i_t       y_t = C_t s'_t + D u_t

s^i is the recurrence of an earlier layer's own streams; the scan runs it beside the layer's own and stores no state
over time. For a single token the states are there already, and are read.

Letters: B batch, T tokens, D channels, N state size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import silu

from dense_lab.modules import Recurrence, StateReads
from dense_lab_kernels import selective_scan
from dense_lab_kernels.selective_scan import ScanSource


def scan_with_states(
    own: ScanSource, c: Tensor, d: Tensor, z: Tensor, start: Tensor | None, reads: Mapping[str, StateReads]
) -> tuple[Tensor, Tensor]:
    """Gated output [B, T, D] and the state handed on [B, D, N].

    c [B, T, 1, N], d [D], z [B, T, D], start [B, D, N]; `reads` by site, `state_readout`, `state_carried` or both.
    """
    readout, carried = reads.get("state_readout"), reads.get("state_carried")
    single = own.u.shape[1] == 1
    if not single and not (readout and carried):
        ((site, read),) = reads.items()
        gates = read.gates()
        if gates is not None:  # one scan does it all
            form = site.removeprefix("state_")
            return _scan(own, c, start, read, gates, site=form, D=d, z=z)
    if carried and not single:
        y, state = _scan(own, c, start, carried, carried.gates(), site="carried")
    else:
        y, state, _ = selective_scan(*own[:4], c, dt_bias=own.dt_bias, initial_state=start)
    if carried and single:
        inflow = _gated_sum(carried, c)
        y, state = y + _read(inflow, c).to(y.dtype), state + inflow
    if readout:
        y = readout.fused(y, [_readout(source, c) for source in readout.sources])
    return ((y + d * own.u) * silu(z)).to(own.u.dtype), state


def _scan(
    own: ScanSource, c: Tensor, start: Tensor | None, read: StateReads, gates: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    """One scan of the layer's own recurrence and all sources; leaves the sources' last states behind."""
    starts = [source.start for source in read.sources]
    out = selective_scan(
        *own[:4],
        c,
        dt_bias=own.dt_bias,
        initial_state=start,
        sources=[source.inputs for source in read.sources],
        gates=gates,
        source_states=None if None in starts else starts,
        **options,
    )
    for source, end in zip(read.sources, out.source_states, strict=True):
        source.end = end if source.end is None else source.end
    return out.output, out.final_state


def _readout(source: Recurrence, c: Tensor) -> Tensor:
    """C_t s^i_t [B, T, D] of one source."""
    if c.shape[1] == 1:
        return _read(_end(source, c), c).to(source.inputs.u.dtype)
    inputs = source.inputs
    y, end, _ = selective_scan(*inputs[:4], c, dt_bias=inputs.dt_bias, initial_state=source.start)
    source.end = end if source.end is None else source.end
    return y


def _end(source: Recurrence, c: Tensor) -> Tensor:
    """The state after the piece [B, D, N], which nobody knows yet where it differs from the one handed on."""
    if source.end is None:
        inputs = source.inputs
        source.end = selective_scan(*inputs[:4], c, dt_bias=inputs.dt_bias, initial_state=source.start).final_state
    return source.end


def _gated_sum(read: StateReads, c: Tensor) -> Tensor:
    """sum_i g_i s^i [B, D, N] of a single token."""
    ends = [_end(source, c) for source in read.sources]
    gates = read.gates()
    return sum(gate.mT * end for gate, end in zip(gates, ends, strict=True))


def _read(state: Tensor, c: Tensor) -> Tensor:
    """C s [B, 1, D] of a state [B, D, N] and c [B, 1, 1, N]: a sum, which autocast leaves in the state's dtype."""
    return (state * c[:, 0]).sum(-1).unsqueeze(1)
