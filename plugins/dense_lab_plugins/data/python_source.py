"""The embedded corpus: every machine that runs dense-lab has it."""

import hashlib
import importlib.util
import os
import sysconfig
from pathlib import Path
from typing import Literal

from dense_lab.components import Data
from dense_lab.corpus import Corpus
from dense_lab.errors import InputError, MachineError, Problem
from dense_lab_plugins.data._text import TextFields

_LEFT_OUT = frozenset(
    "__pycache__ dist-packages distutils ensurepip idlelib lib2to3 pydoc_data site-packages test tests "  # noqa: SIM905
    "turtledemo".split()
)
"""Folders without ordinary library code, or that only some versions and installations have."""


class PythonSource(TextFields, Data):
    """The source text of the running Python's standard library, about 9 MB; it differs by version of Python.

    Files are put in an order that depends on their names alone and looks random, so that all splits are alike; no
    file is in two splits.
    """

    kind: Literal["python_source"] = "python_source"
    packages: tuple[str, ...] = ()
    """Installed packages whose source text is added, by the name they are imported by: `[torch, sympy]` is 60 MB more.
    The text, and so the data's hash, differs by their versions."""

    def prepare(self) -> Corpus:
        """Raises MachineError when this Python came without its source text, InputError when a package is not there."""
        root = Path(sysconfig.get_paths()["stdlib"])
        files = {name: root / name for name in _names(root)}
        if len(files) < 100:
            raise MachineError(
                f"{root} holds {len(files)} source files, which is no standard library: use `data: {{kind: text, "
                "path: ...}`"
            )
        for package in self.packages:
            folder = _folder(package)
            files |= {f"{package}/{name}": folder / name for name in _names(folder)}
        names = sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest())
        documents = [document for name in names if (document := files[name].read_bytes())]
        return self.corpus(self.divided(documents))


def _folder(package: str) -> Path:
    """Where an installed package lies, found without importing it."""
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        message = f"no package {package!r} is installed here: install it, or leave it out of `packages`"
        raise InputError(Problem(message, "data.packages"))
    return Path(next(iter(found.submodule_search_locations)))


def _names(root: Path) -> list[str]:
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        # _sysconfigdata describes one machine's build, not the library.
        kept = (name for name in files if name.endswith(".py") and not name.startswith("_sysconfigdata"))
        names += [Path(folder, name).relative_to(root).as_posix() for name in kept]
    return names
