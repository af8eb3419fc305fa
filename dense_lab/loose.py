"""Loose plugin files (`--plugin FILE.py`) that a study or a run was begun with, and that it needs to go on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dense_lab.files import read_json

if TYPE_CHECKING:
    from dense_lab.registry import Registry

MODULE = "dense_lab_loose_"
"""Begins the names of their modules."""
LOOSE = "loose file"
"""Stands where other plugins have a version."""
FILES = "plugin_files"
"""Key of a study's manifest: where they were."""


def missing(registry: Registry, *folders: Path) -> str:
    """A sentence for the files that what is in these folders was begun with and `registry` lacks; empty for none."""
    known = {plugin.name for plugin in registry.plugins}
    for folder in folders:
        if absent := [f"--plugin {place}" for name, place in _begun_with(folder).items() if name not in known]:
            given, words = ("is", "it") if len(absent) == 1 else ("are", "them")
            return (
                f"{folder} was begun with {' '.join(absent)}, which {given} not given now. Give {words} before the "
                f"command: dense-lab {' '.join(absent)} ..."
            )
    return ""


def _begun_with(folder: Path) -> dict[str, str]:
    """Place of each by its name; a run tells names only."""
    manifest = read_json(folder / "manifest.json")
    used = (manifest or read_json(folder / "spec.json")).get("plugins", {})
    names = {name: name for name, version in used.items() if version == LOOSE}
    return names | {Path(place).name: place for place in manifest.get(FILES, [])}
