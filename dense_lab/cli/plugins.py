"""`dense-lab plugins`."""

from __future__ import annotations

import dataclasses

import click

from dense_lab.cli import options


@click.command("plugins")
@options.as_json
def command(as_json: bool) -> None:
    """List the plugins, what each brought, or why it is left out."""
    from dense_lab import registry

    plugins = registry.default().plugins
    if as_json:
        options.print_json([dataclasses.asdict(plugin) for plugin in plugins])
        return
    rows = (
        (p.name, p.version, "left out: " + p.error if p.error else ", ".join(sorted(p.components)) or "nothing")
        for p in plugins
    )
    options.print_table("", ("plugin", "version", "components"), rows)
