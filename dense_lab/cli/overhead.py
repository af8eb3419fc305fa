"""`dense-lab overhead`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dense_lab.cli import options

if TYPE_CHECKING:
    from dense_lab.overhead import Row

HEADS = {
    "parameters": "parameters",
    "flops_per_token": "FLOPs/token",
    "state_bytes": "state bytes",
    "train_tokens_per_second": "training tokens/s",
    "decode_tokens_per_second": "decoding tokens/s",
    "peak_memory_bytes": "peak memory",
}


@click.command("overhead")
@click.argument("study", type=click.Path(path_type=Path), metavar="STUDY.yaml|FOLDER")
@options.overrides
@options.device
@options.runs
@click.option("--rounds", type=click.IntRange(1), default=9, show_default=True, help="Interleaved rounds.")
@click.option("--seconds", default=0.1, show_default=True, help="Of each side in a round, at least one step.")
@click.option("--decode-batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences decoded at once.")
@click.option("--together", type=click.IntRange(1), default=6, show_default=True, help="Arms in memory at once.")
@options.as_json
def command(
    study: Path,
    overrides: tuple[str, ...],
    device: str,
    runs: Path,
    rounds: int,
    seconds: float,
    decode_batch: int,
    together: int,
    as_json: bool,
) -> None:
    """What dense connections cost: every dense arm against its own twin without them, at equal widths.

    Of STUDY.yaml all arms; of a study's FOLDER the architectures that were trained. Written to overhead.json in the
    study's folder, for the report.
    """
    from dense_lab import overhead
    from dense_lab.files import write_json

    if study.suffix in {".yaml", ".yml"}:
        loaded = options.load_study(study, overrides, runs)
        folder, found = runs / loaded.name, overhead.runs_of(loaded)
    else:
        folder = options.study_folder(study, runs)
        found = overhead.runs_in(folder)
    settings = overhead.Options(rounds, seconds, decode_batch, together)
    rows = overhead.measure(
        overhead.pairs(found), device, settings, lambda arm: click.echo(f"measured {arm}", err=True)
    )
    write_json(folder / overhead.OVERHEAD, overhead.as_json(rows))
    if as_json:
        options.print_json(overhead.as_json(rows))
        return
    _print(rows, folder / overhead.OVERHEAD)


def _print(rows: list[Row], file: Path) -> None:
    heads = [head for metric, head in HEADS.items() if any(row.metric == metric for row in rows)]
    found = {(row.arm, row.metric): row for row in rows}
    arms = {row.arm: row.twin for row in rows}
    cells = (
        (arm, twin, *(_change(found[arm, metric]) for metric, head in HEADS.items() if head in heads))
        for arm, twin in arms.items()
    )
    first = rows[0]
    title = f"Change against the twin without dense connections, on {first.device} in {first.dtype}"
    options.print_table(title, ("arm", "twin", *heads), cells, right=heads)
    batches = {row.metric: row.batch for row in rows}
    options.console().print(
        f"Median and [10 %, 90 %] of {max(row.rounds for row in rows)} interleaved rounds. Training: batches of "
        f"{batches['train_tokens_per_second']} x {first.seq_len} tokens; decoding: "
        f"{batches['decode_tokens_per_second']} at once. Written to {file}",
        soft_wrap=True,
    )


def _change(row: Row) -> str:
    middle = f"{row.ratio - 1:+.1%}"
    return middle if row.low == row.high else f"{middle} [{row.low - 1:+.1%}, {row.high - 1:+.1%}]"
