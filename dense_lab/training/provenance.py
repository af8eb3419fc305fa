"""Where a run's numbers come from: code, data, machine."""

from __future__ import annotations

import hashlib
import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from dense_lab import verification
from dense_lab.corpus import Batch, Corpus
from dense_lab.model import LanguageModel
from dense_lab.study import RunSpec
from dense_lab.training.code import code, commit_in, release
from dense_lab.training.device import Place


def commit() -> str:
    """Git commit of the project in the current folder, `-dirty` when files differ from it; else `unknown`.

    As it was when this process first asked: the code that runs is that of then, whatever is committed meanwhile.
    """
    return commit_in(Path.cwd())


def chained(digest: str, batch: Batch) -> str:
    """sha256 over the previous digest and a batch, so that a resumed run needs no more than the digest."""
    running = hashlib.sha256(digest.encode())
    for part in batch:
        running.update(part.contiguous().numpy().data)
    return running.hexdigest()


def tags(spec: RunSpec, plugins: dict[str, str], corpus: Corpus, model: LanguageModel, place: Place) -> dict[str, str]:
    """What describes a run, for filters and for repeating it."""
    ran: dict[str, str] = getattr(model, "ran", {})
    return {
        "seed": str(spec.seed),
        "spec": spec.digest(plugins),
        "data": corpus.fingerprint,
        "plugins": listed(plugins),
        "code": code(spec),
        **surroundings(place),
        "implementations": ",".join(f"{name}={impl}" for name, impl in sorted(ran.items())),
        "kernels.verified": verification.tag(spec, place, ran),
        "pid": str(os.getpid()),
    }


def listed(plugins: dict[str, str]) -> str:
    """Names and versions as a tag."""
    return ",".join(f"{name}={version}" for name, version in plugins.items())


def surroundings(place: Place) -> dict[str, str]:
    """Code, machine and libraries: what a run finds, as tags."""
    return {
        "commit": commit(),
        "dense_lab": release(),
        "device": place.describe(),
        "dtype": str(place.dtype).removeprefix("torch."),
        "host": platform.node(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numba": _version("numba"),
        "python": platform.python_version(),
        # Loops over other vectors take sums in another order; a host's name may outlive its processor.
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
