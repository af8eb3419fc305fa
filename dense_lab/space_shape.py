"""What may be written at each place of a study, read from the specs: slots, mappings with fixed keys, lists, values."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from dense_lab.components import Slot, Spec
from dense_lab.errors import InputError
from dense_lab.registry import Registry
from dense_lab.study import StudySpec


@dataclass(frozen=True)
class Shape:
    """One place of a study."""

    slot: Slot | None = None
    """Set where a component goes."""
    spec: type[Spec] | None = None
    """Set where a mapping with fixed keys goes."""
    item: Shape | None = None
    """Set where a list, or a mapping with free keys, goes: the shape of its items."""
    default: Any = None
    """The value where nothing is written."""

    def kind(self, value: Any) -> str | None:
        """The name of the component or variant that `value` stands for, if it has one."""
        default = self.slot.default if self.slot else None
        if self.spec is not None and "kind" in self.spec.model_fields:
            default = self.spec.model_fields["kind"].default
        elif self.slot is None:
            return None
        kind = value.get("kind", default) if isinstance(value, dict) else value
        return kind if isinstance(kind, str) else None

    def expects(self, value: Any, registry: Registry) -> type[Spec] | None:
        """The spec whose fields `value` is made of; None for single values, lists and unknown components."""
        if self.slot is None:
            return self.spec
        kind = self.kind(value)
        if kind is None or kind not in registry.kinds(self.slot.slot):
            return None
        return registry.find(self.slot.slot, kind)

    def name(self, value: Any) -> str:
        """What to call the mapping `value` in a message: `core retnet`, or an empty string."""
        kind = self.kind(value)
        return f"{self.slot.slot} {kind}" if self.slot and kind else kind or ""

    def child(self, value: Any, key: str | int, registry: Registry) -> Shape:
        """The shape of what stands at `key` within `value`."""
        if self.item is not None:
            return self.item
        spec = self.expects(value, registry)
        field = spec.model_fields.get(str(key)) if spec else None
        if field is None:
            return Shape()
        return shape_of(field.annotation, tuple(field.metadata), field.get_default(call_default_factory=True))


ROOT = Shape(spec=StudySpec)
"""A whole study."""


def shape_of(annotation: Any, metadata: tuple[Any, ...] = (), default: Any = None) -> Shape:
    """The shape of a field from its annotation."""
    for mark in metadata:
        if isinstance(mark, Slot):
            return Shape(slot=mark, default=default)
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return shape_of(inner[0], inner[1:], default)
    if origin in (Union, types.UnionType):
        shapes = [shape_of(branch, (), default) for branch in inner]
        return next((shape for shape in shapes if shape.slot or shape.spec or shape.item), Shape(default=default))
    if origin in (tuple, dict):
        return Shape(item=shape_of(inner[-1] if origin is dict else inner[0]), default=default)
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return Shape(spec=annotation, default=default)
    return Shape(default=default)


def installed(shape: Shape, registry: Registry) -> list[str]:
    """The names that `{choice: installed}` stands for; raises InputError where no component goes."""
    if shape.slot is None:
        raise InputError("`choice: installed` lists components, and none goes here: list the options")
    return registry.kinds(shape.slot.slot)
