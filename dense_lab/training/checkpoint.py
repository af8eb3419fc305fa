"""Checkpoints: model, optimiser, random states and position, in formats that run no code when they are read."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor

from dense_lab.model import LanguageModel

_RANDOM = "random/"


@dataclass
class Progress:
    """How far a run has come; everything else about its position follows from `step`."""

    step: int = 0
    seconds: float = 0.0
    """Of training, evaluations included."""
    batches: str = ""
    """Running sha256 over the batches used."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The newest value of every metric."""


def save(folder: Path, model: LanguageModel, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Replace `folder` by a checkpoint; a reader finds the old one or the new one, never half of one."""
    scratch, old = folder.with_name(f"{folder.name}.{os.getpid()}"), folder.with_name(f"{folder.name}.old")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    save_model(model, str(scratch / "model.safetensors"))
    tensors = {
        f"{name}/{key}": value.contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    save_file(tensors | _random_states(), scratch / "train.safetensors")
    (scratch / "state.json").write_text(json.dumps(asdict(progress), indent=1))
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.replace(old)
    scratch.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def load(folder: Path, model: LanguageModel, optimizer: torch.optim.Optimizer) -> Progress | None:
    """Restore model, optimiser and torch's random states; None when there is no checkpoint."""
    if not folder.exists():
        folder = folder.with_name(f"{folder.name}.old")  # A crash between two renames.
    if not folder.exists():
        return None
    load_model(model, folder / "model.safetensors")
    tensors = load_file(folder / "train.safetensors")
    for name, parameter in model.named_parameters():
        own = {key: value for key, value in tensors.items() if key.rpartition("/")[0] == name}
        if own:
            optimizer.state[parameter] = {key.rpartition("/")[2]: t.to(parameter.device) for key, t in own.items()}
    torch.set_rng_state(tensors[f"{_RANDOM}cpu"])
    if f"{_RANDOM}cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors[f"{_RANDOM}cuda"])
    return Progress(**json.loads((folder / "state.json").read_text()))


def _random_states() -> dict[str, Tensor]:
    states = {f"{_RANDOM}cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states[f"{_RANDOM}cuda"] = torch.cuda.get_rng_state()
    return states
