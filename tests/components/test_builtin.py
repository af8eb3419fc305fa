"""Every built-in component against the conformance kit, found through the registry so that none is forgotten."""

from __future__ import annotations

import pytest

from dense_lab import registry, testing
from dense_lab.components import Component

KIT = {
    "core": testing.CoreTests,
    "projection": testing.ProjectionTests,
    "gate": testing.GateTests,
    "transition": testing.TransitionTests,
    "fusion": testing.FusionTests,
    "pattern": testing.PatternTests,
    "ffn": testing.FFNTests,
}
NEEDS_FILES = {"text", "huggingface"}
"""Data components that are tested where their files are made, in tests/data."""


def _builtin(slot: str) -> list[type[Component]]:
    kinds = registry.default().kinds(slot)
    return [
        registry.default().find(slot, kind) for kind in kinds if registry.default().owner(slot, kind).name == "builtin"
    ]


def _variants(slot: str) -> list[Component]:
    """Each component at its defaults, and with every other value of its Literal fields."""
    from typing import Literal, get_args, get_origin

    found = []
    for cls in _builtin(slot):
        found.append(cls())
        for name, field in cls.model_fields.items():
            if name != "kind" and get_origin(field.annotation) is Literal:
                found += [cls(**{name: value}) for value in get_args(field.annotation) if value != field.default]
    return found


def _make(slot: str, kit: type) -> type:
    params = _variants(slot)

    class Tests(kit):  # type: ignore[misc, valid-type]
        @pytest.fixture(params=params, ids=[f"{p.kind_name()}-{i}" for i, p in enumerate(params)])
        def component(self, request: pytest.FixtureRequest) -> Component:
            return request.param

    return Tests


TestCore = _make("core", testing.CoreTests)
TestProjection = _make("projection", testing.ProjectionTests)
TestGate = _make("gate", testing.GateTests)
TestTransition = _make("transition", testing.TransitionTests)
TestFusion = _make("fusion", testing.FusionTests)
TestPattern = _make("pattern", testing.PatternTests)
TestFFN = _make("ffn", testing.FFNTests)


def test_every_slot_has_a_kit() -> None:
    assert set(registry.default().slots()) - {"data", "tokenizer"} == set(KIT)  # Those two are tested in tests/data.
