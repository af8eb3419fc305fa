"""The command line: one file per command, imported when the command is run, so that `--help` answers at once."""

from __future__ import annotations

import atexit
import gc
import importlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from dense_lab import __version__
from dense_lab.errors import DenseLabError

COMMANDS = {
    "init": "Write a study to start from.",
    "check": "Say whether a study is valid, and where it is not.",
    "components": "List the installed components, or one in detail.",
    "show": "What a study means: its space, parameters, FLOPs, state, time. Trains nothing.",
    "verify": "Compare the operations that a study uses with float64, on this machine.",
    "tune": "Measure launch parameters of GPU kernels and keep what is faster.",
    "plan": "Arms, solved sizes, cost and doubts of a study, before anything runs.",
    "train": "Train one run.",
    "search": "Run a study, or go on with it.",
    "status": "How a study is going.",
    "report": "Verdicts, tables and plots of one study or of several, for a browser and for a paper.",
    "reproduce": "Train recorded runs again, and say whether the numbers come out as recorded.",
    "power": "How many seeds an ablation needs, by the scatter of those it has.",
    "overhead": "What dense connections cost: every dense arm against its own plain twin.",
    "plugins": "List the plugins and what each brought, or why it is left out.",
    "schema": "Print the JSON Schema of studies, for editors.",
    "sync": "Send to MLflow what it is missing of a study.",
    "ui": "Browse a study's MLflow store.",
}
"""Name and one-line help of each command; its module is `dense_lab.cli.<name>`, its function `command`."""


class _Notices(logging.Handler):
    """Says on standard error what takes long, such as training a tokenizer, before it starts."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(self.format(record), err=True)


class _Commands(click.Group):
    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"dense_lab.cli.{name}").command
        return command

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        from dense_lab.errors import did_you_mean

        if args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(f"no command {args[0]!r}.{did_you_mean(args[0], COMMANDS)}", context)
        return super().resolve_command(context, args)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dense-lab")
@click.option(
    "--plugin",
    "plugins",
    multiple=True,
    metavar="FILE.py",
    type=click.Path(path_type=Path),
    help="Load a plugin from a loose file. May be given several times.",
)
def group(plugins: tuple[Path, ...]) -> None:
    """Architecture search and ablation of dense hidden connections in state-space language models.

    Exit codes: 0 ok, 1 a run failed, 2 bad input, 3 something is wrong with the machine, 130 stopped.
    """
    log = logging.getLogger("dense_lab")
    if not any(isinstance(handler, _Notices) for handler in log.handlers):
        log.addHandler(_Notices())
        log.setLevel(logging.INFO)
    if plugins:
        from dense_lab import registry

        registry.set_default(registry.load(tuple(path.resolve() for path in plugins)))


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of the `dense-lab` command; exits."""
    # Python's last look for garbage would walk through all of torch, for a third of a second.
    atexit.register(gc.freeze)
    try:
        code = group.main(args, prog_name="dense-lab", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # The reader (`| head`) has seen enough.
        sys.stderr.close()
        sys.exit(0)
    except DenseLabError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    # A command's Exit comes back as its code.
    sys.exit(code if isinstance(code, int) else 0)
