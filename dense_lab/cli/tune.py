"""`dense-lab tune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dense_lab.cli import options
from dense_lab.cli.verify import runs_of

if TYPE_CHECKING:
    from collections.abc import Iterable


@click.command("tune")
@click.argument("study", type=click.Path(path_type=Path), metavar="[STUDY.yaml]", required=False)
@options.overrides
@click.option("--operation", metavar="NAME", help="This one only.")
@options.as_json
def command(study: Path | None, overrides: tuple[str, ...], operation: str | None, as_json: bool) -> None:
    """Measure launch parameters of this GPU's kernels at STUDY.yaml's shapes, and keep what is at least 2 % faster.

    Offline: minutes, since every candidate is compiled. Rules serve until then, and again when the file it writes is
    removed. Exit code 3 without a GPU.
    """
    import torch

    from dense_lab.errors import MachineError

    if not torch.cuda.is_available():
        raise MachineError("tune measures kernels on a GPU, and torch sees none here; the rules need no tuning to work")
    _check(operation)
    found = []
    for library, gain in _gains(runs_of(study, overrides), operation):
        found.append(gain._asdict())
        library.keep([found[-1]])
        if not as_json:
            text = ", ".join(f"{name} {value}" for name, value in gain.changes.items()) or "the rule stays"
            options.console().print(
                f"{gain.operation}, {gain.shape}: {gain.rule_ms:.4f} ms -> {gain.tuned_ms:.4f} ms; {text}"
            )
    wrong = _withdrawn(runs_of(study, overrides), found)
    for name in wrong:
        options.console().print(f"{name} is wrong with what was found: its rules stay", style="red", markup=False)
    if as_json:
        options.print_json(found)


def _withdrawn(runs: Iterable[Any], found: list[dict[str, Any]]) -> list[str]:
    """Operations that were wrong with their gains, which are taken back."""
    from dense_lab import registry
    from dense_lab.verification import examine

    wrong = sorted({finding.operation for finding in examine(runs, "cuda") if not finding.ok})
    for library in registry.default().kernels:
        if hasattr(library, "keep"):
            library.keep([gain | {"changes": {}} for gain in found if gain["operation"] in wrong])
    return wrong


def _check(operation: str | None) -> None:
    from dense_lab import registry
    from dense_lab.errors import InputError, did_you_mean

    known = [name for library in registry.default().kernels for name in library.OPERATIONS]
    if operation is not None and operation not in known:
        raise InputError(f"no operation {operation!r}.{did_you_mean(operation, known)} There are {', '.join(known)}")


def _gains(runs: Iterable[Any], operation: str | None) -> Iterable[tuple[Any, Any]]:
    """(library, gain) of every class of shapes met in training; a class is measured once."""
    from dense_lab.verification import Case, calls

    seen = set()
    for case in (Case.of(run, "cuda", "training", "whole") for run in runs):
        for library, _, call in calls(case)[0]:
            if not hasattr(library, "tune") or call.implementation != "triton":
                continue
            if operation in (None, call.operation):
                for gain in library.tune(call):
                    if (gain.operation, gain.shape) not in seen:
                        seen.add((gain.operation, gain.shape))
                        yield library, gain
