"""The whole surface of the plugin system: one hook, and the entry-point group `dense_lab`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from dense_lab.registry import Registrar

PROJECT = "dense_lab"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def register_components(register: Registrar) -> None:
    """Call `register(ComponentClass)` for every component the plugin brings."""
