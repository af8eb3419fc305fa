"""Presets: models by name. `model: {preset: NAME, ...}` means the preset's mapping with the user's keys over it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dense_lab import registry as registries
from dense_lab.errors import InputError, Problem, did_you_mean

KEY = "preset"


def expand(tree: Any, registry: registries.Registry | None = None, path: str = "") -> Any:
    """`tree` (plain data of a study) with every mapping that names a preset replaced by the mapping it means.

    The user's keys win: mappings are laid over each other key by key, unless both name a `kind` and it differs, or the
    user's one is an open value; anything else replaces. Raises InputError, with the dotted path, for an unknown name.
    """
    if isinstance(tree, list | tuple):
        return [expand(item, registry, f"{path}[{index}]") for index, item in enumerate(tree)]
    if not isinstance(tree, Mapping):
        return tree
    given = {
        key: value if str(key).startswith("x-") else expand(value, registry, f"{path}.{key}".lstrip("."))
        for key, value in tree.items()
        if key != KEY
    }
    return _laid_over(_model(tree[KEY], registry, path), given) if KEY in tree else given


def _model(name: Any, registry: registries.Registry | None, path: str) -> Mapping[str, Any]:
    presets = (registry or registries.default()).presets
    if not isinstance(name, str) or name not in presets:
        near = did_you_mean(str(name), presets)
        message = f"no preset named {name!r}.{near} Installed: {', '.join(sorted(presets))}"
        raise InputError(Problem(message, f"{path}.{KEY}".lstrip(".")))
    return presets[name].model


def _laid_over(base: Any, given: Any) -> Any:
    if not isinstance(base, Mapping) or not isinstance(given, Mapping) or _replaces(base, given):
        return given
    merged = {key: _laid_over(value, given[key]) if key in given else _copy(value) for key, value in base.items()}
    return {**merged, **{key: value for key, value in given.items() if key not in base}}


def _replaces(base: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    return "choice" in given or ("kind" in given and given["kind"] != base.get("kind"))


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, Mapping) else value
