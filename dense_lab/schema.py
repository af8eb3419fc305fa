"""The JSON Schema of studies with the components installed here, so that an editor completes and checks them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from dense_lab.components import Component, Spec
from dense_lab.model import ModelSpec
from dense_lab.presets import KEY as PRESET
from dense_lab.registry import Registry
from dense_lab.space_parse import CLOSED
from dense_lab.space_shape import Shape, shape_of
from dense_lab.study import StudySpec

JSON = dict[str, Any]
NOTES: JSON = {"^x-": {}}
"""Keys that are the user's own."""
UNITS = r"^\s*[+-]?([0-9][0-9_]*\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*[kKMGBT%]?\s*$"
"""A number with a unit, as `units.number` reads it."""


def study_schema(registry: Registry) -> JSON:
    """A JSON Schema (2020-12) for study files; a value that may be open may also be a choice or a range."""
    return _Writer(registry).study()


class _Writer:
    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.definitions: JSON = {"number with unit": {"type": "string", "pattern": UNITS}}

    def study(self) -> JSON:
        """The whole schema."""
        for kind in ("int", "float"):
            self.definitions[f"{kind} range"] = self._range(kind)
        for slot in self.registry.slots():
            self._slot(slot)
        root = self._mapping(StudySpec) | {"required": ["dense_lab"]}
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "dense-lab study",
            **root,
            "$defs": self.definitions,
        }

    def _range(self, kind: str) -> JSON:
        end = {"anyOf": [{"type": "integer" if kind == "int" else "number"}, {"$ref": "#/$defs/number with unit"}]}
        ends = {"type": "array", "items": end, "minItems": 2, "maxItems": 2}
        keys = {kind: ends, "log": {"type": "boolean", "description": "Factors, not differences, matter."}}
        if kind == "int":
            keys["step"] = {"type": "integer", "minimum": 1}
        what = "a whole number" if kind == "int" else "a number"
        return self._object(keys, [kind], f"An open value: {what} between two ends, both included.")

    def _object(self, keys: JSON, required: list[str], description: str) -> JSON:
        return {
            "type": "object",
            "description": description,
            "properties": keys,
            "required": required,
            "additionalProperties": False,
            "patternProperties": NOTES,
        }

    def _slot(self, slot: str) -> None:
        """Definitions of a slot and of every component installed for it."""
        variants: list[JSON] = []
        for kind in self.registry.kinds(slot):
            component = self.registry.find(slot, kind)
            self.definitions[f"{slot} {kind}"] = self._mapping(component) | {"required": ["kind"]}
            variants.append({"const": kind, "description": component.summary()})
            variants.append({"$ref": f"#/$defs/{slot} {kind}"})
        self.definitions[slot] = {"anyOf": variants}

    def _mapping(self, spec: type[Spec]) -> JSON:
        """The keys of a spec."""
        keys = {name: self._key(name, field, spec) for name, field in spec.model_fields.items()}
        if spec is ModelSpec:
            names = sorted(self.registry.presets)
            keys[PRESET] = {"enum": names, "description": "A model by name; keys beside it win."}
        summary = spec.summary() if issubclass(spec, Component) else (spec.__doc__ or "").split("\n\n")[0]
        return self._object(keys, [], " ".join(summary.split()))

    def _key(self, name: str, field: FieldInfo, spec: type[Spec]) -> JSON:
        shape = shape_of(field.annotation, tuple(field.metadata))
        value = self._value(shape, field)
        if isinstance(field.json_schema_extra, dict) and "x-also" in field.json_schema_extra:
            value = {"anyOf": [value, field.json_schema_extra["x-also"]]}
        closed = name == "kind" or (spec is StudySpec and name in CLOSED) or spec.__name__ in _NEVER_OPEN
        described = value if closed else self._openable(value, shape)
        return {"description": field.description, **described} if field.description else described

    def _value(self, shape: Shape, field: FieldInfo) -> JSON:
        if shape.slot is not None:
            value: JSON = {"$ref": f"#/$defs/{shape.slot.slot}"}
            if (kind := shape.slot.default) in self.registry.kinds(shape.slot.slot):
                without_kind = self._mapping(self.registry.find(shape.slot.slot, str(kind)))
                value = {"anyOf": [value, without_kind]}
        elif shape.spec is not None:
            value = self._spec(shape.spec)
        elif shape.item is not None and (shape.item.slot or shape.item.spec):
            item = self._value(shape.item, field)
            free = "dict" in str(field.annotation)
            value = {"type": "object", "additionalProperties": item} if free else {"type": "array", "items": item}
        else:
            return self._leaf(field)
        return {"anyOf": [value, {"type": "null"}]} if "None" in str(field.annotation) else value

    def _spec(self, spec: type[Spec]) -> JSON:
        """A reference to a spec that is no component, defined on first use; one with a kind has names, and `none`."""
        name = spec.__name__
        if name not in self.definitions:
            self.definitions[name] = {}  # it may contain itself
            mapping = self._mapping(spec)
            if "kind" in spec.model_fields:
                names = {"enum": ["none", spec.model_fields["kind"].default]}
                mapping["properties"]["kind"] = names
                mapping = {"anyOf": [names, mapping]}
            self.definitions[name] = mapping
        return {"$ref": f"#/$defs/{name}"}

    def _leaf(self, field: FieldInfo) -> JSON:
        annotated: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        # Behind a validator that reads units, pydantic leaves its constraints as it has them.
        schema: JSON = _renamed(TypeAdapter(annotated).json_schema())
        if schema.get("type") == "array" and _numeric(schema.get("items", {})):
            item = {"anyOf": [schema["items"], {"$ref": "#/$defs/number with unit"}]}
            return schema | {"items": item}
        if _numeric(schema):
            return {"anyOf": [*schema.get("anyOf", [schema]), {"$ref": "#/$defs/number with unit"}]}
        return schema

    def _openable(self, value: JSON, shape: Shape) -> JSON:
        named = {"type": "object", "additionalProperties": value, "minProperties": 1}
        options: JSON = {"anyOf": [{"type": "array", "items": value, "minItems": 1}, named]}
        if shape.slot is not None:
            options["anyOf"].append({"const": "installed", "description": "Every installed component."})
        variants = [value, self._object({"choice": options}, ["choice"], "An open value: one of several options.")]
        if _numeric(value):
            variants += [{"$ref": f"#/$defs/{kind} range"} for kind in ("int", "float")]
        return {"anyOf": variants}


_NEVER_OPEN = ("SearchSpec", "BudgetSpec", "Objective", "TuneSpec", "AnalysisSpec", "AblateSpec")
_BOUNDS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}


def _renamed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_renamed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {_BOUNDS.get(key, key): _renamed(item) for key, item in schema.items() if key != "allow_inf_nan"}


def _numeric(schema: JSON) -> bool:
    return any(variant.get("type") in ("integer", "number") for variant in (schema, *schema.get("anyOf", [])))
