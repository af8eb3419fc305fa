"""What a study means, written out: leaves by dotted path; and whether a study that goes on is still the same one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from dense_lab.errors import Problem
from dense_lab.loose import LOOSE
from dense_lab.space_tree import Leaf, Origins


def leaves(value: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Single values of a JSON value and the keys that lead to them; lists of single values count as one."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*at, key))
    elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        for index, item in enumerate(value):
            yield from leaves(item, (*at, index))
    else:
        yield at, value


def plain(dumped: dict[str, Any]) -> dict[str, Any]:
    """Leaves of a dumped spec by dotted path without labels, however a study spells it; a kind is at its component."""
    return {".".join(map(str, at[:-1] if at[-1] == "kind" else at)): value for at, value in leaves(dumped)}


def by_path(dumped: dict[str, Any], origins: Origins) -> dict[str, Any]:
    """Leaves of a dumped spec by the dotted paths that the study has for them; a kind is at its component's path."""
    found = {}
    for at, value in leaves(dumped):
        at = at[:-1] if at[-1] == "kind" else at
        written = at
        while written not in origins:
            written = written[:-1]
        node = origins[written]
        rest = [str(key) for key in at[len(written) :]]
        if isinstance(node, Leaf) and node.value == "none":
            # Nothing is below what was left out, though its spec has defaults.
            rest, value = [], "none"
        found[".".join(filter(None, (node.path, *rest))) if rest else node.own] = value
    return found


def merged(found: list[dict[str, Any]], parameters: set[str]) -> dict[str, Any]:
    """Fixed values of several closings; one that depends on a parameter is a mapping `{"one of": [...]}`."""
    fixed: dict[str, list[Any]] = {}
    for leaf in found:
        for path, value in leaf.items():
            if path not in parameters and value not in fixed.setdefault(path, []):
                fixed[path].append(value)
    return {path: values[0] if len(values) == 1 else {"one of": values} for path, values in sorted(fixed.items())}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], name: str) -> list[Problem]:
    """What makes trials of a frozen study and of a new one unlike; empty when they may stand side by side."""
    if old.get("grammar") != new["grammar"]:
        text = f"study {name!r} has grammar {old.get('grammar')}, this is {new['grammar']}: give it a new name"
        return [Problem(text, "dense_lab")]
    if ("arms" in old) != ("arms" in new):
        was, now = ("an ablation", "a search") if "arms" in old else ("a search", "an ablation")
        return [Problem(f"study {name!r} began as {was} and is {now} now: give it a new name", "name")]
    before, after = _said(old), _said(new)
    return [Problem(difference(p, before.get(p), after.get(p), name), p) for p in topmost(before, after)]


def topmost(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The dotted paths at which two mappings differ; below a choice that changed, everything did."""
    changed = [path for path in sorted(before.keys() | after.keys()) if before.get(path) != after.get(path)]
    return [path for path in changed if not any(path.startswith(f"{above}.") for above in changed)]


def _said(manifest: Mapping[str, Any]) -> dict[str, str]:
    """What a manifest says of each dotted path, in the words of the grammar."""
    said = {f"plugin {plugin}": version for plugin, version in manifest.get("plugins", {}).items()}
    if "arms" in manifest:
        return said
    said |= {path: in_words(value) for path, value in manifest.get("fixed", {}).items()}
    said |= {entry["path"]: _open_value(entry) for entry in manifest.get("parameters", [])}
    said |= {f"budget.{path}": in_words(value) for path, value in manifest.get("budget", {}).items()}
    return said | {"search.objective": in_words(manifest.get("objective", []))}


def in_words(value: Any) -> str:
    """A value as YAML would have it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {in_words(item)}" for key, item in value.items() if item is not None) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(in_words, value)) + "]"
    return value if isinstance(value, str) else json.dumps(value)


def _open_value(entry: Mapping[str, Any]) -> str:
    if entry["type"] == "choice":
        return in_words({"choice": entry["labels"]})
    log = {"log": True} if entry["log"] else {}
    step = {"step": entry["step"]} if entry.get("step", 1) != 1 else {}
    return in_words({entry["type"]: [entry["low"], entry["high"]], **log, **step})


def difference(path: str, before: str | None, after: str | None, name: str) -> str:
    """What to say of a path at which two studies differ."""
    text = f"{before or 'absent'} when study {name!r} began, {after or 'absent'} now"
    if before == LOOSE:
        return f"{text}: give --{path} before the command, or give the study a new name"
    if path.startswith("plugin "):
        return f"{text}: install that version again, or give the study a new name"
    if before is None or "one of" in before:
        return f"{text}: change it back, or give the study a new name"
    return f"{text}: go on with --set '{path}={before}', or give the study a new name"
