"""Checkpoints written from golden weights, in the peers' formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dense_lab import registry
from dense_lab.model import LanguageModel
from tests.parity.golden import Golden


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], form: str = "model.safetensors") -> None:
    """Write config.json and the weights as one file or, for an index, as two."""
    (folder / "config.json").write_text(json.dumps(config))
    save = save_file if "safetensors" in form else torch.save
    if not form.endswith(".index.json"):
        save(tensors, folder / form)
        return
    suffix = form.removesuffix(".index.json").split(".")[-1]
    names = sorted(tensors)
    pieces = {f"piece-{i}-of-2.{suffix}": names[i::2] for i in range(2)}
    for piece, members in pieces.items():
        save({name: tensors[name] for name in members}, folder / piece)
    weight_map = {name: piece for piece, members in pieces.items() for name in members}
    (folder / form).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def dense_gau_parts(golden: Golden) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration, with the model type that the official code gives, and weights with its buffers."""
    tensors = Golden("dense_gau_weights").weights("")
    tensors["model.retnet_rel_pos.angle"] = golden["angle"].float()
    tensors["model.retnet_rel_pos.decay"] = golden["log_decay"].float()
    return {"model_type": "llama", "tie_word_embeddings": False, **golden.meta["config"]}, tensors


def write_dense_gau(folder: Path, golden: Golden, form: str = "model.safetensors") -> None:
    """A checkpoint of an official DenseSSM model."""
    write(folder, *dense_gau_parts(golden), form)


def mamba_parts(golden: Golden) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights of transformers' Mamba."""
    return {"model_type": "mamba", **golden.meta["config"]}, golden.weights()


def their_names(model: LanguageModel, form: str = "dense_gau_retnet") -> dict[str, str]:
    """Our parameter names -> the peer's, as the reader has them."""
    reader = registry.default().checkpoint_readers[form]
    golden = Golden("dense_gau_m1" if form == "dense_gau_retnet" else "mamba1_hf_lm")
    config, tensors = dense_gau_parts(golden) if form == "dense_gau_retnet" else mamba_parts(golden)
    plan = reader.plan(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    return {ours: plan.names[ours] for ours, _ in model.named_parameters()}
