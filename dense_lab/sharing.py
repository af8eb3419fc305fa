"""Modules without memory that models share: a component builds one for the same arguments once.

For counting alone: layers that share a module share its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from dense_lab.components import Spec
from dense_lab.dense import DenseSpec

KEPT = 4096
"""Parts of models that are remembered."""


class Key(NamedTuple):
    """A component as a key: specs may hold what cannot be hashed."""

    kind: type[Spec]
    text: str

    def component(self) -> Any:
        """One that is equal to the component."""
        return self.kind.model_validate_json(self.text)


def key_of(component: Spec) -> Key:
    """Equal for equal components."""
    return Key(type(component), component.model_dump_json())


class Shared:
    """A component whose `build` gives the module it gave before for the same arguments."""

    def __init__(self, component: Any, key: Key) -> None:
        self._component, self.key = component, key

    def build(self, *args: Any) -> Any:
        """What the component builds."""
        return remembered((self.key, repr(args)), lambda: self._component.build(*args))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._component, name)


def shared(component: Spec) -> Shared:
    """Of one component always the same one: a solver asks for it at every width."""
    found, one = _shares.get(id(component), (None, None))
    if found is not component or one is None:
        one = Shared(_parts_shared(component), key_of(component))
        if len(_shares) >= KEPT:
            _shares.clear()
        _shares[id(component)] = component, one
    return one


def _parts_shared(component: Spec) -> Spec:
    """Connections that differ in one thing share the rest."""
    if not isinstance(component, DenseSpec):
        return component
    parts: dict[str, Any] = {"transition": shared(component.transition), "fusion": shared(component.fusion)}
    sites = {site: shared(transition) for site, transition in component.site_transitions.items()}
    return component.model_copy(update={**parts, "site_transitions": sites})


def remembered(key: tuple[Any, ...], build: Callable[[], Any]) -> Any:
    """What `build` gave the first time that the key was asked for."""
    if key not in _modules:
        if len(_modules) >= KEPT:
            _modules.clear()
        _modules[key] = build()
    return _modules[key]


_modules: dict[tuple[Any, ...], Any] = {}
_shares: dict[int, tuple[Spec, Shared]] = {}
"""By the component's id, which is its own as long as it is kept here."""
