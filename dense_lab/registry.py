"""The registry: which components are installed, who brought them, and which plugins are broken.

Built-ins come through the same hook and the same entry-point group as strangers. A plugin that cannot be loaded, has a
misspelt hook, or claims a name that is taken is reported by name and version and left out; the rest works.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pluggy

from dense_lab import __version__, hookspecs
from dense_lab.errors import InputError, did_you_mean
from dense_lab.loose import LOOSE, MODULE

if TYPE_CHECKING:
    from types import ModuleType

    from dense_lab.components import Component
    from dense_lab.interop import CheckpointReader

GROUP = "dense_lab"
BLOCK_VARIABLE = "DENSE_LAB_BLOCK_PLUGINS"
"""Comma-separated names of plugins (entry points) that are not to be loaded."""
BUILTIN = EntryPoint("builtin", "dense_lab_plugins", GROUP)
"""The entry point of the built-in components, as pyproject.toml declares it."""


@dataclass
class Plugin:
    """A plugin as `dense-lab plugins` shows it."""

    name: str
    version: str
    components: list[str] = field(default_factory=list)
    """`slot/kind` of each component it registered."""
    error: str = ""
    """Why it is left out; empty when all is well."""


class KernelLibrary(Protocol):
    """A library of operations that lets its implementation be chosen and recorded."""

    OPERATIONS: tuple[str, ...]
    """Names of its operations."""

    def implementations(self, operation: str) -> tuple[str, ...]:
        """Names of those who can compute an operation, here or on another machine; `auto` is none of them."""
        ...

    def using(self, implementations: Mapping[str, str]) -> AbstractContextManager[None]:
        """Within the block, operations run the named implementations."""
        ...

    def recording(self) -> AbstractContextManager[dict[str, str]]:
        """Yield a dictionary filled with the implementation that each operation ran."""
        ...


@dataclass(frozen=True)
class Preset:
    """A model by name, such as one of a paper."""

    name: str
    summary: str
    model: Mapping[str, Any]
    """What may stand under `model:`, plain data."""
    plugin: Plugin


class Registry:
    """Components by slot and kind."""

    def __init__(self) -> None:
        self.plugins: list[Plugin] = []
        self.kernels: list[KernelLibrary] = []
        """Libraries of operations, the first one that has a name is asked."""
        self.files: tuple[Path, ...] = ()
        """The loose files it was loaded with, for processes that have to load them too."""
        self.presets: dict[str, Preset] = {}
        self.checkpoint_readers: dict[str, CheckpointReader] = {}
        self._components: dict[str, dict[str, type[Component]]] = {}
        self._owner: dict[tuple[str, str], Plugin] = {}

    def kinds(self, slot: str) -> list[str]:
        """Sorted names of the components installed for `slot`."""
        return sorted(self._components.get(slot, {}))

    def slots(self) -> list[str]:
        """Sorted names of the slots that have components."""
        return sorted(self._components)

    def find(self, slot: str, kind: str) -> type[Component]:
        """The component class; raises InputError naming the nearest and the installed kinds."""
        found = self._components.get(slot, {}).get(kind)
        if found is None:
            known = self.kinds(slot)
            raise InputError(f"no {slot} named {kind!r}.{did_you_mean(kind, known)} Installed: {', '.join(known)}")
        return found

    def owner(self, slot: str, kind: str) -> Plugin:
        """The plugin that brought a component."""
        return self._owner[slot, kind]

    def add(self, component: type[Component], plugin: Plugin) -> None:
        """Register a component class; raises InputError when its name is taken or it has none."""
        slot, kind = component.slot, component.kind_name()
        taken = self._owner.get((slot, kind))
        if taken is not None:
            raise InputError(
                f"{slot} {kind!r} is claimed by {plugin.name} {plugin.version} and by {taken.name} {taken.version}"
            )
        self._components.setdefault(slot, {})[kind] = component
        self._owner[slot, kind] = plugin
        plugin.components.append(f"{slot}/{kind}")

    @contextmanager
    def registering(self, plugin: Plugin) -> Iterator[Registrar]:
        """What `plugin` registers within the block is taken back, all of it, when the block raises."""
        presets, readers, kernels = dict(self.presets), dict(self.checkpoint_readers), list(self.kernels)
        try:
            yield Registrar(self, plugin)
        except BaseException:
            self.presets, self.checkpoint_readers, self.kernels = presets, readers, kernels
            for name in plugin.components:
                slot, kind = name.split("/")
                del self._components[slot][kind], self._owner[slot, kind]
            plugin.components.clear()
            raise

    def operation(self, name: str) -> Callable[..., Any] | None:
        """The operation called `name` of the first library that has one, or None."""
        return next((getattr(library, name) for library in self.kernels if hasattr(library, name)), None)

    @contextmanager
    def kernel_session(self, implementations: Mapping[str, str]) -> Iterator[dict[str, str]]:
        """Run operations with the implementations asked for; yields `{operation: implementation that ran}`."""
        with ExitStack() as stack:
            log: dict[str, str] = {}
            logs = []
            for library in self.kernels:
                stack.enter_context(library.using(implementations))
                logs.append(stack.enter_context(library.recording()))
            yield log
            for recorded in logs:
                log.update(recorded)

    @contextmanager
    def rehearsed(self) -> Iterator[None]:
        """Within the block operations are only rehearsed: a session tells what would run, and nothing is compiled."""
        with ExitStack() as stack:
            for library in self.kernels:
                if hasattr(library, "rehearsing"):
                    stack.enter_context(library.rehearsing())
            yield

    @contextmanager
    def compiled_ahead(self) -> Iterator[None]:
        """Within the block operations only prepare their kernels, all side by side; results may be undefined."""
        with ExitStack() as stack:
            for library in self.kernels:
                if hasattr(library, "compiling_ahead"):
                    stack.enter_context(library.compiling_ahead())
            yield

    @contextmanager
    def states_reused(self) -> Iterator[None]:
        """Within the block, operations may write the state after a single token where the state before it was."""
        with ExitStack() as stack:
            for library in self.kernels:
                if hasattr(library, "reusing_states"):
                    stack.enter_context(library.reusing_states())
            yield


class Registrar:
    """What a plugin's hook is called with."""

    def __init__(self, registry: Registry, plugin: Plugin):
        self._registry, self._plugin = registry, plugin

    def __call__(self, component: type[Component]) -> type[Component]:
        """Register a component class; returns it, so that it may serve as a decorator."""
        self._registry.add(component, self._plugin)
        return component

    def kernels(self, library: KernelLibrary) -> None:
        """Register a library of operations whose implementations can be chosen and recorded."""
        self._registry.kernels.append(library)

    def preset(self, name: str, summary: str, model: Mapping[str, Any]) -> None:
        """Register a model that studies may name with `model: {preset: name}`; raises InputError for a name taken."""
        taken = self._registry.presets.get(name)
        if taken is not None:
            raise InputError(f"preset {name!r} is claimed by {self._plugin.name} and by {taken.plugin.name}")
        self._registry.presets[name] = Preset(name, summary, model, self._plugin)

    def checkpoint_reader(self, name: str, reader: CheckpointReader) -> None:
        """Register a reader of released checkpoints (`dense_lab.interop`); the first to claim it reads it."""
        self._registry.checkpoint_readers.setdefault(name, reader)


def load(files: tuple[Path, ...] = (), points: tuple[EntryPoint, ...] | None = None) -> Registry:
    """A registry of all installed plugins and the loose `files` (`--plugin FILE.py`).

    `points` replaces the installed entry points (tests do that). Broken plugins end up in `registry.plugins` with
    their `error` set; a loose file that is broken raises InputError, since the user named it just now.
    """
    registry = Registry()
    registry.files = files
    blocked = {name.strip() for name in os.environ.get(BLOCK_VARIABLE, "").split(",")}
    for point in sorted(points if points is not None else _installed(), key=_builtin_first):
        plugin = Plugin(point.name, point.dist.version if point.dist else __version__ if point is BUILTIN else "?")
        registry.plugins.append(plugin)
        if point.name in blocked:
            plugin.error = f"blocked by {BLOCK_VARIABLE}"
            continue
        _load_one(registry, plugin, point.load)
    for file in files:
        plugin = Plugin(file.name, LOOSE)
        registry.plugins.append(plugin)
        _load_one(registry, plugin, functools.partial(_import_file, file))
        if plugin.error:
            raise InputError(f"--plugin {file}: {plugin.error}")
    return registry


def _installed() -> tuple[EntryPoint, ...]:
    found = tuple(entry_points(group=GROUP))
    # A source tree on the path, as on a GPU host where nothing is installed, has no entry points of its own.
    return found if any(point.name == BUILTIN.name for point in found) else (BUILTIN, *found)


def _builtin_first(point: EntryPoint) -> tuple[bool, str]:
    return point.name != "builtin", point.name


def _load_one(registry: Registry, plugin: Plugin, load_module: Callable[[], ModuleType]) -> None:
    try:
        module = load_module()
        manager = pluggy.PluginManager(hookspecs.PROJECT)
        manager.add_hookspecs(hookspecs)
        manager.register(module, plugin.name)
        manager.check_pending()
        if not hasattr(module, "register_components"):
            raise InputError("it has no hook 'register_components'")
        if not manager.get_hookcallers(module):
            raise InputError("its 'register_components' is not marked as a hook: put `@hookimpl` above it")
        with registry.registering(plugin) as register:
            manager.hook.register_components(register=register)
    # The isolation boundary: whatever a stranger's module does at import, the command line stays usable.
    except (Exception, SystemExit) as error:  # noqa: BLE001
        text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        plugin.error = " ".join(text.split())


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{MODULE}{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise InputError("not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


_default: Registry | None = None


def default() -> Registry:
    """The registry of this process: what is installed, loaded once."""
    global _default
    if _default is None:
        _default = load()
    return _default


def set_default(registry: Registry) -> None:
    """Make `registry` the one that specs are validated against in this process."""
    global _default
    _default = registry
