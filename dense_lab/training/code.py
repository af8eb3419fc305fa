"""Which code runs: dense-lab's version and commit, and a digest of every source file that a run may call."""

from __future__ import annotations

import functools
import hashlib
import inspect
import subprocess
import sys
from pathlib import Path

from dense_lab import __version__
from dense_lab import registry as registries
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
    where there are none.
    """
    modules = [inspect.getmodule(library) for library in registries.default().kernels]
    names = {__name__, *(module.__name__ for module in modules if module)}
    names |= {type(component).__module__ for component in components_of(spec)}
    return ",".join(f"{package}={_digest(package)}" for package in sorted({name.partition(".")[0] for name in names}))


@functools.cache
def _digest(package: str) -> str:
    module = sys.modules[package]
    place = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), None)
    if place is None:  # of a notebook, or of a prompt
        return "unknown"
    file = Path(place)
    root = file.parent if file.name == "__init__.py" else file
    found = hashlib.sha256()
    for source in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
        if source.is_file():
            text = source.read_bytes()
            found.update(f"{source.relative_to(root)}/{len(text)}/".encode() + text)
    return found.hexdigest()[:8]
