"""A study while it is put together: the file's values, then `--set` over them, with the place of each."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from dense_lab import presets
from dense_lab.errors import InputError, Problem
from dense_lab.registry import Registry
from dense_lab.space_parse import At, keys, labels
from dense_lab.space_problems import unknown_key
from dense_lab.space_shape import ROOT, Shape, installed
from dense_lab.yaml_file import Document, parse

_DOT = re.compile(r"\.(?![^{}]*\})")
"""A dot that is not within the braces of a label such as `retnet{value_factor=1.5}`."""
_EQUALS = re.compile(r"=(?![^{}]*\})")
"""The first `=` that is not within the braces of a label."""
_PRESET = f"model.{presets.KEY}"


def split_override(text: str) -> tuple[str, str]:
    """`path=value` as (path, value); raises InputError when it is none."""
    parts = _EQUALS.split(text, maxsplit=1)
    if len(parts) < 2 or not parts[0].strip():
        raise InputError(Problem("expected PATH=VALUE, such as train.tokens=500k", where=f"--set {text}"))
    return parts[0].strip(), parts[1]


class Draft:
    """The plain tree of a study, and where its values were written; implements `space_parse.Places`."""

    def __init__(self, document: Document, registry: Registry) -> None:
        self.tree: Any = copy.deepcopy(document.tree)
        self.registry = registry
        self._document = document
        self._values, self._keys = dict(document.values), dict(document.keys)

    def where(self, at: At) -> str:
        """Place of the value at `at`, or of the nearest one above it."""
        while at and at not in self._values:
            at = at[:-1]
        return self._values.get(at, self._document.name)

    def key(self, at: At) -> str:
        """Place of the key at `at`; that of its value if it has none, as for items of lists."""
        return self._keys.get(at) or self.where(at)

    def apply(self, overrides: list[tuple[str, str]]) -> None:
        """Apply `--set path=text` in turn, over the file, over presets; raises InputError with every problem."""
        found: list[Problem] = []
        # Which preset it is must be known before anything can be said about what it means.
        for path, text in sorted(overrides, key=lambda pair: pair[0] != _PRESET):
            try:
                if path != _PRESET:
                    self.expand()
                self._override(path, text)
            except InputError as error:
                found.extend(error.problems)
        if found:
            raise InputError(found)
        self.expand()

    def branch(self, without: Collection[str]) -> Draft:
        """A copy to be changed apart, without some keys of the study."""
        kept = Document(
            self._document.name,
            {key: value for key, value in self.tree.items() if key not in without},
            "",
            {at: where for at, where in self._values.items() if not at or at[0] not in without},
            {at: where for at, where in self._keys.items() if at[0] not in without},
        )
        return Draft(kept, self.registry)

    def each(self, key: str) -> dict[str | int, Draft]:
        """The places at and below every item of a key of the study, by item."""
        found: dict[str | int, tuple[dict[At, str], dict[At, str]]] = {}
        for kind, places in enumerate((self._values, self._keys)):
            for place, where in places.items():
                if len(place) > 1 and place[0] == key:
                    found.setdefault(place[1], ({}, {}))[kind][place] = where
        return {
            item: Draft(Document(self._document.name, {}, "", *places), self.registry) for item, places in found.items()
        }

    def put(self, path: str, value: Any, source: Draft, at: At) -> None:
        """Put `value`, which stands at `at` of `source`, where `path` says, over what stands there.

        A preset starts the model over: what the study says of it besides is forgotten.
        """
        if path == _PRESET:
            self.tree["model"] = {}
        else:
            self.expand()
        try:
            here = self._set(path, copy.deepcopy(value), source.where(at))
        except InputError as error:
            raise InputError(replace(p, path=path, where=p.where or source.key(at)) for p in error.problems) from None
        for mine, theirs in ((self._values, source._values), (self._keys, source._keys)):
            mine.update({here + place[len(at) :]: theirs[place] for place in theirs if place[: len(at)] == at})

    def expand(self) -> None:
        """Write presets out."""
        try:
            self.tree = presets.expand(self.tree, self.registry)
        except InputError as error:
            raise InputError(replace(p, where=self.where(_keys(p.path))) for p in error.problems) from None

    def _override(self, path: str, text: str) -> None:
        flag = f"--set {path}"
        value = parse(text, flag, where=flag).tree
        try:
            self._set(path, value, flag)
        except InputError as error:
            raise error.located(flag) from None

    def _set(self, path: str, value: Any, flag: str) -> At:
        """Walk to the place that `path` names, making mappings on the way, and put `value` there; returns the place."""
        at: At = ()
        node, shape = self.tree, ROOT
        names, whole = _DOT.split(path), _DOT.split(path)
        while names:
            node = self._opened(node, shape, at)
            said = ".".join(whole[: len(whole) - len(names)])
            step, shape = self._step(node, shape, names, at, said)
            for key in step[:-1]:
                at, node = (*at, key), node[key]
            last = step[-1]
            if not names:
                self._put(node, last, value, shape, (*at, last), flag)
                return (*at, last)
            if isinstance(node, dict) and last not in node:
                # What is not written is its default, of which `path` changes a part.
                node[last] = shape.default if shape.slot and isinstance(shape.default, str) else {}
                self._forget((*at, last), flag)
            at, node = (*at, last), node[last]
        return at

    def _opened(self, node: Any, shape: Shape, at: At) -> Any:
        """`node` as something that has keys: a bare name becomes a mapping, the options of a choice get their names."""
        if isinstance(node, dict) and "choice" in node:
            self._name_options(node, shape, at)
        if isinstance(node, str) and shape.kind(node):
            node = {"kind": node}
            self._replace(at, node)
        return node

    def _name_options(self, choice: dict[str, Any], shape: Shape, at: At) -> None:
        """Give each option its label as a name, so that it keeps it whatever is set below."""
        options = choice["choice"]
        if options == "installed":
            options = installed(shape, self.registry)
        if isinstance(options, list):
            names = labels(options, shape)
            if len(set(names)) < len(names):
                raise InputError("two options of a choice on the way are the same")
            for index, name in enumerate(names):
                self._move((*at, "choice", index), (*at, "choice", name))
            choice["choice"] = dict(zip(names, options, strict=True))

    def _replace(self, at: At, value: Any) -> None:
        parent = self.tree
        for key in at[:-1]:
            parent = parent[key]
        parent[at[-1]] = value

    def _step(self, node: Any, shape: Shape, names: list[str], at: At, said: str) -> tuple[At, Shape]:
        """Take names off the front of `names`; gives the keys that lead one place down, and its shape."""
        name = names.pop(0)
        if isinstance(node, dict) and isinstance(node.get("choice"), dict):
            if len(only := keys(node["choice"])) == 1 and name != only[0]:
                # Where one option is left, it need not be named.
                names.insert(0, name)
                name = only[0]
            return ("choice", _option(node["choice"], name, names, said)), shape
        if isinstance(node, list):
            return (_index(node, name),), shape.child(node, int(name), self.registry)
        if not isinstance(node, dict):
            raise InputError(f"a single value stands here; nothing is below it, not even {name!r}")
        spec = shape.expects(node, self.registry)
        known = spec.model_fields if spec else {}
        kind = shape.kind(node)
        if name not in known and names and kind and re.split(r"\{", name)[0] == kind:
            # The name of the component that stands here may be said, as it must be below a choice.
            return self._step(node, shape, names, at, said)
        if spec is not None and name not in (*known, presets.KEY) and not name.startswith("x-"):
            owner = shape.name(node) or (str(at[-1]) if at else "a study")
            raise InputError(unknown_key(name, owner, known))
        return (name,), shape.child(node, name, self.registry)

    def _put(self, node: Any, last: Any, value: Any, shape: Shape, at: At, flag: str) -> None:
        """Put `value` at `last` of `node`; where a choice stands, the label of an option picks it as it is."""
        old = node[last] if isinstance(node, list) else node.get(last)
        if isinstance(old, dict) and "choice" in old and not isinstance(value, (dict, list)):
            self._name_options(old, shape, at)
            name = labels([value], shape)[0]
            if isinstance(old["choice"], dict) and name in old["choice"]:
                old["choice"] = {name: old["choice"][name]}
                self._values[at] = self._keys[at] = flag
                return
        node[last] = value
        self._forget(at, flag)

    def _move(self, old: At, new: At) -> None:
        """What stood at and below `old` stands at `new` now."""
        for places in (self._values, self._keys):
            moved = [path for path in places if path[: len(old)] == old]
            places.update({new + path[len(old) :]: places.pop(path) for path in moved})

    def _forget(self, at: At, flag: str) -> None:
        """Everything at and below `at` was said by `flag`."""
        for places in (self._values, self._keys):
            for path in [path for path in places if path[: len(at)] == at]:
                del places[path]
        self._values[at] = self._keys[at] = flag


def _option(options: dict[str, Any], name: str, below: list[str], said: str) -> str:
    """`name`, which must be that of an option with something asked for below it."""
    known = keys(options)
    if name in known and below:
        return name
    examples = " or ".join(".".join([said, option, name, *below]) for option in known)
    raise InputError(f"{said} is a choice: name one of its options, such as {examples}")


def _index(items: list[Any], name: str) -> int:
    if not name.isdecimal() or int(name) >= len(items):
        raise InputError(f"expected the number of an item, 0 to {len(items) - 1}, got {name!r}")
    return int(name)


def _keys(path: str) -> At:
    """`model.choice[0].preset` as keys and indices."""
    return tuple(int(word) if word.isdecimal() else word for word in re.split(r"[.\[]", path.replace("]", "")))
