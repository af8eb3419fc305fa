"""Mamba-1: the selective state space model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dense_lab.components import Core
from dense_lab.modules import NOTHING_READ, CoreModule, Recurrence, StateReads, StateSite, Stream, Streams
from dense_lab.units import Count, Positive
from dense_lab_kernels import causal_conv1d, selective_scan
from dense_lab_kernels.selective_scan import ScanSource
from dense_lab_plugins.cores.mamba_states import scan_with_states
from dense_lab_plugins.cores.parts import in_parts


class Mamba(Core):
    """Selective state space model (Gu and Dao 2023, arXiv 2312.00752, algorithm 2 and figure 3).

    x, z = W_in h; u = silu(conv(x)); dt, B, C = W_x u; s_t = exp(dt A) s_{t-1} + dt B u;
    y = W_out((C s + D u) silu(z)).
    Dense-able streams: u and B. By the duality of arXiv 2405.21060 they are the values and keys of this core, the
    streams that DenseRetNet connects; C (its query), dt and the gate z stay the layer's own.
    State sites, DenseMamba of arXiv 2403.00818, figure 1, gates one per channel:
    state_readout: y_t = C_t (s_t + sum_i g_i s^i_t) + D u_t; any projection and fusion can act on the C_t s^i_t.
    state_carried: s'_t = exp(dt A) s'_{t-1} + dt B u + sum_i g_i s^i_t; gates only.
    """

    kind: Literal["mamba"] = "mamba"
    state: Count = 16
    """N, state size of a channel."""
    expand: Positive = 2.0
    """Inner width over layer width."""
    conv_width: Count = 4
    """Tokens that the causal convolution sees, the current one included."""
    dt_rank: Count | None = None
    """Width of the bottleneck of dt; by default width / 16, rounded up."""
    dt_min: Positive = 1e-3
    """Smallest step size at initialisation."""
    dt_max: Positive = 0.1
    """Largest step size at initialisation."""
    linear_bias: Literal["none", "learned"] = "none"
    """Bias of the input and output maps; the paper has none."""
    conv_bias: Literal["none", "learned"] = "learned"
    """Bias of the convolution."""

    def build(self, width: int) -> CoreModule:
        """The core for a residual stream of `width`."""
        return MambaModule(self, width)


class MambaState(NamedTuple):
    """State of a Mamba core."""

    conv: Tensor
    """[B, D, conv_width - 1]: the last inputs of the convolution, oldest first."""
    ssm: Tensor | None
    """[B, D, N]; None only between the two halves of the first piece."""


class MambaModule(CoreModule):
    """See Mamba. Letters: D inner width, N state size, R rank of dt."""

    def __init__(self, spec: Mamba, width: int):
        super().__init__()
        self.spec = spec
        inner, rank, size = round(width * spec.expand), spec.dt_rank or math.ceil(width / 16), spec.state
        self.inner, self.sizes = inner, (rank, size, size)
        self.streams = (
            Stream("u", inner, dense=True),
            Stream("dt", inner),
            Stream("B", size, dense=True),
            Stream("C", size),
            Stream("z", inner),
        )
        flops = float(inner * (7 * size + 1))
        self.state_sites = (
            StateSite("state_readout", inner, "readout", "selective_scan", {"state": size}, flops),
            StateSite("state_carried", inner, "carried", "selective_scan", {"state": size}, flops),
        )
        bias = spec.linear_bias == "learned"
        self.in_proj = nn.Linear(width, 2 * inner, bias=bias)
        self.conv_weight = nn.Parameter(torch.empty(inner, spec.conv_width))
        self.conv_bias = nn.Parameter(torch.empty(inner)) if spec.conv_bias == "learned" else None
        self.x_proj = nn.Linear(inner, rank + 2 * size, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, size))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, width, bias=bias)
        self.out_proj.writes_residual = True
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A = -(1, ..., N), D = 1, dt log-uniform in [dt_min, dt_max] (arXiv 2312.00752, section 3.6); torch's conv."""
        if self.A_log.is_meta:
            return  # Nothing to set, and torch would import its compiler for the arithmetic: seconds.
        sizes = torch.arange(1, self.A_log.shape[1] + 1, device=self.A_log.device)
        with torch.no_grad():
            self.A_log.copy_(sizes.double().log().expand_as(self.A_log))
            nn.init.ones_(self.D)
            bound = self.spec.conv_width**-0.5
            nn.init.uniform_(self.conv_weight, -bound, bound)
            if self.conv_bias is not None:
                nn.init.uniform_(self.conv_bias, -bound, bound)
            nn.init.uniform_(self.dt_proj.weight, -(self.sizes[0] ** -0.5), self.sizes[0] ** -0.5)
            low, high = math.log(self.spec.dt_min), math.log(self.spec.dt_max)
            dt = (torch.rand_like(self.dt_proj.bias) * (high - low) + low).exp().clamp(min=1e-4)
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt

    def project(self, x: Tensor, state: MambaState | None) -> tuple[Streams, MambaState]:
        """u, dt (without its bias), B, C and z of x [B, T, width]; moves the convolution's state on."""
        before, ssm = state if state is not None else (None, None)
        u, z = in_parts(self.in_proj, x, 2)
        u, conv = causal_conv1d(u, self.conv_weight, self.conv_bias, activation="silu", initial_state=before)
        dt, b, c = self.x_proj(u).split(self.sizes, -1)
        # The scan adds the bias, so that it can keep dt in higher precision.
        dt = nn.functional.linear(dt, self.dt_proj.weight)
        return {"u": u, "dt": dt, "B": b, "C": c, "z": z}, MambaState(conv, ssm)

    def mix(
        self, streams: Streams, state: MambaState, reads: Mapping[str, StateReads] = NOTHING_READ
    ) -> tuple[Tensor, MambaState]:
        """The scan with skip and gate, and the output map."""
        own, c, z = self._scanned(streams), streams["C"].unsqueeze(2), streams["z"]
        if reads:
            y, ssm = scan_with_states(own, c, self.D, z, state.ssm, reads)
        else:
            y, ssm, _ = selective_scan(*own[:4], c, self.D, z, own.dt_bias, initial_state=state.ssm)
        return self.out_proj(y), MambaState(state.conv, ssm)

    def _scanned(self, streams: Streams) -> ScanSource:
        a = -self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)).exp()
        return ScanSource(streams["u"], streams["dt"], a, streams["B"].unsqueeze(2), self.dt_proj.bias)

    def recurrence(self, streams: Streams, before: MambaState, after: MambaState) -> Recurrence:
        """The scan's inputs, as a ScanSource, and its states [B, D, N]."""
        return Recurrence(self._scanned(streams), before.ssm, after.ssm)

    def mixing_flops(self) -> float:
        """Per channel: convolution 2 W; for each of N states dt A, exp, (dt u) B, update (2) and read (2); dt u, the
        skip (2) and the gate (1) once. Counted from arXiv 2312.00752, algorithm 2 and section 3.3.2.

        For each source of a state site: dt u once, and per state dt A, exp, (dt u) B, update (2) and gated sum (2).
        """
        return float(self.inner * (2 * self.spec.conv_width + 7 * self.spec.state + 4))

    def undecayed(self) -> set[str]:
        """A, D and the bias of dt, as in the authors' code."""
        return {"A_log", "D", "dt_proj.bias"}
