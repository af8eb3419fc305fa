"""Released checkpoints: a folder with `config.json` and weights becomes a LanguageModel.

Which formats are known is the business of plugins (`register.checkpoint_reader`); this module finds the files, reads
tensors without ever running pickled code, and says by name what is missing, unexpected or of another shape.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pydantic import ValidationError

from dense_lab import registry as registries
from dense_lab.errors import InputError, Problem

if TYPE_CHECKING:
    from torch import Tensor

    from dense_lab.model import LanguageModel

Config = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Files that may hold the weights, in order of preference; an index names the files of a checkpoint in pieces."""


class CheckpointPlan(NamedTuple):
    """How a foreign checkpoint becomes a LanguageModel."""

    model: Mapping[str, Any]
    """What would stand under `model:` in a study."""
    vocab_size: int
    names: Mapping[str, str]
    """Our parameter -> their tensor, for every parameter; axes of size 1 may differ."""
    ignored: frozenset[str] = frozenset()
    """Their tensors that hold nothing learned (buffers, copies)."""


class CheckpointReader(Protocol):
    """Knows one format of checkpoints."""

    def claims(self, config: Config) -> bool:
        """Whether a folder with this `config.json` is of this format."""
        ...

    def plan(self, config: Config, shapes: Shapes) -> CheckpointPlan:
        """The plan for tensors of these names and shapes; raises InputError for what it cannot represent."""
        ...


def load_checkpoint(folder: Path | str, *, registry: registries.Registry | None = None) -> LanguageModel:
    """The model in `folder`: weights in fp32, evaluation mode, on the CPU.

    Reads the official DenseSSM models and transformers' Mamba, and whatever plugins add. `model(input_ids)` gives
    logits [B, T, V]; `model.step(token, state)` decodes, with `state=None` at the start.
    Raises InputError, naming file or tensor, for a folder that is not such a checkpoint; pickled code is never run.
    """
    folder = Path(folder)
    config = _read_json(folder / "config.json")
    readers = (registry or registries.default()).checkpoint_readers
    reader = next((reader for reader in readers.values() if reader.claims(config)), None)
    if reader is None:
        raise InputError(
            Problem(f"no reader for model_type {config.get('model_type')!r}. Known formats: {', '.join(readers)}")
        ).located(str(folder / "config.json"))
    tensors = _read_tensors(folder)
    try:
        return _assemble(reader.plan(config, {name: tuple(t.shape) for name, t in tensors.items()}), tensors)
    except (InputError, ValidationError) as error:
        raise (error if isinstance(error, InputError) else InputError(str(error))).located(str(folder)) from None


def number(config: Config, key: str, default: float | None = None) -> Any:
    """`config[key]`, a number above zero; raises InputError when it is none, or is missing without a default."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise InputError(f"config.json: {key} must be a number above 0, got {value!r}")
    return value


def whole(config: Config, key: str, default: int | None = None) -> int:
    """`config[key]`, a whole number above zero; raises InputError otherwise."""
    value = number(config, key, default)
    if not isinstance(value, int):
        raise InputError(f"config.json: {key} must be a whole number, got {value!r}")
    return value


def _assemble(plan: CheckpointPlan, tensors: dict[str, Tensor]) -> LanguageModel:
    import torch

    from dense_lab.model import ModelSpec

    with torch.device("meta"):
        model = ModelSpec.model_validate(dict(plan.model)).build(plan.vocab_size)
    weights, problems = {}, []
    state = model.state_dict()
    for ours, expected in state.items():
        theirs = plan.names[ours]
        tensor = tensors.get(theirs)
        if tensor is None:
            problems.append(Problem(f"tensor {theirs!r} is missing, expected with shape {list(expected.shape)}"))
        elif [n for n in tensor.shape if n != 1] != [n for n in expected.shape if n != 1]:
            got = list(tensor.shape)
            problems.append(Problem(f"tensor {theirs!r} has shape {got}, expected {list(expected.shape)}"))
        else:
            weights[ours] = tensor.reshape(expected.shape).float()
    unexpected = tensors.keys() - {plan.names[ours] for ours in state} - plan.ignored
    unknown = "is unexpected: the configuration asks for none of that name"
    problems += [Problem(f"tensor {name!r} {unknown}") for name in sorted(unexpected)]
    if problems:
        raise InputError(problems)
    model.load_state_dict(weights, assign=True)
    if model.spec.head == "tied":
        model.head.weight = model.embedding.weight
    return model.eval()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; a checkpoint is a folder with config.json and weights") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path} must hold a JSON object, got {type(tree).__name__}")
    return tree


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise InputError(f"{folder} holds no weights: expected one of {', '.join(WEIGHTS)}")
    if found.suffix != ".json":
        return _read_file(found)
    pieces = _read_json(found).get("weight_map")
    if not isinstance(pieces, dict) or not all(isinstance(p, str) and Path(p).name == p for p in pieces.values()):
        raise InputError(f"{found} must have a 'weight_map' from tensor names to names of files beside it")
    tensors: dict[str, Tensor] = {}
    for piece in sorted(set(pieces.values())):
        tensors.update(_read_file(folder / piece))
    return tensors


def _read_file(path: Path) -> dict[str, Tensor]:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0] if str(error) else "not a pickle of tensors"
        raise InputError(
            f"{path} is refused: it holds more than tensors, and code in it is never run; {reason}"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise InputError(f"{path} must hold a mapping from names to tensors")
    return tensors
