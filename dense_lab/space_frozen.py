"""What a study means, written out: leaves by dotted path; and whether a study that goes on is still the same one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dense_lab.errors import Problem
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
    found = []
    for part in ("parameters", "fixed", "budget", "objective", "plugins"):
        before, after = _by_name(old.get(part)), _by_name(new[part])
        for path in sorted(before.keys() | after.keys()):
            if before.get(path) != after.get(path):
                where = path if part in ("parameters", "fixed") else f"{part}.{path}".strip(".")
                text = f"was {_said(before.get(path))} when study {name!r} began and is {_said(after.get(path))} now"
                found.append(Problem(f"{text}; {_remedy(part, path, before.get(path))}", where))
    return found


def _by_name(part: Any) -> dict[str, Any]:
    if isinstance(part, list):
        return {entry["path"]: entry for entry in part} if part and "path" in part[0] else {"": part}
    return dict(part or {})


def _said(value: Any) -> str:
    """A frozen value in the words of the grammar."""
    if isinstance(value, dict) and value.get("type") == "choice":
        return "{choice: [" + ", ".join(value["labels"]) + "]}"
    if isinstance(value, dict) and value.get("type") in ("int", "float"):
        log = ", log: true" if value["log"] else ""
        step = f", step: {value['step']}" if value.get("step", 1) != 1 else ""
        return f"{{{value['type']}: [{value['low']}, {value['high']}]{log}{step}}}"
    return "absent" if value is None else str(value)


def _remedy(part: str, path: str, before: Any) -> str:
    if part == "plugins":
        return f"install {path} {before} again, or give the study a new name" if before else "give the study a new name"
    if before is None or part in ("budget", "objective") or (isinstance(before, dict) and "one of" in before):
        return "change it back, or give the study a new name"
    return f"go on with --set '{path}={_said(before)}', or give the study a new name"
