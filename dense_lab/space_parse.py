"""From plain values to the open tree: which mappings are open values, and what the options of a choice are called."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from typing import Any, Protocol

from dense_lab.ablation.spec import KEYS as ABLATION
from dense_lab.errors import InputError, Problem, did_you_mean
from dense_lab.registry import Registry
from dense_lab.space_problems import got
from dense_lab.space_shape import ROOT, Shape, installed
from dense_lab.space_tree import Float, Fork, Int, Leaf, Node, Row, Span, Table
from dense_lab.units import number

At = tuple[str | int, ...]
OPEN = {"choice": {"choice"}, "int": {"int", "log", "step"}, "float": {"float", "log"}}
"""The keys that make a mapping an open value, and the keys that such a mapping may have."""
CLOSED = ("dense_lab", "name", "budget", "search", *ABLATION)
"""Keys of a study that say how to search or compare, and so cannot be searched over."""


class Places(Protocol):
    """Where values and keys were written."""

    def where(self, at: At) -> str:
        """Place of a value."""
        ...

    def key(self, at: At) -> str:
        """Place of a key."""
        ...


def is_open(value: Any) -> bool:
    """Whether a plain value is meant as an open one."""
    return isinstance(value, dict) and not OPEN.keys().isdisjoint(value)


def open_tree(tree: dict[str, Any], places: Places, registry: Registry) -> Table:
    """The open tree of a whole study; raises InputError with every malformed open value."""
    parser = _Parser(places, registry)
    root = parser.node(tree, ROOT, "", ())
    if parser.problems:
        raise InputError(parser.problems)
    assert isinstance(root, Table)
    return root


def labels(options: list[Any] | dict[str, Any], shape: Shape) -> list[str]:
    """What each option is called: the name that the study gives it, or its value or kind.

    Where several options share a kind, their keys are part of the label.
    """
    if isinstance(options, dict):
        return keys(options)
    short = [label(option, shape, with_keys=False) for option in options]
    shared = Counter(short)
    return [
        label(o, shape, with_keys=True) if shared[name] > 1 else name for o, name in zip(options, short, strict=True)
    ]


def keys(options: list[Any] | dict[str, Any]) -> list[Any]:
    """The indices or names of the options, in the order of `labels`; notes are none."""
    if isinstance(options, dict):
        return [name for name in options if not name.startswith("x-")]
    return list(range(len(options)))


def label(value: Any, shape: Shape, with_keys: bool) -> str:
    """A short name for a plain value; `with_keys` says whether a mapping's keys are part of it."""
    if is_open(value):
        return "|".join(f"{key}={_text(item)}" for key, item in sorted(value.items()))
    if isinstance(value, dict):
        kind = shape.kind(value) or _text(value.get("kind", ""))
        kept = {key: item for key, item in value.items() if key != "kind" and not key.startswith("x-")}
        if kind and not (with_keys and kept):
            return kind
        return (kind or "") + "{" + ",".join(f"{key}={_text(kept[key])}" for key in sorted(kept)) + "}"
    return _text(value)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return label(value, Shape(), with_keys=True)
    if isinstance(value, list):
        return "[" + ",".join(map(_text, value)) + "]"
    plain = number(value) if not isinstance(value, bool) else value
    if isinstance(plain, float) and plain.is_integer():
        plain = int(plain)
    return plain if isinstance(plain, str) else json.dumps(plain)


def label_order(name: str) -> tuple[bool, float, str]:
    """Numbers by value, then words by letter."""
    try:
        return False, float(name), name
    except ValueError:
        return True, 0.0, name


class _Parser:
    def __init__(self, places: Places, registry: Registry) -> None:
        self.places, self.registry = places, registry
        self.problems: list[Problem] = []

    def node(self, value: Any, shape: Shape, path: str, at: At) -> Node:
        """The node of `value`, which stands at `at` in the plain tree and at `path` among parameters."""
        place = {"path": path, "where": self.places.where(at), "key": self.places.key(at)}
        if is_open(value):
            if at and (at[0] in CLOSED or at[-1] == "kind"):
                return self._refuse(place, self._why_closed(at))
            return self._open(value, shape, place, at)
        if isinstance(value, dict):
            notes = [key for key in value if key.startswith("x-")]
            items = {key: item for key, item in value.items() if key not in notes}
            children = {
                key: self.node(item, shape.child(value, key, self.registry), _join(path, key), (*at, key))
                for key, item in items.items()
            }
            return Table(**place, items=children)
        if isinstance(value, list):
            row = [
                self.node(item, shape.child(value, index, self.registry), _join(path, index), (*at, index))
                for index, item in enumerate(value)
            ]
            return Row(**place, items=tuple(row))
        return Leaf(**place, value=value)

    def _why_closed(self, at: At) -> str:
        if at[-1] == "kind":
            return "write the open value around the component: `{choice: [...]}` in the place of the mapping"
        return f"{at[0]} cannot hold open values; data, model, train, seed and kernels can"

    def _open(self, value: dict[str, Any], shape: Shape, place: dict[str, str], at: At) -> Node:
        mark = next(key for key in OPEN if key in value)
        for key in value:
            if key not in OPEN[mark] and not key.startswith("x-"):
                message = f"an open value with {mark!r} has no key {key!r}.{did_you_mean(key, OPEN[mark])}"
                self._refuse(place | {"where": self.places.key((*at, key))}, message)
        try:
            if mark == "choice":
                return self._choice(value["choice"], shape, place, at)
            return Span(**place, parameter=_range(mark, value, place["path"]))
        except InputError as error:
            return self._refuse(place | {"where": self.places.where((*at, mark))}, error.problems[0].message)

    def _choice(self, options: Any, shape: Shape, place: dict[str, str], at: At) -> Node:
        if options == "installed":
            options = installed(shape, self.registry)
        if not isinstance(options, (list, dict)) or not keys(options):
            raise InputError(f"expected a list of options, such as {{choice: [a, b]}}, got {got(options)}")
        named: dict[str, Node] = {}
        for key, name in zip(keys(options), labels(options, shape), strict=True):
            here, option = (*at, "choice", key), options[key]
            if is_open(option):
                raise InputError("an option cannot itself be open: list its options beside the others")
            if name in named:
                spot = place | {"where": self.places.where(here)}
                self._refuse(spot, f"the option {name!r} is here twice; first at {named[name].where}")
                continue
            node = self.node(option, shape, _join(place["path"], name), here)
            named[name] = replace(node, fork=place["path"])
        return Fork(
            **place, options={name: named[name] for name in sorted(named, key=label_order)}, written=tuple(named)
        )

    def _refuse(self, place: dict[str, str], message: str) -> Leaf:
        self.problems.append(Problem(message, place["path"], place["where"]))
        return Leaf(**place, value=None)


def _join(path: str, key: str | int) -> str:
    return f"{path}.{key}" if path else str(key)


def _range(mark: str, value: dict[str, Any], path: str) -> Int | Float:
    """The parameter of `{int: [low, high]}` or `{float: [low, high]}`; raises InputError saying what is wrong."""
    ends = value[mark]
    if not isinstance(ends, list) or len(ends) != 2:
        raise InputError(f"expected two ends, such as {{{mark}: [1, 4]}}, got {got(ends)}")
    low, high = (_end(mark, end) for end in ends)
    if low > high:
        raise InputError(f"the first end is the smaller one: write [{ends[1]}, {ends[0]}]")
    log = value.get("log", False)
    if not isinstance(log, bool):
        raise InputError(f"log: expected true or false, got {got(log)}")
    if log and low <= 0:
        raise InputError(f"a logarithmic range starts above zero, got {ends[0]}")
    if mark == "float":
        return Float(path, low, high, log)
    return Int(path, low, high, log, _step(value.get("step", 1), low, high, log))


def _end(mark: str, end: Any) -> Any:
    plain = number(end) if not isinstance(end, bool) else None
    if not isinstance(plain, (int, float)) or not math.isfinite(plain):
        raise InputError(f"expected numbers as ends, got {got(end)}")
    if mark == "float":
        return float(plain)
    if plain != int(plain):
        raise InputError(f"expected whole numbers as ends, got {got(end)}; {{float: [...]}} takes others")
    return int(plain)


def _step(step: Any, low: int, high: int, log: bool) -> int:
    plain = number(step) if not isinstance(step, bool) else None
    if not isinstance(plain, int) or plain < 1:
        raise InputError(f"step: expected a whole number above 0, got {got(step)}")
    if log and plain != 1:
        raise InputError("a logarithmic range has no step: leave out one of `log` and `step`")
    if (high - low) % plain:
        last = low + (high - low) // plain * plain
        raise InputError(f"steps of {plain} from {low} do not reach {high}: write {last} or {last + plain}")
    return plain
