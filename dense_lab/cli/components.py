"""`dense-lab components`."""

from __future__ import annotations

import inspect
from typing import Any

import click

from dense_lab.cli import options


@click.command("components")
@click.argument("slot", required=False)
@click.argument("kind", required=False)
@options.as_json
def command(slot: str | None, kind: str | None, as_json: bool) -> None:
    """List the installed components, those of one SLOT, or one KIND in detail: fields, defaults, paper."""
    from dense_lab import registry as registries
    from dense_lab.errors import InputError, did_you_mean

    registry = registries.default()
    if slot is not None and slot not in registry.slots():
        raise InputError(
            f"no slot {slot!r}.{did_you_mean(slot, registry.slots())} Slots: {', '.join(registry.slots())}"
        )
    if slot is not None and kind is not None:
        _print_one(slot, kind, as_json)
        return
    slots = registry.slots() if slot is None else [slot]
    rows = [
        {"slot": s, "kind": k, "summary": registry.find(s, k).summary(), "plugin": registry.owner(s, k).name}
        for s in slots
        for k in registry.kinds(s)
    ]
    if as_json:
        options.print_json(rows)
    else:
        options.print_table("", ("slot", "kind", "what it is", "plugin"), (tuple(row.values()) for row in rows))


def _print_one(slot: str, kind: str, as_json: bool) -> None:
    from dense_lab import registry as registries

    registry = registries.default()
    cls, plugin = registry.find(slot, kind), registry.owner(slot, kind)
    fields = [
        {
            "field": name,
            "type": _type_name(field.annotation),
            "default": _default(field.get_default(call_default_factory=True)),
            "meaning": " ".join((field.description or "").split()),
        }
        for name, field in cls.model_fields.items()
        if name != "kind"
    ]
    text = inspect.getdoc(cls) or ""
    if as_json:
        about = {"plugin": plugin.name, "version": plugin.version, "text": text}
        options.print_json({"slot": slot, "kind": kind, **about, "fields": fields})
        return
    options.console().print(f"[bold]{slot} {kind}[/bold]  (plugin {plugin.name} {plugin.version})\n")
    options.console().print(text + "\n", markup=False)
    if fields:
        options.print_table("", ("field", "type", "default", "meaning"), (tuple(f.values()) for f in fields))
    else:
        options.console().print("It has no fields.")


def _default(value: Any) -> str:
    return "required" if "PydanticUndefined" in repr(value) else "none" if value is None else str(value)


def _type_name(annotation: Any) -> str:
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return text.replace("typing.", "").replace("Literal", "one of ").replace("NoneType", "none")
