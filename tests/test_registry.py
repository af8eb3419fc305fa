"""Plugins of strangers: whatever they do, the rest works and they are named."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from dense_lab import registry
from dense_lab.errors import InputError
from dense_lab.model import ModelSpec

GOOD = """
from typing import Literal
from dense_lab.components import Pattern
from dense_lab.hookspecs import hookimpl

class Mine(Pattern):
    "Nothing but the layer below."
    kind: Literal["{kind}"] = "{kind}"
    def layers(self, layer, span):
        return (layer - 1,) if layer else ()

@hookimpl
def register_components(register):
    register(Mine)
"""
BROKEN = {
    "raises": ("raise RuntimeError('no licence found')", "RuntimeError: no licence found"),
    "misspelt": (GOOD.format(kind="mine").replace("def register_components", "def register_component"), "unknown hook"),
    "thief": (GOOD.format(kind="recent"), "'recent' is claimed by thief ? and by builtin"),
    "nameless": (GOOD.format(kind="x").replace('    kind: Literal["x"] = "x"\n', ""), "is no component"),
    "hookless": ("x = 1", "no hook 'register_components'"),
    "unmarked": (GOOD.format(kind="mine").replace("@hookimpl", ""), "put `@hookimpl` above it"),
    "syntax": ("def", "SyntaxError"),
    "quits": ("raise SystemExit(3)", "SystemExit: 3"),
}


def point(folder: Path, name: str, code: str) -> EntryPoint:
    (folder / f"stranger_{name}.py").write_text(code)
    return EntryPoint(name, f"stranger_{name}", registry.GROUP)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("stranger_")]:
        del sys.modules[name]


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_named_and_left_out(folder: Path, name: str) -> None:
    code, reason = BROKEN[name]
    points = (registry.BUILTIN, point(folder, name, code), point(folder, "good", GOOD.format(kind="mine2")))
    found = registry.load(points=points)
    errors = {plugin.name: plugin.error for plugin in found.plugins}
    assert reason in errors[name], errors[name]
    assert not errors["builtin"]
    assert not errors["good"]
    assert found.owner("pattern", "recent").name == "builtin"
    assert "mine2" in found.kinds("pattern")
    tree = {"width": 16, "dense": {"span": 1, "pattern": "mine2"}}
    ModelSpec.model_validate(tree, context={"registry": found}).build(8)


def test_a_broken_plugin_takes_back_what_it_had_registered(folder: Path) -> None:
    everything = """
    register.preset('half', 'half a model', {'width': 8})
    register.checkpoint_reader('half', object())
    register.checkpoint_reader('builtin too', object())
    register.kernels(object())
    raise ValueError('then it failed')
"""
    plain = registry.load(points=(registry.BUILTIN,))
    found = registry.load(points=(registry.BUILTIN, point(folder, "half", GOOD.format(kind="half") + everything)))
    assert "half" not in found.kinds("pattern")
    assert found.plugins[-1].components == []
    assert found.plugins[-1].error == "ValueError: then it failed"
    assert (list(found.presets), list(found.checkpoint_readers)) == (
        list(plain.presets),
        list(plain.checkpoint_readers),
    )
    assert found.kernels == plain.kernels


def test_a_plugin_can_be_blocked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(registry.BLOCK_VARIABLE, "good, other")
    found = registry.load(points=(registry.BUILTIN, point(folder, "good", GOOD.format(kind="mine3"))))
    assert "mine3" not in found.kinds("pattern")
    assert "blocked" in found.plugins[-1].error


def test_a_loose_file_that_is_broken_is_an_error_at_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("raise RuntimeError('oh')")
    with pytest.raises(InputError, match=r"--plugin .*mine\.py: RuntimeError: oh"):
        registry.load((path,))
    with pytest.raises(InputError, match="not a Python file"):
        registry.load((tmp_path / "absent.py",))


def test_an_unknown_kind_names_the_nearest_and_all() -> None:
    with pytest.raises(InputError, match=r"no core named 'retnt'. Did you mean 'retnet'\? Installed: .*mamba"):
        registry.default().find("core", "retnt")
