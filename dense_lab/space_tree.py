"""The open tree: a study's values with its open ones still open, each with its dotted path and its place in the file.

Dotted paths are what Optuna, MLflow, `--set` and messages use. The label of a chosen option enters the path of what
is below it: `model.core` is one of mamba and retnet, `model.core.retnet.heads` exists below the second.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dense_lab.errors import InputError

Point = dict[str, Any]
"""Values of the parameters that are reached, by dotted path."""
LARGEST_GRID = 100_000
"""Points of a grid that are ever listed."""


@dataclass(frozen=True)
class Choice:
    """An open value: one of several options, by label."""

    path: str
    labels: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        """As it stands in manifests and in `--json` output."""
        return {"path": self.path, "type": "choice", "labels": list(self.labels)}

    def check(self, value: Any) -> Any:
        """`value`, or InputError when it is no option."""
        if value not in self.labels:
            raise InputError(f"{self.path}: no option {value!r}. Options: {', '.join(self.labels)}")
        return value


@dataclass(frozen=True)
class _Range:
    path: str
    low: Any
    high: Any
    log: bool = False
    """Whether factors rather than differences matter."""

    def describe(self) -> dict[str, Any]:
        """As it stands in manifests and in `--json` output."""
        described = {"path": self.path, "type": type(self).__name__.lower(), "low": self.low, "high": self.high}
        return described | {"log": self.log}

    def check(self, value: Any) -> Any:
        """`value`, or InputError when it is out of range."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not self.low <= value <= self.high:
            raise InputError(f"{self.path}: expected a number from {self.low} to {self.high}, got {value!r}")
        return value


@dataclass(frozen=True)
class Int(_Range):
    """An open value: a whole number from `low` to `high`, both included."""

    step: int = 1

    def describe(self) -> dict[str, Any]:
        """As it stands in manifests and in `--json` output."""
        return super().describe() | {"step": self.step}

    def check(self, value: Any) -> Any:
        """`value`, or InputError when it is out of range or between steps."""
        if super().check(value) != int(value) or (value - self.low) % self.step:
            raise InputError(f"{self.path}: expected {self.low} + n x {self.step}, got {value!r}")
        return int(value)

    def values(self) -> Sequence[Any] | None:
        """All of them."""
        return range(self.low, self.high + 1, self.step)


@dataclass(frozen=True)
class Float(_Range):
    """An open value: a number from `low` to `high`, both included."""

    def values(self) -> Sequence[Any] | None:
        """All of them, or None when there are infinitely many."""
        return (self.low,) if self.low == self.high else None


Parameter = Choice | Int | Float


@dataclass(frozen=True, kw_only=True)
class Node:
    """A place of the open tree."""

    path: str
    """Dotted path; of an option, the one that what is below it starts with."""
    where: str
    """`file:line:column` of the value, or the `--set` that gave it."""
    key: str
    """The same of its key."""
    fork: str = ""
    """Of an option: the path of its choice."""

    @property
    def own(self) -> str:
        """Dotted path of the value itself."""
        return self.fork or self.path


@dataclass(frozen=True, kw_only=True)
class Leaf(Node):
    """A single value as written."""

    value: Any


@dataclass(frozen=True, kw_only=True)
class Table(Node):
    """A mapping."""

    items: dict[str, Node] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Row(Node):
    """A list."""

    items: tuple[Node, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Fork(Node):
    """A choice. One with a single option is no parameter, but its label still enters the paths below it."""

    options: dict[str, Node]
    written: tuple[str, ...] = ()
    """The labels in the order of the file."""

    @property
    def parameter(self) -> Choice:
        """As a parameter."""
        return Choice(self.path, tuple(self.options))


@dataclass(frozen=True, kw_only=True)
class Span(Node):
    """A range of numbers."""

    parameter: Int | Float


def _below(node: Node) -> Iterator[Node]:
    if isinstance(node, Table):
        yield from node.items.values()
    elif isinstance(node, Row):
        yield from node.items
    elif isinstance(node, Fork):
        yield from node.options.values()


def parameters(node: Node) -> list[Parameter]:
    """Every parameter below `node`, conditional ones included, in the order in which they are met."""
    own: list[Parameter] = []
    if isinstance(node, Span) or (isinstance(node, Fork) and len(node.options) > 1):
        own.append(node.parameter)
    return own + [parameter for child in _below(node) for parameter in parameters(child)]


Origins = dict[tuple[str | int, ...], Node]
"""The node that each value of a closed tree came from, by keys and indices."""


def close(node: Node, pick: Callable[[Parameter], Any], origins: Origins, at: tuple[str | int, ...] = ()) -> Any:
    """Plain values with every open one closed by `pick`; raises InputError when it picks what is not offered."""
    if isinstance(node, Fork):
        label = next(iter(node.options))
        if len(node.options) > 1:
            label = node.parameter.check(pick(node.parameter))
        return close(node.options[label], pick, origins, at)
    origins[at] = node
    if isinstance(node, Table):
        return {key: close(item, pick, origins, (*at, key)) for key, item in node.items.items()}
    if isinstance(node, Row):
        return [close(item, pick, origins, (*at, index)) for index, item in enumerate(node.items)]
    if isinstance(node, Span):
        return node.parameter.check(pick(node.parameter))
    return node.value if isinstance(node, Leaf) else None


def cover(node: Node) -> list[Point]:
    """Few points that between them meet every option of every choice and both ends of every range."""
    if isinstance(node, Fork):
        head = {node.path: ""} if len(node.options) > 1 else {}
        return [dict.fromkeys(head, label) | point for label, option in node.options.items() for point in cover(option)]
    if isinstance(node, Span):
        ends = (node.parameter.low, node.parameter.high)
        return [{node.path: end} for end in dict.fromkeys(ends)]
    covers = [cover(child) for child in _below(node)]
    most = max(map(len, covers), default=1)
    # A child that has fewer points starts over, so that points differ in as much as they can.
    return [_join(points[index % len(points)] for points in covers) for index in range(most)]


def size(node: Node) -> int | None:
    """Number of points, or None when there are infinitely many."""
    if isinstance(node, Span):
        values = node.parameter.values()
        return None if values is None else len(values)
    sizes = [size(child) for child in _below(node)]
    known = [number for number in sizes if number is not None]
    if len(known) < len(sizes):
        return None
    return sum(known) if isinstance(node, Fork) else math.prod(known)


def grid(node: Node) -> list[Point]:
    """Every point; raises InputError when there are too many, or infinitely many."""
    number = size(node)
    if number is None:
        names = ", ".join(p.path for p in parameters(node) if isinstance(p, Float) and p.low < p.high)
        raise InputError(f"a grid needs open values that can be listed: write {names} as {{choice: [...]}}")
    if number > LARGEST_GRID:
        raise InputError(f"a grid of {number} points is too large to list; at most {LARGEST_GRID}")
    return list(_points(node))


def _points(node: Node) -> Iterator[Point]:
    if isinstance(node, Fork):
        head = {node.path: ""} if len(node.options) > 1 else {}
        for label, option in node.options.items():
            yield from (dict.fromkeys(head, label) | point for point in _points(option))
    elif isinstance(node, Span):
        yield from ({node.path: value} for value in node.parameter.values() or ())
    else:
        yield from map(_join, itertools.product(*(list(_points(child)) for child in _below(node))))


def _join(points: Iterable[Point]) -> Point:
    joined: Point = {}
    for point in points:
        joined |= point
    return joined


def walk(node: Node) -> Iterator[Node]:
    """`node` and everything below it."""
    yield node
    for child in _below(node):
        yield from walk(child)
