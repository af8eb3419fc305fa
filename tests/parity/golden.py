"""Golden arrays of the peers (tests/oracles/*.npz) and how closely they are to be met.

Outputs were computed by the peers' own code in float64; inputs and weights are stored exactly as used. `measured` holds
how far the peers' own float32 code is from them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "oracles"


class Golden:
    """One file of arrays; `golden[name]` is a tensor in the dtype it is stored in."""

    def __init__(self, name: str):
        self.arrays = np.load(FOLDER / f"{name}.npz", allow_pickle=False)
        self.meta: dict[str, Any] = json.loads(str(self.arrays["meta"]))
        self.measured: dict[str, float] = self.meta.get("measured", {})

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])

    def names(self, prefix: str) -> list[str]:
        """Names that start with `prefix`, without it."""
        return [name.removeprefix(prefix) for name in self.arrays.files if name.startswith(prefix)]

    def weights(self, prefix: str = "w:") -> dict[str, Tensor]:
        """The peer's parameters, by its names."""
        return {name: self[prefix + name] for name in self.names(prefix) if name != "meta"}

    def tolerance(self, expected: Tensor, dtype: torch.dtype, peer_error: str) -> float:
        """Largest difference allowed: 1e-9 of the scale in float64 (1e-6 if stored in float32), in float32 ten times
        the peer's own error, which `measured[peer_error]` gives for values of unit scale or of the output's."""
        scale = max(1.0, float(expected.detach().abs().max()))
        if dtype == torch.float64:
            return scale * (1e-9 if expected.dtype == torch.float64 else 1e-6)
        return 10 * self.measured[peer_error] * scale


def difference(got: Tensor, expected: Tensor) -> float:
    """Largest absolute difference."""
    assert got.shape == expected.shape, f"expected shape {tuple(expected.shape)}, got {tuple(got.shape)}"
    return float((got.detach().double() - expected.detach().double()).abs().max())
