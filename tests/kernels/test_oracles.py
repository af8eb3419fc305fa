"""Every implementation against the peers' golden arrays: outputs, states and gradients (tests/oracles/README.md)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from dense_lab_kernels import causal_conv1d, decay_attention, dense_fuse, selective_scan, using

FOLDER = Path(__file__).parents[1] / "oracles"
Arrays = dict[str, Tensor]


class Oracle(NamedTuple):
    """How the operation is called on a peer's arrays, in the peer's names and layout."""

    operation: str
    inputs: str
    outputs: str
    upstreams: str
    run: Callable[[Arrays, dict[str, Any]], tuple[Tensor, ...]]
    decays: str = ""  # what decay_attention's log_decay is made of


def retention(a: Arrays, meta: dict[str, Any]) -> tuple[Tensor, ...]:
    q, k, v = (a[name].transpose(1, 2) for name in "qkv")  # the peer's layout is [B, H, T, K]
    heads = torch.arange(q.shape[2], dtype=q.dtype)
    out = decay_attention(q * q.shape[-1] ** -0.5, k, v, torch.log1p(-torch.exp2(-5 - heads))).output
    return (out.transpose(1, 2),)


def simple_gla(a: Arrays, meta: dict[str, Any]) -> tuple[Tensor, ...]:
    scaled = a["q"] * a["q"].shape[-1] ** -0.5
    return decay_attention(scaled, a["k"], a["v"], a["g"], initial_state=a["initial_state"])


def linear_attention(a: Arrays, meta: dict[str, Any]) -> tuple[Tensor, ...]:
    no_decay = a["q"].new_zeros(a["q"].shape[2])
    scaled = a["q"] * a["q"].shape[-1] ** -0.5
    return decay_attention(scaled, a["k"], a["v"], no_decay, initial_state=a["initial_state"])


def ssd_minimal(a: Arrays, meta: dict[str, Any]) -> tuple[Tensor, ...]:
    state = a["initial_states"][:, 0].mT if "initial_states" in a else None  # the peer's state is [H, P, N]
    out, final = decay_attention(a["C"], a["B"], a["X"], a["A"], initial_state=state)
    return out, final.mT


def ssd_full(a: Arrays, meta: dict[str, Any]) -> tuple[Tensor, ...]:
    low, high = (float(limit) for limit in meta["dt_limit"])
    dt = softplus(a["dt"] + a["dt_bias"]).clamp(low, high)
    out, final = decay_attention(a["C"], a["B"], a["x"] * dt.unsqueeze(-1), dt * a["A"])
    return out + a["D"].unsqueeze(-1) * a["x"], final.mT


def mamba_scan(a: Arrays, meta: dict[str, Any]) -> tuple[Tensor, ...]:
    def tokens_first(name: str) -> Tensor | None:
        return a[name].mT if name in a else None

    b, c = (x.unsqueeze(1) if x.ndim == 3 else x for x in (a["B"], a["C"]))  # [B, G, N, T]
    out, last, _ = selective_scan(
        a["u"].mT,
        a["delta"].mT,
        a["A"],
        b.permute(0, 3, 1, 2),
        c.permute(0, 3, 1, 2),
        a.get("D"),
        tokens_first("z"),
        a.get("delta_bias"),
        dt_activation="softplus" if meta["delta_softplus"] else "none",
    )
    return out.mT, last


def convolution(a: Arrays, meta: dict[str, Any]) -> tuple[Tensor, ...]:
    out, state = causal_conv1d(a["x"].mT, a["weight"], a["bias"], activation="silu", initial_state=a["initial_states"])
    return out.mT, state


def fusion(a: Arrays, meta: dict[str, Any]) -> tuple[Tensor, ...]:
    return (dense_fuse(a["k"], a["k_past"].unbind(0), a["k_gate"], a["w_k_norm"], activation="silu", eps=1e-6),)


ORACLES = {
    "retention_fla_naive": Oracle("decay_attention", "q k v", "o", "do", retention),
    "simple_gla": Oracle("decay_attention", "q k v g initial_state", "o final_state", "do dht", simple_gla, "g"),
    "linear_attn": Oracle("decay_attention", "q k v initial_state", "o final_state", "do dht", linear_attention),
    "mamba2_ssd_minimal": Oracle("decay_attention", "X A B C", "Y final_state", "dY dfinal", ssd_minimal, "A"),
    "mamba2_ssd_minimal_init": Oracle(
        "decay_attention", "X A B C initial_states", "Y final_state", "dY dfinal", ssd_minimal, "A"
    ),
    "mamba2_ssd_full": Oracle(
        "decay_attention", "x dt A B C D dt_bias", "Y final_state", "dY", ssd_full, "dt A dt_bias"
    ),
    "mamba1_scan": Oracle("selective_scan", "u delta A B C D z delta_bias", "out last_state", "dout", mamba_scan),
    "mamba1_scan_grouped": Oracle("selective_scan", "u delta A B C", "out last_state", "dout", mamba_scan),
    "causal_conv1d_silu": Oracle(
        "causal_conv1d", "x weight bias initial_states", "out final_states", "dout", convolution
    ),
    "densessm_fusion": Oracle("dense_fuse", "k k_past k_gate w_k_norm", "k_fused", "", fusion),
}
IMPLEMENTATIONS = {
    "decay_attention": ("reference", "chunked", "numba"),
    "selective_scan": ("reference", "numba"),
    "causal_conv1d": ("reference", "numba"),
    "dense_fuse": ("reference", "numba"),
}


def tolerance(name: str, golden: np.ndarray, dtype: torch.dtype, meta: dict[str, Any], largest: float) -> float:
    """The rule of tests/oracles/README.md; gradients share the relative error of the peer's output."""
    size = float(np.abs(golden).max())
    if dtype == torch.float64:
        return (1e-6 if golden.dtype == np.float32 else 1e-9) * max(1.0, size)
    measured = meta.get("measured", {})
    if "state" in name and not name.startswith("d") and "f32_state" in measured:
        return 10 * measured["f32_state"]
    peer = measured.get("f32", torch.finfo(torch.float32).eps * largest)
    return 10 * peer * (size / largest if name.startswith("d") else 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize(
    ("name", "impl"), [(name, impl) for name, oracle in ORACLES.items() for impl in IMPLEMENTATIONS[oracle.operation]]
)
def test_equals_the_peer(name: str, impl: str, dtype: torch.dtype) -> None:
    if impl == "numba":
        pytest.importorskip("numba")
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as stored:
        golden = dict(stored)
    meta = json.loads(str(golden.pop("meta")))
    oracle = ORACLES[name]
    arrays = {key: torch.from_numpy(golden[key]).to(dtype).requires_grad_() for key in oracle.inputs.split()}
    if (impl, oracle.operation) == ("numba", "decay_attention"):  # it has no gradient of the decays
        for key in oracle.decays.split():
            arrays[key].requires_grad_(False)
    with using({oracle.operation: impl}):
        outputs = oracle.run(arrays, meta)
    found = dict(zip(oracle.outputs.split(), outputs, strict=True))
    if oracle.upstreams:
        upstreams = [torch.from_numpy(golden[key]).to(dtype) for key in oracle.upstreams.split()]
        torch.autograd.backward(outputs[: len(upstreams)], upstreams)
        found |= {f"d{key}": tensor.grad for key, tensor in arrays.items() if tensor.requires_grad}

    largest = float(np.abs(golden[oracle.outputs.split()[0]]).max())
    for key, tensor in found.items():
        error = np.abs(tensor.detach().double().numpy() - golden[key]).max()
        assert error <= tolerance(key, golden[key], dtype, meta, largest), f"{key} differs by {error:.2e}"
