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
@options.as_json
def command(study: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """What STUDY.yaml means: its open values, and the size of the architectures they give. Trains nothing.

    Every option of every choice occurs in one of the architectures sized, on the meta device.
    """
    from dense_lab import planning
    from dense_lab.cli.live import duration
    from dense_lab.search import data
    from dense_lab.speeds import Speeds, corpus
    from dense_lab.training.device import choose_place
    from dense_lab.units import human

    loaded = options.load_study(study, overrides)
    data.prepare(loaded, corpus)
    rows = planning.rows_of(loaded, Speeds(choose_place("cpu", "auto"), {}), planning.runs_of(loaded))
    tokens, seconds = planning.costs(loaded, rows)
    if as_json:
        space = [parameter.describe() for parameter in loaded.space]
        told = {"name": loaded.name, "digest": loaded.digest(), "space": space, "points": loaded.size()}
        options.print_json({**told, "architectures": [_described(row) for row in rows], "estimated_seconds": seconds})
        return
    _print_space(loaded)
    columns = ("architecture", "parameters", "without embedding", "FLOPs/token", "state bytes")
    cells = (
        (row.name, *map(human, (row.total, row.non_embedding, row.flops_per_token, row.state_bytes))) for row in rows
    )
    title = "Arms" if loaded.ablation else "Architectures that between them meet every option"
    options.print_table(title, columns, cells, right=columns[1:])
    runs = planning.number_of_runs(loaded, rows)
    options.console().print(
        f"{runs} runs, {human(tokens)} tokens in all: roughly {duration(seconds)} on this machine's processor, one "
        f"after the other; `dense-lab plan` says more"
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
    if study.ablation:
        spec = study.ablation.spec
        options.console().print(f"{study.name}: {len(study.arms())} arms, {len(spec.seeds)} seeds")
        return
    if not study.space:
        options.console().print(f"{study.name}: a single run")
        return
    size = f"{study.size()} points" if study.size() else "continuous"
    options.print_table(
        f"{study.name}: {size}, {study.search.trials} trials by {study.search.sampler}",
        ("open value", "options"),
        ((parameter.path, _options(parameter)) for parameter in study.space),
    )


def _options(parameter: Parameter) -> str:
    described = parameter.describe()
    if "labels" in described:
        return ", ".join(str(label) for label in described["labels"])
    return f"{described['low']} to {described['high']}" + (" (log)" if described.get("log") else "")
