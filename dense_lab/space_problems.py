"""What pydantic found wrong with a closed study, said in our words and placed where the user wrote it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from dense_lab.errors import Problem, did_you_mean
from dense_lab.registry import Registry
from dense_lab.space_shape import ROOT, Shape
from dense_lab.space_tree import Node, Origins
from dense_lab.study import StudySpec

RESOURCES = {
    "workers": "--workers",
    "jobs": "--workers",
    "storage": "--storage",
    "runs": "--runs",
    "runs_dir": "--runs",
    "folder": "--runs",
    "device": "--device",
    "gpu": "--device",
    "tracking": "--storage and --runs",
    "mlflow": "--runs",
    "plugins": "--plugin",
}
"""Keys that people expect in a file and that are options of the command line, so that they stay out of the hash."""
_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "number": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a word",
    "string_pattern_mismatch": "a name of letters, digits, '.', '_' and '-'",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "none_required": "null",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of {ge} or more",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of {le} or less",
    "too_short": "a list of {min_length} or more",
    "too_long": "a list of {max_length} or fewer",
    "string_too_short": "a word of {min_length} letters or more",
    "literal_error": "{expected}",
    "path_type": "a path",
}
"""What was expected, by pydantic's type of error."""


def problems(error: ValidationError, closed: Any, origins: Origins, registry: Registry) -> list[Problem]:
    """One problem for each thing that is wrong in `closed`, the plain values that `origins` says the places of."""
    groups: dict[tuple[str | int, ...], list[tuple[_Place, dict[str, Any]]]] = defaultdict(list)
    for entry in error.errors(include_url=False):
        place = _Place(entry["loc"], closed, origins, registry)
        groups[place.union or place.at].append((place, dict(entry)))
    return [problem for entries in groups.values() for problem in _group(entries, registry)]


class _Place:
    """Where a pydantic location lies in the closed tree; branches of unions, which pydantic adds to it, are no keys."""

    def __init__(self, loc: Iterable[str | int], closed: Any, origins: Origins, registry: Registry) -> None:
        self.at: tuple[str | int, ...] = ()
        self.union: tuple[str | int, ...] = ()
        """Where a union stands of which this is one branch's complaint."""
        self.missing = ""
        """Keys below `at` that nobody wrote: the complaint is about a default, or that it is needed."""
        self.node: Node = origins[()]
        self.shape, self.value, self.parent, self.parent_shape = ROOT, closed, None, ROOT
        for key in loc:
            if (*self.at, key) in origins and not self.missing:
                self.parent, self.parent_shape = self.value, self.shape
                self.shape = self.shape.child(self.value, key, registry)
                self.value = self.value[key]
                self.at = (*self.at, key)
                self.node = origins[self.at]
            elif isinstance(key, str) and (self.missing or key in _fields(self.shape, self.value, registry)):
                self.missing += f".{key}"
            elif isinstance(key, str):
                self.union = self.union or self.at

    @property
    def path(self) -> str:
        """Dotted path."""
        return (self.node.path + self.missing).lstrip(".") if self.missing else self.node.own


def _fields(shape: Shape, value: Any, registry: Registry) -> dict[str, Any]:
    spec = shape.expects(value, registry)
    return spec.model_fields if spec else {}


def _group(entries: list[tuple[_Place, dict[str, Any]]], registry: Registry) -> list[Problem]:
    """Problems of one place; the branches of a union are one problem, unless one of them got further than the rest."""
    deepest = max(len(place.at) for place, _ in entries)
    entries = [(place, entry) for place, entry in entries if len(place.at) == deepest]
    place = entries[0][0]
    if len(entries) > 1 and place.union:
        phrases = list(dict.fromkeys(filter(None, (_expected(entry) for _, entry in entries))))
        text = f"expected {' or '.join(phrases)}, got {got(place.value)}"
        return [Problem(text, place.path, place.node.where)]
    return [_problem(place, entry, registry) for place, entry in entries]


def _problem(place: _Place, entry: dict[str, Any], registry: Registry) -> Problem:
    if entry["type"] == "extra_forbidden":
        return Problem(_unknown_key(place, registry), place.path, place.node.key)
    return Problem(_message(place, entry), place.path, place.node.where)


def _message(place: _Place, entry: dict[str, Any]) -> str:
    if entry["type"] == "missing":
        return "this key is needed"
    expected = _expected(entry)
    value = entry["input"] if place.missing else place.value
    if entry["type"] in ("slot_type", "slot_kind"):
        slot, installed = entry["ctx"]["slot"], entry["ctx"]["installed"]
        return f"expected a name or a mapping with 'kind' for {slot}, got {got(value)}. Installed: {installed}"
    if expected is None:
        # Components and validators speak for themselves.
        error = entry.get("ctx", {}).get("error")
        return str(error) if error is not None else str(entry["msg"])
    text = f"expected {expected}, got {got(value)}"
    if "number" in expected and isinstance(value, str):
        return f"{text}. Units are k, M, G, T and %"
    if entry["type"] == "literal_error" and isinstance(value, str):
        words = expected.replace(" or ", ", ").split(", ")
        return text + did_you_mean(value, [word.strip("'") for word in words]).replace(" Did", ". Did")
    return text


def _expected(entry: dict[str, Any]) -> str | None:
    template = _EXPECTED.get(entry["type"])
    return template.format(**entry.get("ctx", {})) if template else None


def _unknown_key(place: _Place, registry: Registry) -> str:
    owner = place.parent_shape.name(place.parent) or (str(place.at[-2]) if len(place.at) > 1 else "a study")
    return unknown_key(str(place.at[-1]), owner, _fields(place.parent_shape, place.parent, registry))


def unknown_key(key: str, owner: str, known: Iterable[str]) -> str:
    """What to say of a key that `owner` does not have."""
    if key in RESOURCES:
        return f"{key!r} is no part of a study: give it on the command line, {RESOURCES[key]}"
    known = sorted(known)
    hint = did_you_mean(key, known) or _elsewhere(key)
    return f"no key {key!r} in {owner}.{hint} Keys: {', '.join(known)}"


def _elsewhere(key: str) -> str:
    """Where a key of this name does belong, if it is one of the fixed ones."""
    for name in StudySpec.model_fields:
        spec = ROOT.child({}, name, Registry()).spec
        if spec is not None and key in spec.model_fields:
            return f" Did you mean '{name}.{key}'?"
    return ""


def got(value: Any) -> str:
    """A plain value as YAML would have it, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
