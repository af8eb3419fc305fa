"""What dense connections cost: every dense architecture against its own twin without them, at equal widths.

Training is timed with the step that runs train with, decoding with what `generate` decodes with. Rounds are
interleaved (twin, arm, arm, ...; twin, arm, arm, ...) and ratios are taken within a round, so that what slows the
machine down for a while slows both sides down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from dense_lab.counting import count
from dense_lab.errors import InputError
from dense_lab.results import read_study
from dense_lab.speeds import OVERHEAD, corpus
from dense_lab.study import RunSpec
from dense_lab.timing import Decoding, Side, Training, released, repeats, seconds_of
from dense_lab.training.device import Place, choose_place
from dense_lab.training.schedule import plan as schedule

if TYPE_CHECKING:
    from dense_lab.space import Study

__all__ = ["OVERHEAD", "Options", "Pair", "Row", "as_json", "measure", "pairs", "runs_in", "runs_of"]

NO_ARM = "m = 0"
"""What a twin is called that is no arm of the study."""
Kind = Literal["training", "decoding"]


@dataclass(frozen=True)
class Row:
    """One comparison."""

    arm: str
    twin: str
    """The arm of the study that is the same architecture without dense connections, or NO_ARM."""
    metric: str
    """parameters, flops_per_token, state_bytes, peak_memory_bytes, train_ or decode_tokens_per_second."""
    dense: float
    plain: float
    ratio: float
    """dense / plain; of speeds the median over rounds."""
    low: float
    """10th percentile of the ratios of single rounds; the ratio itself where nothing scatters."""
    high: float
    """90th percentile."""
    rounds: int
    """Of speeds; 1 where nothing scatters."""
    device: str
    dtype: str
    batch: int
    """Sequences at once."""
    seq_len: int


class Options(NamedTuple):
    """How long to measure."""

    rounds: int = 9
    seconds: float = 0.1
    """Of one side in one round; at least one step."""
    decode_batch: int = 1
    """Sequences decoded at once."""
    together: int = 6
    """Arms in memory at once, besides their twin."""


class Pair(NamedTuple):
    """A dense arm and its twin."""

    arm: str
    twin: str
    dense: RunSpec
    plain: RunSpec


def runs_of(study: Study) -> dict[str, RunSpec]:
    """The runs of a study by name: its arms, or few points that between them meet every option of a search."""
    from dense_lab import planning

    return {name: run for name, _, run in planning.runs_of(study)}


def runs_in(folder: Path) -> dict[str, RunSpec]:
    """One run of each architecture in a study's folder, by arm or by the values that were searched over."""
    from dense_lab.cli.live import brief

    found: dict[str, RunSpec] = {}
    models = set()
    for trial in read_study(folder).trials:
        if not trial.spec:
            continue
        run = RunSpec.model_validate(trial.spec)
        if (text := run.model.model_dump_json()) not in models:
            models.add(text)
            found.setdefault(trial.label or brief(trial.params) or str(trial.number), run)
    return found


def pairs(runs: Mapping[str, RunSpec]) -> list[Pair]:
    """Every dense architecture with its twin; raises InputError when none is dense."""
    names = {_architecture(run): name for name, run in runs.items()}
    found = []
    for name, run in runs.items():
        plain = run.model_copy(update={"model": run.model.without_dense()})
        if _architecture(plain) != _architecture(run):
            found.append(Pair(name, names.get(_architecture(plain), NO_ARM), run, plain))
    if not found:
        raise InputError("no architecture of this study has dense connections, so there is no overhead to measure")
    return found


def _architecture(run: RunSpec) -> str:
    return run.model.model_dump_json()


def measure(found: Sequence[Pair], device: str, options: Options, told: Callable[[str], None] = print) -> list[Row]:
    """The rows of all pairs; `told` is called with the name of each arm that is done.

    Raises MachineError when there is no such device.
    """
    rows: list[Row] = []
    groups: dict[str, list[Pair]] = {}
    for pair in found:
        groups.setdefault(_architecture(pair.plain), []).append(pair)
    for group in groups.values():
        for start in range(0, len(group), options.together):
            part = group[start : start + options.together]
            place = choose_place(device, part[0].plain.train.precision)
            speeds = [_speeds(part, kind, place, options) for kind in ("training", "decoding")]
            for pair, *measured in zip(part, *speeds, strict=True):
                rows += [*_sizes(pair, place), *(row for rows_of_kind in measured for row in rows_of_kind)]
                told(pair.arm)
    return rows


def _sizes(pair: Pair, place: Place) -> Iterator[Row]:
    data = corpus(pair.plain.data)
    dense, plain = (count(run.model, data.vocab_size)._asdict() for run in (pair.dense, pair.plain))
    for metric in ("parameters", "flops_per_token", "state_bytes"):
        yield _row(pair, metric, [dense[metric]], [plain[metric]], place, _batch_size(pair.plain))


def _speeds(part: Sequence[Pair], kind: Kind, place: Place, options: Options) -> list[list[Row]]:
    """For each pair, the rows of training (speed, and on a GPU memory) or of decoding."""
    sides: list[Side] = []
    with released(place.device, sides):
        for run in (part[0].plain, *(pair.dense for pair in part)):
            sides.append(Training(run, place) if kind == "training" else Decoding(run, place, options.decode_batch))
        many = [repeats(side, options.seconds, place.device) for side in sides]
        found: list[list[float]] = [[] for _ in sides]
        for _ in range(options.rounds):
            for side, times, speeds in zip(sides, many, found, strict=True):
                speeds.append(side.tokens * times / seconds_of(side, times, place.device))
        rows = []
        for pair, side, speeds in zip(part, sides[1:], found[1:], strict=True):
            mine = [_row(pair, side.metric, speeds, found[0], place, side.batch)]
            if side.memory and sides[0].memory:
                mine.append(_row(pair, "peak_memory_bytes", [side.memory], [sides[0].memory], place, side.batch))
            rows.append(mine)
    return rows


def _row(pair: Pair, metric: str, dense: Sequence[float], plain: Sequence[float], place: Place, batch: int) -> Row:
    # Two cores without state would be alike.
    ratios = [a / b if b else 1.0 for a, b in zip(dense, plain, strict=True)]
    low, ratio, high = (float(value) for value in np.quantile(ratios, (0.1, 0.5, 0.9)))
    return Row(
        pair.arm,
        pair.twin,
        metric,
        float(np.median(dense)),
        float(np.median(plain)),
        ratio,
        low,
        high,
        len(ratios),
        place.describe(),
        str(place.dtype).removeprefix("torch."),
        batch,
        corpus(pair.plain.data).seq_len,
    )


def _batch_size(run: RunSpec) -> int:
    return schedule(run.train, corpus(run.data).seq_len).batch_size


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """As they stand in OVERHEAD, which the report and plans read."""
    return [asdict(row) for row in rows]
