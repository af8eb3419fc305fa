"""`dense-lab schema`."""

from __future__ import annotations

import click

from dense_lab.cli import options


@click.command("schema")
def command() -> None:
    """Print the JSON Schema of studies, with the components installed here, for editors."""
    from dense_lab.registry import default
    from dense_lab.schema import study_schema

    options.print_json(study_schema(default()))
