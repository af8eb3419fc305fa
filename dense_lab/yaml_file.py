"""Study files as plain Python values, with the place of every key and value for the messages.

YAML 1.2 as people mean it: `1e-3` is a number, `on` and `no` are words, `010` is ten. What would let one line mean
something far from where it stands (anchors, merge keys, tags, directives, several documents) is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dense_lab.errors import InputError, Problem, did_you_mean

Where = tuple[str | int, ...]
"""Keys and indices that lead to a value."""

_PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float")}
_DEEPEST = 64
"""Levels of nesting; no study needs ten."""


@dataclass(frozen=True)
class Document:
    """A YAML file that was read."""

    name: str
    """The file as the user named it."""
    tree: Any
    """dict, list, str, int, float, bool or None; keys are strings."""
    text: str = ""
    """The file's content."""
    values: dict[Where, str] = field(default_factory=dict)
    """`file:line:column` of each value."""
    keys: dict[Where, str] = field(default_factory=dict)
    """`file:line:column` of each mapping's key; the path ends in the key."""

    def where(self, path: Where) -> str:
        """Place of the value at `path`, or of the nearest value above it that the file has."""
        while path and path not in self.values:
            path = path[:-1]
        return self.values.get(path, self.name)


def load(path: Path) -> Document:
    """Read a study file; raises InputError with a place for whatever is not one mapping in YAML 1.2."""
    name = str(path)
    document = parse(_read(path), name)
    if not isinstance(document.tree, dict):
        got = "an empty file" if document.tree is None else _kind(document.tree)
        raise InputError(Problem(f"a study is a mapping of keys to values, got {got}", where=f"{name}:1:1"))
    return document


def parse(text: str, name: str, where: str | None = None) -> Document:
    """Parse one YAML value; problems and values are placed at `name:line:column`, or all at `where` if it is given."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, ReusedAnchorWarning, YAMLError
    from ruamel.yaml.reader import ReaderError

    def place(line: int, column: int) -> str:
        return where or f"{name}:{line + 1}:{column + 1}"

    yaml = YAML(typ="safe", pure=True)
    try:
        _refuse_directives(text, place)
        with warnings.catch_warnings(category=ReusedAnchorWarning, action="ignore"):
            node = yaml.compose(text)
    except ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n"), len(before) - before.rfind("\n") - 1
        message = f"not a text file: it holds the character U+{ord(text[error.position]):04X}"
        raise InputError(Problem(message, where=place(line, column))) from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        spot = place(mark.line, mark.column) if mark else place(0, 0)
        raise InputError(Problem(_sentence(error.context, error.problem), where=spot)) from None
    except RecursionError:
        raise InputError(Problem(f"nested more than {_DEEPEST} levels deep", where=place(0, 0))) from None
    except (YAMLError, ValueError, OverflowError) as error:
        # ruamel lets Python's own errors through for escapes such as "\U99999999".
        raise InputError(Problem(f"not YAML: {error}", where=place(0, 0))) from None
    reader = _Reader(yaml.constructor, place)
    tree = None if node is None else reader.value(node, ())
    if reader.problems:
        raise InputError(reader.problems)
    reader.values.setdefault((), place(0, 0))
    return Document(name, tree, text, reader.values, reader.keys)


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        siblings = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        message = f"no such file.{did_you_mean(path.name, siblings)}"
        raise InputError(Problem(message, where=str(path))) from None
    except IsADirectoryError:
        raise InputError(Problem("this is a folder; name a study file in it", where=str(path))) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(Problem(f"cannot be read: {reason}", where=str(path))) from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        message = f"not a UTF-8 text file: byte 0x{content[error.start]:02x}"
        raise InputError(Problem(message, where=f"{path}:{line}:{column}")) from None


def _refuse_directives(text: str, place: Callable[[int, int], str]) -> None:
    for index, line in enumerate(text.splitlines()):
        if line.startswith("%"):
            message = f"directives such as {line.split()[0]!r} are not part of the grammar: a study is YAML 1.2"
            raise InputError(Problem(message, where=place(index, 0)))
        if line.strip() and not line.lstrip().startswith("#"):
            return


def _sentence(context: str | None, problem: str | None) -> str:
    if problem and "another document" in problem:
        return "a second document starts here; a study is one document"
    return "not YAML: " + " ".join(part for part in (context, problem) if part)


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else f"the single value {value!r}"


class _Reader:
    """Turns composed nodes into plain values and notes where they stand."""

    def __init__(self, constructor: Any, place: Callable[[int, int], str]):
        self.constructor, self.place = constructor, place
        self.values: dict[Where, str] = {}
        self.keys: dict[Where, str] = {}
        self.problems: list[Problem] = []

    def value(self, node: Any, path: Where) -> Any:
        """The plain value of `node`, which stands at `path`."""
        where = self.place(node.start_mark.line, node.start_mark.column)
        self.values[path] = where
        if len(path) > _DEEPEST:
            return self._refuse(where, path[:1], f"nested more than {_DEEPEST} levels deep")
        if node.anchor is not None:
            return self._refuse(where, path, f"the anchor '&{node.anchor}' is not part of the grammar: write it out")
        if node.id == "mapping" and node.tag.endswith(":map"):
            return self._mapping(node, path)
        if node.id == "sequence" and node.tag.endswith(":seq"):
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        return self._scalar(node, path, where)

    def _scalar(self, node: Any, path: Where, where: str) -> Any:
        if node.tag in _PLAIN:
            try:
                return self.constructor.construct_object(node)
            except (ValueError, KeyError, IndexError, OverflowError):
                return self._refuse(where, path, f"cannot read {str(node.value)[:80]!r} as {node.tag.split(':')[-1]}")
        # A date stays what was written: no key of a study takes one.
        if node.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:timestamp"):
            return self._refuse(where, path, f"the tag '{node.tag}' is not part of the grammar: leave it out")
        if any("\ud800" <= letter <= "\udfff" for letter in node.value):
            return self._refuse(where, path, "half of a surrogate pair is not a character")
        return str(node.value)

    def _mapping(self, node: Any, path: Where) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            where = self.place(key_node.start_mark.line, key_node.start_mark.column)
            key = self._key(key_node, path, where)
            if key is None:
                continue
            here = (*path, key)
            if key in mapping:
                self._refuse(where, here, f"the key {key!r} is here twice; first at {self.keys[here]}")
                continue
            self.keys[here] = where
            mapping[key] = self.value(value_node, here)
        return mapping

    def _key(self, node: Any, path: Where, where: str) -> str | None:
        if node.tag.endswith(":merge"):
            self._refuse(where, path, "merge keys '<<' are not part of the grammar: write the keys out")
        elif node.anchor is not None:
            self._refuse(where, path, f"the anchor '&{node.anchor}' is not part of the grammar: write it out")
        elif not node.tag.endswith(":str"):
            text = node.value if node.id == "scalar" else f"a {node.id}"
            self._refuse(where, path, f"a key is a word, got {text}; quote it if it is meant as one")
        else:
            return str(node.value)
        return None

    def _refuse(self, where: str, path: Where, message: str) -> None:
        self.problems.append(Problem(message, ".".join(map(str, path)), where))
