"""Launch parameters found by measuring (`dense-lab tune`), which override the rules of the kernels.

A rule stays a rule: what was measured is kept in a file, by GPU and class of shapes, and read once per process. A file
that cannot be read, or that names what a rule does not have, is left out with a warning; nothing searches at a call.

    choice = chosen("dense_fuse", "forward W1024", rule, {"warps": (2, 4, 8)})    # of the rule's type, perhaps changed
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

R = TypeVar("R")
Changes = Mapping[str, int]
"""Values by the dotted name of a rule's field: {"values.stages": 2}."""
Knobs = Mapping[str, Sequence[int]]
"""What may be tried of each field."""

FOLDER_VARIABLE = "DENSE_LAB_CACHE"
# Not context variables: backward passes run in threads of autograd's own, which have no context.
_trying: dict[tuple[str, str], Changes] | None = None
_met: dict[tuple[str, str], Met] = {}


class TunedFileIgnored(UserWarning):
    """The file of tuned launch parameters is not used; the text names it and says why."""


def path() -> Path:
    """The file: `tuned.json` in the user's cache folder, or in $DENSE_LAB_CACHE."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dense-lab"
    return Path(os.environ.get(FOLDER_VARIABLE) or default) / "tuned.json"


class Met(NamedTuple):
    """A rule that a call came by, and what may be tried in its place."""

    rule: Any
    knobs: Knobs


def chosen(operation: str, shape: str, rule: R, knobs: Knobs) -> R:
    """What the rule says for a class of shapes, changed by what is being tried, else by what the file holds."""
    key = (operation, shape)
    if _trying is not None:
        _met.setdefault(key, Met(rule, knobs))
        return changed(rule, _trying[key]) if key in _trying else rule
    changes = _file().get(operation, {}).get(shape)
    if not changes:
        return rule
    try:
        for name, value in changes.items():
            if value not in knobs.get(name, ()):
                raise ValueError(f"{name} = {value!r} is none of {knobs}")
        return changed(rule, changes)
    except (TypeError, ValueError, AttributeError) as error:
        _file()[operation].pop(shape)
        _warn(f"{operation}, {shape}: {error}")
        return rule


def changed(rule: R, changes: Changes) -> R:
    """A copy of a (nested) dataclass or NamedTuple with some numbers replaced; raises what the rule itself refuses."""
    for name, value in changes.items():
        head, _, rest = name.partition(".")
        rule = _with(rule, head, changed(getattr(rule, head), {rest: value}) if rest else value)
    return rule


def _with(rule: R, name: str, value: Any) -> R:
    if hasattr(rule, "_replace"):
        return rule._replace(**{name: value})
    return dataclasses.replace(rule, **{name: value})  # type: ignore[type-var]


@contextlib.contextmanager
def trying(choices: Mapping[tuple[str, str], Changes]) -> Iterator[dict[tuple[str, str], Met]]:
    """Within the block the file does not count, and these changes do; yields the rules met, by operation and shape.

    It holds for all threads of the process.
    """
    global _trying, _met
    before = _trying, _met
    _trying, _met = dict(choices), {}
    try:
        yield _met
    finally:
        _trying, _met = before


def store(found: Mapping[tuple[str, str], Changes]) -> Path:
    """Write what was found for this GPU, beside what the file holds; an empty choice removes what stood there."""
    place = path()
    everything = _read(place) if place.exists() else {}
    mine = everything.setdefault(_device(), {})
    for (operation, shape), changes in found.items():
        shapes = mine.setdefault(operation, {})
        shapes.pop(shape, None)
        if changes:
            shapes[shape] = {**changes}
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = place.with_name(f".{place.name}.{os.getpid()}")
    draft.write_text(json.dumps(everything, indent=2) + "\n")
    draft.replace(place)
    forget()
    return place


def text(operation: str) -> str:
    """What the file changes for an operation on this GPU, as text; empty where there is no GPU or no file."""
    return json.dumps(_file().get(operation, {}), sort_keys=True)


def forget() -> None:
    """Read the file again at the next call."""
    _file.cache_clear()


@functools.cache
def _file() -> dict[str, dict[str, Changes]]:
    """What the file holds for this GPU: changes by operation and shape."""
    place, device = path(), _device()
    if not device or not place.exists():
        return {}
    found = _read(place).get(device, {})
    if not all(isinstance(shapes, dict) for shapes in found.values()):
        _warn("it does not hold shapes by operation")
        return {}
    return found


def _read(place: Path) -> dict[str, Any]:
    try:
        found = json.loads(place.read_text())
    except (OSError, ValueError) as error:
        _warn(str(error))
        return {}
    if not isinstance(found, dict) or not all(isinstance(v, dict) for v in found.values()):
        _warn("it is not a mapping of GPUs")
        return {}
    return found


def _device() -> str:
    """Name of the GPU, empty where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def _warn(reason: str) -> None:
    warnings.warn(f"{path()} is not used: {reason}. Remove it, or run `dense-lab tune`", TunedFileIgnored, stacklevel=3)
