"""The published models by name: `{name: (summary, what may stand under model:)}`.

Sizes are those of the official configuration files and of the released checkpoints of DenseSSM (arXiv 2403.00818).
Parameters counted with their vocabularies: 32,000 tokens, and 32,001 for the released checkpoints.
"""

from __future__ import annotations

from typing import Any


def _gau(width: int, depth: int, heads: int) -> dict[str, Any]:
    return {
        "width": width,
        "depth": depth,
        "core": {"kind": "gau_retnet", "heads": heads},
        "ffn": "none",
        "head": "untied",
        "norm_eps": 1e-6,
        "dropout": 0.1,
        "init": "normal",
    }


def _dense(span: int, default: int, **bottlenecks: int) -> dict[str, Any]:
    """The official connection: every layer owns gates and norms, the first one too; `bottlenecks` by site."""
    return {
        "kind": "densessm",
        "span": span,
        "sites": "all",
        "pattern": {"kind": "recent"},
        "transition": _gated(default),
        "site_transitions": {site: _gated(bottleneck) for site, bottleneck in bottlenecks.items()},
        "fusion": {"kind": "add"},
        "norm": "rmsnorm",
        "owners": "every",
    }


def _gated(bottleneck: int) -> dict[str, Any]:
    gate = {"kind": "mlp", "bottleneck": bottleneck, "activation": "silu", "sharing": "shared"}
    return {"kind": "gated", "projection": {"kind": "identity"}, "gate": gate}


_350M, _1300M = _gau(1536, 16, 2), _gau(2560, 25, 4)

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "gau-retnet-350m": ("DenseRetNet-350M without dense connections; 362.6M parameters", {**_350M, "dense": "none"}),
    "gau-retnet-1.3b": ("DenseRetNet-1.3B without dense connections; 1310.8M parameters", {**_1300M, "dense": "none"}),
    "denseretnet-350m": (
        "DenseRetNet-350M, official configuration, m = 1; 367,965,696 parameters",
        {**_350M, "dense": _dense(1, 48)},
    ),
    "denseretnet-1.3b": (
        "DenseRetNet-1.3B, official configuration, m = 1; 1334.0M parameters",
        {**_1300M, "dense": _dense(1, 80)},
    ),
    "denseretnet-350m-released": (
        "DenseRetNet-350M as released, m = 2, wider gate of k; 373.3M parameters",
        {**_350M, "dense": _dense(2, 48, k=192)},
    ),
    "denseretnet-1.3b-released": (
        "DenseRetNet-1.3B as released, m = 2, wider gates; 1387.8M parameters",
        {**_1300M, "dense": _dense(2, 320, k=160)},
    ),
}
