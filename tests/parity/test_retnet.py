"""RetNet as torchscale has it: the layer, the whole decoder, the rotation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dense_lab.model import LanguageModel, ModelSpec
from dense_lab.modules import CoreModule
from dense_lab_kernels import rotate
from dense_lab_plugins.cores import retention
from dense_lab_plugins.cores.retnet import RetNet
from tests.parity.golden import Golden, difference
from tests.parity.test_dense_gau import DTYPES, official_parallel

PROJECTIONS = ("q", "k", "v", "g", "out")


@pytest.fixture(scope="module")
def layer() -> Golden:
    return Golden("retnet_layer")


def build_layer(golden: Golden, dtype: torch.dtype) -> CoreModule:
    core = RetNet(heads=golden.meta["heads"], norm_eps=golden.meta["eps"]).build(golden.meta["embed_dim"])
    core.load_state_dict({f"{name}_proj.weight": golden[f"w_{name}_proj"] for name in PROJECTIONS})
    return core.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_recurrent(layer: Golden, dtype: torch.dtype) -> None:
    """Output and state of the recurrent form."""
    with torch.no_grad():
        y, state = build_layer(layer, dtype)(layer["x"].to(dtype))
    assert difference(y, layer["y_recurrent"]) < layer.tolerance(layer["y_recurrent"], dtype, "f32_rec")
    official = layer["rec_state_last"].mT * layer["rec_scale_last"].sqrt()[:, None, None]
    assert difference(state.matrix, official) < layer.tolerance(official.float(), dtype, "f32_rec")


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_parallel_with_the_official_normaliser(
    layer: Golden, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the normaliser of the rows is equal tightly, gradients included."""
    monkeypatch.setattr(retention, "retention", official_parallel)
    core, x = build_layer(layer, dtype), layer["x"].to(dtype).requires_grad_()
    y, _ = core(x)
    assert difference(y, layer["y_parallel"]) < layer.tolerance(layer["y_parallel"], dtype, "f32_par")
    y.backward(layer["dy"].to(dtype))
    got = {"dx": x.grad, **{f"d{name}_proj": getattr(core, f"{name}_proj").weight.grad for name in PROJECTIONS}}
    for name, gradient in got.items():
        assert difference(gradient, layer[name]) < layer.tolerance(layer[name], dtype, "f32_par"), name


def test_layer_at_the_gap_of_the_other_forms(layer: Golden) -> None:
    """Parallel and chunkwise forms differ from the recurrent one only by the eps of the norm."""
    with torch.no_grad():
        y, _ = build_layer(layer, torch.float64)(layer["x"].double())
    parallel = layer.measured["par_vs_rec"]
    assert difference(y, layer["y_parallel"]) < 1.001 * parallel
    for chunk in (8, 16):
        gap = parallel + layer.measured[f"par_vs_chunk{chunk}"]
        assert difference(y, layer[f"y_chunk{chunk}"]) < 1.001 * gap


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotated_queries_and_keys(layer: Golden, dtype: torch.dtype) -> None:
    """With the scale of k and without the normaliser's part of q."""
    core = build_layer(layer, dtype)
    with torch.no_grad():
        streams = core.finished(core.project(layer["x"].to(dtype), None)[0])
    q, k = (streams[name].unflatten(-1, (core.heads, -1)) for name in ("q", "k"))
    for got, name in ((rotate(q), "qr"), (rotate(k), "kr")):
        expected = layer[name].transpose(1, 2)
        assert difference(got, expected) < layer.tolerance(expected, dtype, "f32_par"), name


@pytest.fixture(scope="module")
def decoder() -> Golden:
    return Golden("retnet_decoder")


def build_decoder(golden: Golden, dtype: torch.dtype) -> LanguageModel:
    meta = golden.meta
    tree = {
        "width": meta["embed_dim"],
        "depth": meta["layers"],
        "core": {"kind": "retnet", "heads": meta["heads"], "norm_eps": meta["eps"]},
        "ffn": {"kind": "torchscale", "hidden": meta["ffn_dim"], "activation": meta["activation_fn"]},
        "head": "untied",
        "norm_eps": meta["eps"],
    }
    model = ModelSpec.model_validate(tree).build(meta["vocab"])
    renamed = {
        "layers.": "blocks.",
        "retention.": "core.",
        "retention_layer_norm": "norm",
        "final_layer_norm": "ffn_norm",
        "embed_tokens": "embedding",
        "output_projection": "head",
        "layer_norm.weight": "norm.weight",
    }
    weights = {}
    for name, tensor in golden.weights().items():
        ours = name
        for old, new in renamed.items():
            ours = ours.replace(old, new)
        weights[ours] = tensor
    model.load_state_dict(weights)
    return model.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoder_parallel_with_the_official_normaliser(
    decoder: Golden, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and the output of every layer."""
    monkeypatch.setattr(retention, "retention", official_parallel)
    model = build_decoder(decoder, dtype)
    inner: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: inner.append(sum(x for x in args[:2] if x is not None)))
        block.register_forward_hook(lambda _, args, out: inner.append(out[0] + out[1]))
    with torch.no_grad():
        logits = model(decoder["input_ids"].long())
    expected = decoder["inner_states"]
    for got, layer in zip((inner[0], inner[1], inner[3]), expected, strict=True):
        assert difference(got, layer) < decoder.tolerance(layer, dtype, "f32_par")
    expected = decoder["logits_parallel"]
    assert difference(logits, expected) < decoder.tolerance(expected, dtype, "f32_par")


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoder_recurrent(decoder: Golden, dtype: torch.dtype) -> None:
    """One pass, and decoding, against the recurrent form; the other forms at their gaps."""
    model, ids = build_decoder(decoder, dtype), decoder["input_ids"].long()
    expected = decoder["logits_recurrent"]
    tolerance = decoder.tolerance(expected, dtype, "f32_par")
    with torch.no_grad():
        logits = model(ids)
        state, steps = None, []
        for token in ids.T:
            out = model.step(token, state)
            state = out.state
            steps.append(out.logits)
    assert difference(logits, expected) < tolerance
    assert difference(torch.stack(steps, 1), expected) < tolerance
    gap = 1.001 * decoder.measured["par_vs_rec"] + tolerance
    assert difference(logits, decoder["logits_parallel"]) < gap
    assert difference(logits, decoder["logits_chunkwise"]) < gap + 1.001 * decoder.measured["par_vs_chunk"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation(dtype: torch.dtype) -> None:
    """The rotation alone, its gradient, the decay mask and the normaliser of the rows."""
    golden = Golden("retnet_rotation")
    x = golden["x"].transpose(1, 2).to(dtype).requires_grad_()  # [B, L, H, K]
    y = rotate(x)
    y.backward(golden["dy"].transpose(1, 2).to(dtype))
    for got, name in ((y, "y"), (x.grad, "dx")):
        expected = golden[name].transpose(1, 2)
        assert difference(got, expected) < golden.tolerance(expected, dtype, "f32_sin"), name

    log_decay = retention.log_decay(x.shape[2], x.device, dtype)
    assert difference(log_decay, golden["log_decay"]) < golden.tolerance(golden["log_decay"], dtype, "f32_mask")
    time = torch.arange(x.shape[1], dtype=dtype)
    fade = torch.exp((time[:, None] - time) * log_decay[:, None, None]).tril()
    # The length of a rotated unit vector is the normaliser of its row.
    unit = torch.zeros_like(x)
    unit[..., 0] = 1
    mask = fade * rotate(unit, normaliser="retention").norm(dim=-1)[0].T[..., None]
    assert difference(mask, golden["mask"]) < golden.tolerance(golden["mask"], dtype, "f32_mask")
