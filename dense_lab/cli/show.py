"""`dense-lab show`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dense_lab.cli import options

if TYPE_CHECKING:
    from dense_lab.space import Parameter, Study

EFFICIENCY = 0.2
"""Part of the matrix-product rate that small models reach in training: an order of magnitude, not a promise."""


@click.command("show")
@options.study_argument
@options.overrides
@options.as_json
def command(study: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """What STUDY.yaml means: its open values, and the size of the architectures they give. Trains nothing.

    Every option of every choice occurs in one of the architectures sized, on the meta device.
    """
    loaded = options.load_study(study, overrides)
    rows = [_sized(loaded, label, params) for label, params in _corners(loaded)]
    seconds = _seconds(rows, loaded)
    if as_json:
        space = [parameter.describe() for parameter in loaded.space]
        told = {"name": loaded.name, "digest": loaded.digest(), "space": space, "points": loaded.size()}
        options.print_json({**told, "architectures": rows, "estimated_seconds": seconds})
        return
    from dense_lab.cli.live import duration
    from dense_lab.units import human

    _print_space(loaded)
    columns = ("architecture", "parameters", "without embedding", "FLOPs/token", "state bytes")
    cells = (
        (
            r["label"],
            human(r["parameters"]),
            human(r["non_embedding"]),
            human(r["flops_per_token"]),
            human(r["state_bytes"]),
        )
        for r in rows
    )
    options.print_table("Architectures that between them meet every option", columns, cells, right=columns[1:])
    trials = loaded.search.trials if loaded.space else 1
    options.console().print(
        f"{trials} trials of {human(rows[0]['tokens'])} tokens: roughly {duration(seconds)} on this machine's "
        f"processor, one after the other"
    )


def _corners(study: Study) -> list[tuple[str, dict[str, Any]]]:
    """(label, values of the choices) of few points that meet every option."""
    if not study.space:
        return [(study.name, {})]
    from dense_lab.cli.live import brief

    return [(brief(point), point) for point in study.covering()]


def _sized(study: Study, label: str, params: dict[str, Any]) -> dict[str, Any]:
    from dense_lab.counting import count

    run = study.point(params)
    counts = count(run.model, run.data.prepare().vocab_size)
    return {
        "label": label,
        "params": params,
        "parameters": counts.parameters,
        "non_embedding": counts.parameters - counts.embedding_parameters,
        "flops_per_token": counts.flops_per_token,
        "state_bytes": counts.state_bytes,
        "tokens": run.train.tokens,
    }


def _seconds(rows: list[dict[str, Any]], study: Study) -> float:
    """Of the whole study: forward and backward are 3 x the forward FLOPs, at EFFICIENCY of the measured rate."""
    rate = _matrix_rate() * EFFICIENCY
    mean = sum(3 * row["flops_per_token"] * row["tokens"] for row in rows) / len(rows)
    return float(mean / rate * (study.search.trials if study.space else 1))


def _matrix_rate() -> float:
    """FLOPs per second of a 1024 x 1024 matrix product in fp32 on this machine's processor."""
    import torch

    a = torch.randn(1024, 1024)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2.0 * 1024**3 / min(times)


def _print_space(study: Study) -> None:
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
