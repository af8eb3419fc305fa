"""Study files gone wrong as files do: slips of the pen, of the unit, of the level, of the encoding. Seeded."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.compat import StringIO

ODD = [
    *(None, True, False, 0, -1, 1, 3, 1.5, 1e400, float("nan"), 10**30, "", " ", "x", "none", "2Q", "5%", "1k", "-2M"),
    *("1e3", "010", "0x10", "ü", "a" * 200, [], {}, [1], ["k", 3], {"a": 1}, {"kind": "retnet"}, {"kind": None}),
    *({"kind": ["mamba"]}, "installed", "all", "retnet", "no", "2026-11-22", "~", "null", "{}"),
]
OPEN = [
    *({"choice": value} for value in ([], [1, 1], None, "installed", {"a": 1, "b": "x"}, ["retnet", "mamba"])),
    *({"choice": value} for value in ([{"choice": [1]}], [[], {}, None, "none", {"span": 2}], [True, "true"])),
    *({"int": value} for value in ([1, 4], [4, 1], [1, 2, 3], ["a", 2], ["1k", "2k"])),
    *({"float": value} for value in ([0.1, 0.5], 3, [0, float("inf")])),
    {"choice": [1, 2], "log": True},
    {"int": [1, 4], "step": 2},
    {"int": [0, 8], "log": True},
    {"float": [1e-3, "1%"], "log": True},
    {"int": [1, 2], "float": [1, 2]},
]
LINES = [
    "\t- x",
    "<<: {a: 1}",
    "a: &b 1",
    "a: *b",
    "!t",
    "%YAML 1.1",
    "---",
    "...",
    "? [1]",
    "}",
    "]",
    "'",
    "a: b: c",
    "1: 2",
]
Tree = dict[str, Any]
Where = tuple[str | int, ...]


def mutated(source: str, seed: int) -> bytes:
    """A study file that differs from `source` in one to three things."""
    random_ = random.Random(seed)
    if random_.random() < 0.35:
        content = source.encode()
        for _ in range(random_.randint(1, 3)):
            content = random_.choice(BYTES)(content, random_)
        return content
    tree = YAML(typ="safe", pure=True).load(source)
    for _ in range(random_.randint(1, 2)):
        if isinstance(tree, dict) and tree:
            tree = random_.choice(TREES)(copy.deepcopy(tree), random_)
    stream = StringIO()
    YAML(typ="safe", pure=True).dump(tree, stream)
    return stream.getvalue().encode()


def _places(value: Any, at: Where = ()) -> list[Where]:
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return ([at] if at else []) + [place for key, item in below for place in _places(item, (*at, key))]


def _parent(tree: Tree, at: Where) -> Any:
    for key in at[:-1]:
        tree = tree[key]
    return tree


def _odd_value(tree: Tree, random_: random.Random) -> Any:
    at = random_.choice(_places(tree))
    _parent(tree, at)[at[-1]] = copy.deepcopy(random_.choice(ODD))
    return tree


def _number(tree: Tree, random_: random.Random) -> Any:
    """A number that may well be right in its place, with a unit or without."""
    numbers = [at for at in _places(tree) if str(_parent(tree, at)[at[-1]])[:1].isdigit()]
    if numbers:
        at = random_.choice(numbers)
        _parent(tree, at)[at[-1]] = random_.choice(
            [1, 2, 3, "1k", "2e3", 0.5, "50%", {"int": [1, 3]}, {"choice": [1, 2]}]
        )
    return tree


def _open_value(tree: Tree, random_: random.Random) -> Any:
    at = random_.choice(_places(tree))
    _parent(tree, at)[at[-1]] = copy.deepcopy(random_.choice(OPEN))
    return tree


def _misspelt_key(tree: Tree, random_: random.Random) -> Any:
    keys = [at for at in _places(tree) if isinstance(at[-1], str)]
    if keys:
        at = random_.choice(keys)
        parent, key = _parent(tree, at), str(at[-1])
        cut = random_.randrange(len(key) + 1)
        parent[key[:cut] + random_.choice("aeq_.X-") + key[cut + 1 :]] = parent.pop(at[-1])
    return tree


def _removed(tree: Tree, random_: random.Random) -> Any:
    at = random_.choice(_places(tree))
    _parent(tree, at).pop(at[-1])
    return tree


def _moved(tree: Tree, random_: random.Random) -> Any:
    at, to = random_.choice(_places(tree)), random_.choice(_places(tree))
    value = copy.deepcopy(_parent(tree, at)[at[-1]])
    parent = _parent(tree, to)
    if isinstance(parent, dict):
        parent[str(at[-1])] = value
    else:
        parent.append(value)
    return tree


def _wrapped(tree: Tree, random_: random.Random) -> Any:
    at = random_.choice(_places(tree))
    parent = _parent(tree, at)
    parent[at[-1]] = random_.choice([lambda v: [v], lambda v: {"x": v}, lambda v: {"choice": [v]}, str])(parent[at[-1]])
    return tree


def _new_key(tree: Tree, random_: random.Random) -> Any:
    mappings = [at for at in _places(tree) if isinstance(_parent(tree, at), dict)]
    if mappings:
        keys = ["workers", "lr", "kind", "x-note", "heads", "preset", "choice", "int", "dense", "budget", "device", ""]
        _parent(tree, random_.choice(mappings))[random_.choice(keys)] = copy.deepcopy(random_.choice(ODD))
    return tree


def _cut(content: bytes, random_: random.Random) -> bytes:
    return content[: random_.randrange(len(content) + 1)]


def _noise(content: bytes, random_: random.Random) -> bytes:
    at = random_.randrange(len(content) + 1)
    return (
        content[:at]
        + random_.choice([random_.randbytes(3), b"\x00", b"\xff", b"\t", b": ", b"\xef\xbb\xbf"])
        + content[at:]
    )


def _line(content: bytes, random_: random.Random) -> bytes:
    lines = content.split(b"\n")
    lines.insert(random_.randrange(len(lines) + 1), random_.choice(LINES).encode())
    return b"\n".join(lines)


def _indented(content: bytes, random_: random.Random) -> bytes:
    lines = content.split(b"\n")
    at = random_.randrange(len(lines))
    lines[at] = b" " * random_.randint(1, 5) + lines[at] if random_.random() < 0.5 else lines[at].lstrip()
    return b"\n".join(lines)


def _twice(content: bytes, random_: random.Random) -> bytes:
    lines = content.split(b"\n")
    lines.insert(random_.randrange(len(lines)), random_.choice(lines))
    return b"\n".join(lines)


def _emptied(content: bytes, random_: random.Random) -> bytes:
    return random_.choice([b"", b"\n", b"#", b"null", b"[]", b"{}", b"3", random_.randbytes(64)])


Change = Callable[[Tree, random.Random], Any]
Damage = Callable[[bytes, random.Random], bytes]
TREES: list[Change] = [*3 * [_number], _odd_value, _open_value, _misspelt_key, _removed, _moved, _wrapped, _new_key]
BYTES: list[Damage] = [_cut, _noise, _line, _indented, _twice, _emptied]
