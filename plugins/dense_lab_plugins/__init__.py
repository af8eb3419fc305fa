"""The built-in components, one small file each, registered through the same hook as everybody's."""

from __future__ import annotations

import importlib
import pkgutil

import dense_lab_kernels
from dense_lab.components import Component
from dense_lab.hookspecs import hookimpl
from dense_lab.registry import Registrar
from dense_lab_plugins import checkpoints
from dense_lab_plugins.presets import PRESETS


@hookimpl
def register_components(register: Registrar) -> None:
    """Register every component class defined in a module below this package, the presets and the checkpoint readers."""
    for info in pkgutil.walk_packages(__path__, f"{__name__}."):
        module = importlib.import_module(info.name)
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Component) and value.__module__ == info.name:
                register(value)
    register.kernels(dense_lab_kernels)
    for name, (summary, model) in PRESETS.items():
        register.preset(name, summary, model)
    register.checkpoint_reader("dense_gau_retnet", checkpoints.DenseGAUReader())
    register.checkpoint_reader("mamba", checkpoints.MambaReader())
