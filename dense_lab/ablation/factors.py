"""`ablate`: arms from the open values of a study, each value changed by itself or every combination."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dense_lab.ablation.spec import AblateSpec
from dense_lab.errors import InputError, Problem, did_you_mean
from dense_lab.space_parse import label
from dense_lab.space_shape import Shape
from dense_lab.space_tree import Choice, Fork, Node, Parameter, Point, Table, close, parameters, walk

MOST = 1000
"""Arms at most: more is a slip."""


def points(root: Table, ablate: AblateSpec, places: Mapping[str, str], where: str) -> dict[str, Point]:
    """Points of the open tree by the arms' names, the baseline first.

    `places` says where each key of `ablate.baseline` stands, `where` where `ablate` does. Raises InputError for what is
    no open value, for one that cannot be listed, and for a study without any.
    """
    known = {parameter.path: parameter for parameter in parameters(root)}
    if not known:
        message = "nothing is open: write a choice such as `model.core: {choice: [retnet, mamba]}`"
        raise InputError(Problem(message, "ablate", where))
    levels = {path: _levels(root, parameter, where) for path, parameter in known.items()}
    center = {path: values[0] for path, values in levels.items()} | _given(ablate, known, places)
    make = _factorial if ablate.plan == "factorial" else _one_at_a_time
    found: dict[frozenset[tuple[str, Any]], Point] = {}
    for wish in make(levels, center):
        point = _reached(root, wish)
        found.setdefault(frozenset(point.items()), point)
        if len(found) > MOST:
            raise InputError(Problem(f"more than {MOST} arms: open less", "ablate", where))
    base, *others = found.values()
    return {"baseline": base} | dict(zip(_names(base, others, known), others, strict=True))


def _levels(root: Table, parameter: Parameter, where: str) -> Sequence[Any]:
    """The values of an open value in the order in which they were written."""
    if isinstance(parameter, Choice):
        return next(node.written for node in walk(root) if isinstance(node, Fork) and node.path == parameter.path)
    values = parameter.values()
    if values is None:
        message = f"{parameter.path} cannot be listed: write its values as {{choice: [...]}}"
        raise InputError(Problem(message, "ablate", where))
    return values


def _given(ablate: AblateSpec, known: Mapping[str, Parameter], places: Mapping[str, str]) -> Point:
    """The values that the study names for the baseline."""
    point, found = {}, []
    for path, value in ablate.baseline.items():
        place = places.get(path, "")
        if path not in known:
            message = f"no open value {path!r}.{did_you_mean(path, known)} Open: {', '.join(known)}"
            found.append(Problem(message, "ablate.baseline", place))
            continue
        try:
            said = label(value, Shape(), with_keys=True) if isinstance(known[path], Choice) else value
            point[path] = known[path].check(said)
        except InputError as error:
            found += [Problem(p.message, "ablate.baseline", place) for p in error.problems]
    if found:
        raise InputError(found)
    return point


def _one_at_a_time(levels: Mapping[str, Sequence[Any]], center: Point) -> list[Point]:
    changed = [center | {path: value} for path, values in levels.items() for value in values]
    return [center, *changed]


def _factorial(levels: Mapping[str, Sequence[Any]], center: Point) -> list[Point]:
    total = 1
    for values in levels.values():
        total *= len(values)
    if total > 100 * MOST:
        raise InputError(Problem(f"a factorial of {total} points is too large; open less", "ablate"))
    return [center, *(dict(zip(levels, values, strict=True)) for values in itertools.product(*levels.values()))]


def _reached(root: Node, wish: Point) -> Point:
    """The part of `wish` that matters: open values below options that are not chosen do not."""
    point: Point = {}

    def pick(parameter: Parameter) -> Any:
        point[parameter.path] = wish[parameter.path]
        return wish[parameter.path]

    close(root, pick, {})
    return point


def _names(base: Point, others: Sequence[Point], known: Mapping[str, Parameter]) -> list[str]:
    """What differs from the baseline: `span=2`, `core=mamba`; with what is open below that where it takes it."""
    ends = Counter(path.rpartition(".")[2] for path in known)

    def said(point: Point, *, below: bool) -> str:
        changed = [path for path, value in point.items() if base.get(path) != value and (below or path in base)]
        names = {path: end if ends[end := path.rpartition(".")[2]] == 1 else path for path in changed}
        return " ".join(f"{names[path]}={point[path]}" for path in changed)

    short = [said(point, below=False) for point in others]
    count = Counter(short)
    return [name if count[name] == 1 and name else said(p, below=True) for name, p in zip(short, others, strict=True)]
