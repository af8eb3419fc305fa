"""What every component promises as a spec."""

from __future__ import annotations

import pytest

from dense_lab.components import Component

WIDTH = 32
"""Width of the layer in these tests; override the class attribute `width` for a component that needs another."""


class ComponentTests:
    """What every component promises as a spec."""

    width: int = WIDTH

    @pytest.fixture
    def component(self) -> Component:
        """The component under test: override."""
        raise pytest.UsageError(f"{type(self).__name__} must override the fixture `component`")

    def test_says_what_it_is(self, component: Component) -> None:
        """A docstring, and a kind that equals its default."""
        assert component.summary(), f"{type(component).__name__} has no docstring: say what it is and cite the paper"
        assert component.kind_name() == component.model_dump()["kind"]

    def test_every_field_is_documented(self, component: Component) -> None:
        """`dense-lab components KIND` shows a sentence for each field."""
        silent = [
            name for name, field in type(component).model_fields.items() if name != "kind" and not field.description
        ]
        assert not silent, f"put a string under these fields: {silent}"

    def test_round_trips_through_json(self, component: Component) -> None:
        """What is stored with a run rebuilds the component."""
        assert type(component).model_validate_json(component.model_dump_json()) == component

    def test_is_frozen_and_refuses_unknown_fields(self, component: Component) -> None:
        """A misspelt key must not run the default for a whole study."""
        with pytest.raises(ValueError, match="no_such_field"):
            type(component).model_validate({**component.model_dump(), "no_such_field": 1})
        with pytest.raises(ValueError, match="frozen"):
            component.kind = "other"  # type: ignore[attr-defined]
