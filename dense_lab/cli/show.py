"""`dense-lab show`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dense_lab.cli import options

if TYPE_CHECKING:
    from dense_lab.planning import Row
    from dense_lab.space import Parameter, Study


@click.command("show")
@options.study_argument
@options.overrides
@options.device
@options.runs
@options.as_json
def command(study: Path, overrides: tuple[str, ...], device: str, runs: Path, as_json: bool) -> None:
    """What STUDY.yaml means: its open values, and the size of the architectures they give. Trains nothing.

    Every option of every choice occurs in one of the architectures sized, on the meta device. The time is that of
    `dense-lab plan`.
    """
    from dense_lab.cli.live import duration
    from dense_lab.planning import plan
    from dense_lab.search import data
    from dense_lab.speeds import corpus
    from dense_lab.units import counted, human

    loaded = options.load_study(study, overrides, runs)
    data.prepare(loaded, corpus)
    found = plan(loaded, runs / loaded.name, device)
    if as_json:
        space = [parameter.describe() for parameter in loaded.space]
        told = {"name": loaded.name, "digest": loaded.digest(), "space": space, "points": loaded.size()}
        options.print_json(
            {**told, "architectures": [_described(row) for row in found.rows], "estimated_seconds": found.seconds}
        )
        return
    _print_space(loaded)
    columns = ("architecture", "parameters", "without embedding", "FLOPs/token", "state bytes")
    cells = (
        (row.name, *map(human, (row.total, row.non_embedding, row.flops_per_token, row.state_bytes)))
        for row in found.rows
    )
    title = "Arms" if loaded.ablation else "Architectures that between them meet every option"
    options.print_table(title, columns, cells, right=columns[1:])
    options.console().print(
        f"{counted(found.runs, 'run')}, {human(found.tokens)} tokens in all: roughly {duration(found.seconds)} on "
        f"{found.device}, one after the other; `dense-lab plan` says more"
    )


def _described(row: Row) -> dict[str, Any]:
    return {
        "label": row.name,
        "params": row.params,
        "parameters": row.total,
        "non_embedding": row.non_embedding,
        "flops_per_token": row.flops_per_token,
        "state_bytes": row.state_bytes,
        "tokens": row.tokens,
    }


def _print_space(study: Study) -> None:
    from dense_lab.units import counted

    if study.ablation:
        spec = study.ablation.spec
        options.console().print(
            f"{study.name}: {counted(len(study.arms()), 'arm')}, {counted(len(spec.seeds), 'seed')}"
        )
        return
    if not study.space:
        options.console().print(f"{study.name}: a single run")
        return
    number = study.size()
    size = counted(number, "point") if number else "continuous"
    options.print_table(
        f"{study.name}: {size}, {counted(study.search.trials, 'trial')} by {study.search.sampler}",
        ("open value", "options"),
        ((parameter.path, _options(parameter)) for parameter in study.space),
    )


def _options(parameter: Parameter) -> str:
    described = parameter.describe()
    if "labels" in described:
        return ", ".join(str(label) for label in described["labels"])
    return f"{described['low']} to {described['high']}" + (" (log)" if described.get("log") else "")
