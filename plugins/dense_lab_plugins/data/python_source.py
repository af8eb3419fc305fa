"""The embedded corpus: every machine that runs dense-lab has it."""

import hashlib
import os
import sysconfig
from pathlib import Path
from typing import Literal

from dense_lab.components import Data
from dense_lab.corpus import Corpus
from dense_lab.errors import MachineError
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

    def prepare(self) -> Corpus:
        """Raises MachineError when this Python came without its source text."""
        root = Path(sysconfig.get_paths()["stdlib"])
        names = sorted(_names(root), key=lambda name: hashlib.sha256(name.encode()).digest())
        documents = [document for name in names if (document := (root / name).read_bytes())]
        if len(documents) < 100:
            raise MachineError(
                f"{root} holds {len(documents)} source files, which is no standard library: use `data: {{kind: text, "
                "path: ...}`"
            )
        return self.corpus(self.divided(documents))


def _names(root: Path) -> list[str]:
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        # _sysconfigdata describes one machine's build, not the library.
        kept = (name for name in files if name.endswith(".py") and not name.startswith("_sysconfigdata"))
        names += [Path(folder, name).relative_to(root).as_posix() for name in kept]
    return names
