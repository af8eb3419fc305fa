"""Verdicts on implementations: what they are, what they hold for, and where they are remembered.

They lie in `verified.json` in the user's cache folder ($DENSE_LAB_CACHE), by the machine, the versions, the operation's
source and the shapes: change one of these, and nothing is known.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dense_lab import __version__
from dense_lab import registry as registries
from dense_lab.files import read_json, write_json

if TYPE_CHECKING:
    from dense_lab.training.device import Place

_REMEMBERED = 4000
_FORMAT = 3
"""Of a remembered finding."""


@dataclass(frozen=True)
class Finding:
    """What was found of one implementation at one set of shapes."""

    operation: str
    implementation: str
    judged: str
    """"forward and backward", or "forward"."""
    dtype: str
    shapes: str
    size: str
    """Batch and length judged, `of` those of the run where they were reduced."""
    worst: str
    """The output, state or gradient (`d` and the name) that used most of what it may."""
    used: float | None
    """Its error over what is allowed; None where it holds a NaN or nothing came of the call."""
    ok: bool
    text: str = ""
    """What went wrong, in a sentence."""

    @property
    def name(self) -> str:
        """`operation/implementation`."""
        return f"{self.operation}/{self.implementation}"


def tag_of(wrong: Iterable[str]) -> str:
    """The tag `kernels.verified`: "all", or what is wrong or unknown."""
    names = list(wrong)
    return f"unverified: {', '.join(names)}" if names else "all"


def machine(place: Place) -> str:
    """What verdicts hold for: the device and the versions of what computes."""
    if place.device.type == "cuda":
        device = torch.cuda.get_device_name(place.device)
    else:
        device = f"{platform.machine()} {_processor()}"
    versions = f"torch {torch.__version__}, triton {_version('triton')}, dense-lab {__version__}"
    return f"{device}, {versions}, verdicts {_FORMAT}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def libraries() -> Iterator[Any]:
    """Libraries of operations that can judge their calls."""
    return (library for library in registries.default().kernels if hasattr(library, "judge"))


def kernels() -> str:
    """Digest of the source of every operation."""
    return digest([library.fingerprint(name) for library in libraries() for name in library.OPERATIONS])


def sources() -> str:
    """Digest of the files of all installed components, which decide what is called."""
    registry = registries.default()
    found = {registry.find(slot, kind).__module__ for slot in registry.slots() for kind in registry.kinds(slot)}
    files = {getattr(sys.modules.get(module), "__file__", None) for module in found} - {None}
    places = [Path(file) for file in sorted(map(str, files))]
    return digest([_digest_of(place, place.stat().st_mtime_ns) for place in places if place.exists()])


@functools.lru_cache(maxsize=1024)
def _digest_of(file: Path, changed: int) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def digest(*parts: Any) -> str:
    """16 hex digits of the sha256 over anything that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _file() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dense-lab"
    return Path(os.environ.get("DENSE_LAB_CACHE") or default) / "verified.json"


def read() -> dict[str, Any]:
    """`cases`: names of verdicts by the key of a case; `verdicts`: their machine, kernels and finding by name."""
    stored = _here or read_json(_file())
    return {name: dict(stored.get(name, {})) for name in ("cases", "verdicts")}


_here: dict[str, Any] = {}
"""What this process found, where the cache folder cannot be written."""


def write(memory: dict[str, Any]) -> None:
    """Remember, beside what other processes found meanwhile; what is oldest is forgotten."""
    whole = {name: {**read()[name], **entries} for name, entries in memory.items()}
    newest = {name: dict(list(entries.items())[-_REMEMBERED:]) for name, entries in whole.items()}
    try:
        write_json(_file(), newest)
    except OSError:
        _here.update(newest)
