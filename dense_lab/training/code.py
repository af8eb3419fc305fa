"""Which code runs: dense-lab's version and commit, and a digest of every source file that a run may call."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from dense_lab import __version__
from dense_lab import registry as registries
from dense_lab.loose import MODULE
from dense_lab.study import RunSpec, components_of


@functools.cache
def commit_in(folder: Path) -> str:
    """Git commit of a folder as it was when this process first asked, `-dirty` when files differ; else `unknown`."""
    return _git(folder, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*") or "unknown"


@functools.cache
def release() -> str:
    """dense-lab's version; of a checkout with its commit."""
    folder = Path(__file__).parents[1]
    # An installed copy may lie within somebody's project, whose commit says nothing of it.
    checkout = _git(folder, "ls-files", "__init__.py")
    return f"{__version__}, commit {commit_in(folder)}" if checkout else __version__


def _git(folder: Path, *words: str) -> str:
    """What git says; nothing where there is no git or no repository."""
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=10, check=True, cwd=folder)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def code(spec: RunSpec) -> str:
    """`package=digest` of dense-lab, of the libraries of operations and of what brought the components of the run: the
    first 8 hex digits of the sha256 over its Python sources, as they were when this process first asked, or `unknown`
    where there are none. Of a loose plugin those that it imports from its own folder belong to it.
    """
    modules = [inspect.getmodule(library) for library in registries.default().kernels]
    names = {__name__, *(module.__name__ for module in modules if module)}
    names |= {type(component).__module__ for component in components_of(spec)}
    return ",".join(f"{package}={digest(package)}" for package in sorted({name.partition(".")[0] for name in names}))


@functools.cache
def digest(package: str) -> str:
    """First 8 hex digits of the sha256 over the Python sources of an imported package, or `unknown`."""
    module = sys.modules[package]
    place = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), None)
    if place is None:  # of a notebook, or of a prompt
        return "unknown"
    file = Path(place)
    root = file.parent if file.name == "__init__.py" else file
    found = hashlib.sha256()
    for name, source in sorted((os.path.relpath(source, root), source) for source in _sources(root)):
        text = source.read_bytes()
        found.update(f"{name}/{len(text)}/".encode() + text)
    return found.hexdigest()[:8]


def _sources(root: Path) -> set[Path]:
    """The Python files of a package or module; beside a loose plugin also those that it imports from its folder."""
    found, left = set[Path](), _below(root)
    beside = root.parent in {Path(file).parent for file in _loose_files()}
    while left:
        source = left.pop()
        if source.is_file() and source not in found:
            found.add(source)
            left += [file for name in _imported(source) for file in _beside(root, name)] if beside else []
    return found


def _below(root: Path) -> list[Path]:
    return list(root.rglob("*.py")) if root.is_dir() else [root]


def _loose_files() -> Iterator[str]:
    modules = [module for name, module in sys.modules.items() if name.startswith(MODULE)]
    return (file for module in modules if (file := getattr(module, "__file__", None)))


def _imported(source: Path) -> set[str]:
    """Top-level names of what a file imports, wherever in it: what is imported on first use may not be there yet."""
    names = set[str]()
    try:
        tree = ast.parse(source.read_bytes())
    except (SyntaxError, ValueError):  # A package may hold what is no module, and a file may have changed since.
        return names
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def _beside(root: Path, name: str) -> list[Path]:
    """The files of a module in the folder of `root`, unless the name means another; dense-lab has its own digests."""
    loaded = getattr(sys.modules.get(name), "__file__", None)
    if name.startswith(__package__.partition(".")[0]) or (loaded and root.parent not in Path(loaded).parents):
        return []
    return [root.parent / f"{name}.py", *_below(root.parent / name)]
