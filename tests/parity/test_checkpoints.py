"""Released checkpoints: every container, what is refused, and a round trip through transformers."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from dense_lab.errors import InputError
from dense_lab.interop import WEIGHTS, load_checkpoint
from dense_lab.model import LanguageModel
from tests.parity.checkpoints import dense_gau_parts, mamba_parts, write
from tests.parity.golden import Golden, difference

GOLDEN = {"dense_gau_m2": ("logits_recurrent", "f32_recurrent"), "mamba1_hf_lm": ("logits", "f32")}


def parts(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Configuration and weights of one of the golden models."""
    return (mamba_parts if name == "mamba1_hf_lm" else dense_gau_parts)(Golden(name))


def decoded(model: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V], token by token."""
    state, logits = None, []
    with torch.no_grad():
        for token in ids.T:
            out = model.step(token, state)
            state = out.state
            logits.append(out.logits)
    return torch.stack(logits, 1)


@pytest.mark.parametrize("form", WEIGHTS)
@pytest.mark.parametrize("name", GOLDEN)
def test_every_container(name: str, form: str, tmp_path: Path) -> None:
    """safetensors and torch.save, whole and in pieces: the same logits, in one pass and decoded."""
    golden = Golden(name)
    write(tmp_path, *parts(name), form)
    model, ids = load_checkpoint(tmp_path), golden["input_ids"].long()
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    expected = golden[GOLDEN[name][0]]
    tolerance = golden.tolerance(expected, torch.float32, GOLDEN[name][1])
    assert difference(model(ids), expected) < tolerance
    assert difference(decoded(model, ids), expected) < tolerance


def test_loaded_model_trains(tmp_path: Path) -> None:
    """Tied weights stay tied, and everything takes a gradient."""
    write(tmp_path, *parts("mamba1_hf_lm"))
    model = load_checkpoint(tmp_path).train()
    assert model.head.weight is model.embedding.weight
    ids = Golden("mamba1_hf_lm")["input_ids"].long()
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_which_layers_are_dense_and_their_gates_come_from_shapes(tmp_path: Path) -> None:
    """A wider gate of k, no connection in layer 2, no unused parameters in layer 0."""
    config, tensors = parts("dense_gau_m2")
    generator = torch.Generator().manual_seed(0)
    for layer in (1, 3):
        attention = f"model.layers.{layer}.self_attn.k_select"
        tensors[f"{attention}.fc1.weight"] = torch.randn(6, 64, generator=generator)
        tensors[f"{attention}.fc2.weight"] = torch.randn(32, 6, generator=generator)
    for layer in (0, 2):
        names = [n for n in tensors if f"layers.{layer}." in n and ("select" in n or "k_norm" in n or "v_norm" in n)]
        for name in names:
            del tensors[name]
    write(tmp_path, config, tensors)
    model = load_checkpoint(tmp_path)
    assert [sorted(block.reads) for block in model.blocks] == [[], ["k", "v"], [], ["k", "v"]]
    assert [block.reads.get("k") for block in model.blocks] == [None, (0,), None, (2, 1)]
    widths = [model.blocks[3].dense[site].transition.gate.map[0].out_features for site in ("k", "v")]
    assert widths == [6, 2]
    ids = torch.arange(10)[None]
    assert difference(decoded(model.double(), ids), model(ids)) < 1e-12


def test_half_precision_keeps_the_rotation(tmp_path: Path) -> None:
    """Positions, angles and decay are no buffers that `bfloat16()` could round: 600 tokens stay near fp32."""
    write(tmp_path, *parts("dense_gau_m2"))
    model = load_checkpoint(tmp_path)
    assert not list(model.buffers())
    ids = torch.randint(97, (1, 600), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids)[:, -100:]
        got = model.bfloat16()(ids)[:, -100:].float()
    assert float((got - expected).norm() / expected.norm()) < 0.05


def test_code_in_a_pickle_is_never_run(tmp_path: Path) -> None:
    """A malicious checkpoint is refused and nothing happens."""
    config, tensors = parts("dense_gau_m1")
    write(tmp_path, config, {})
    (tmp_path / "model.safetensors").unlink()
    flag = tmp_path / "executed"

    class Malice:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (flag,)

    for save in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        save({**tensors, "extra": Malice()}, tmp_path / "pytorch_model.bin")
        with pytest.raises(InputError, match=r"pytorch_model.bin is refused.*never run"):
            load_checkpoint(tmp_path)
        assert not flag.exists()


BROKEN: list[tuple[str, Any, str]] = [
    ("missing", lambda c, t: t.pop("lm_head.weight"), r"tensor 'lm_head.weight' is missing.*\[97, 64\]"),
    ("unexpected", lambda c, t: t.update(bias=torch.ones(3)), "tensor 'bias' is unexpected"),
    (
        "shape",
        lambda c, t: t.update({"model.norm.weight": torch.ones(3)}),
        r"'model.norm.weight' has shape \[3\].*\[64\]",
    ),
    ("layers", lambda c, t: c.update(num_hidden_layers=3), "model.layers.3.* is unexpected"),
    ("no heads", lambda c, t: c.pop("num_attention_heads"), "num_attention_heads must be a number above 0, got None"),
    ("odd heads", lambda c, t: c.update(num_attention_heads=3), "must divide into 3 heads"),
    ("span", lambda c, t: c.update(dense_block_layers=0), "dense_block_layers must be a number above 0, got 0"),
    ("half a layer", lambda c, t: c.update(num_hidden_layers=3.5), "num_hidden_layers must be a whole number, got 3.5"),
    ("words", lambda c, t: c.update(hidden_size="wide"), "hidden_size must be a number above 0, got 'wide'"),
    (
        "format",
        lambda c, t: c.pop("query_key_dim"),
        "no reader for model_type 'llama'. Known formats: dense_gau_retnet",
    ),
]


@pytest.mark.parametrize(("damage", "message"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_what_is_wrong_is_named(damage: Any, message: str, tmp_path: Path) -> None:
    config, tensors = parts("dense_gau_m1")
    damage(config, tensors)
    write(tmp_path, config, tensors)
    with pytest.raises(InputError, match=message):
        load_checkpoint(tmp_path)


def test_folders_that_are_no_checkpoints(tmp_path: Path) -> None:
    """No folder, no JSON, no weights, damaged weights, an index that points elsewhere."""
    with pytest.raises(InputError, match="does not exist; a checkpoint is a folder"):
        load_checkpoint(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        load_checkpoint(tmp_path)
    config, tensors = parts("dense_gau_m1")
    write(tmp_path, config, tensors)
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(InputError, match=r"model.safetensors cannot be read"):
        load_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds no weights: expected one of model.safetensors"):
        load_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"pytorch_model.bin"):
        load_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(InputError, match="names of files beside it"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "options",
    [{}, {"tie_word_embeddings": False, "use_bias": True}, {"use_conv_bias": False, "time_step_rank": 5, "expand": 3}],
    ids=["defaults", "untied with biases", "no conv bias"],
)
def test_round_trip_through_transformers(options: dict[str, Any], tmp_path: Path) -> None:
    """A model that transformers wrote gives the same logits here."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(vocab_size=61, hidden_size=32, state_size=8, num_hidden_layers=2, **options)
    torch.manual_seed(0)
    theirs = transformers.MambaForCausalLM(config).eval()
    for parameter in theirs.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(61, (2, 19))
    with torch.no_grad():
        expected = theirs(ids).logits
    ours = load_checkpoint(tmp_path)
    scale = float(expected.abs().max())
    assert difference(ours(ids), expected) < 1e-5 * scale
    assert difference(decoded(ours, ids), expected) < 1e-5 * scale
