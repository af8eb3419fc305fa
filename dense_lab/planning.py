"""What a study is about to do: its architectures with their solved sizes, what they cost, and what is doubtful."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dense_lab import counting
from dense_lab.budget_spec import LOOSE
from dense_lab.errors import InputError, Problem
from dense_lab.model import ModelSpec
from dense_lab.speeds import Source, Speeds, corpus, implementations, measured
from dense_lab.study import RunSpec
from dense_lab.training.device import choose_place
from dense_lab.units import human

if TYPE_CHECKING:
    from dense_lab.space import Study

SEEDS = 3
"""Fewer say little about the spread."""

Named = tuple[str, dict[str, Any], RunSpec]
"""Name of an architecture, its point of a search, and its run."""


@dataclass(frozen=True)
class Row:
    """One architecture of a plan."""

    name: str
    """Of the arm; of a search, the values of the point."""
    params: dict[str, Any]
    """Of a search, the point."""
    width: int
    ffn_width: int | None
    """The feed-forward layers' own, if it is said or solved."""
    depth: int
    parameters: dict[str, int]
    """By part: embedding, core, dense, ffn, norm, head."""
    flops_per_token: float
    """Of the forward pass."""
    state_bytes: int
    cells: int
    """Runs that are reported: one for each seed."""
    tuning: int
    """Runs that only a learning rate is chosen by."""
    tokens: int
    """Training tokens of all of its runs."""
    seconds: float
    """Of all of its runs, one after the other."""
    source: Source
    """How that is known: from runs of this arm, scaled by FLOPs from runs of others, or guessed."""

    @property
    def total(self) -> int:
        """Parameters in all."""
        return sum(self.parameters.values())

    @property
    def non_embedding(self) -> int:
        """Parameters outside embedding and head."""
        return self.total - self.parameters["embedding"] - self.parameters["head"]


@dataclass(frozen=True)
class Plan:
    """What a study is about to do."""

    name: str
    device: str
    rows: tuple[Row, ...]
    runs: int
    """In all; of a search, its trials."""
    tokens: int
    """Training tokens of all of them."""
    seconds: float
    """Of all of them, one after the other."""
    how: str
    """How the times were found, in a sentence."""
    warnings: tuple[str, ...]
    implementations: dict[str, dict[str, str]] = field(default_factory=dict)
    """By core: what computes each operation on this device."""

    def as_json(self) -> dict[str, Any]:
        """Everything, sums included."""
        rows = [{**asdict(row), "total": row.total, "non_embedding": row.non_embedding} for row in self.rows]
        return {**asdict(self), "rows": rows}


def plan(study: Study, folder: Path | None = None, device: str = "auto") -> Plan:
    """The plan of `study` on a device; runs in `folder`, the study's own, tell how fast it is.

    Raises InputError with every arm that cannot be built or that meets no budget.
    """
    place = choose_place(device, "auto")
    with counting.one_thread():
        runs = runs_of(study)
        chosen = implementations([run for _, _, run in runs], place)
    speeds = Speeds(place, measured(folder, place))
    rows = rows_of(study, speeds, runs)
    return Plan(
        study.name,
        place.describe(),
        rows,
        number_of_runs(study, rows),
        *costs(study, rows),
        speeds.told({row.source for row in rows}),
        tuple(_warnings(study, rows, [run for _, _, run in runs])),
        chosen,
    )


def rows_of(study: Study, speeds: Speeds, runs: Sequence[Named]) -> tuple[Row, ...]:
    """A row for each of `runs_of(study)`."""
    return tuple(_row(study, speeds, *named) for named in runs)


def number_of_runs(study: Study, rows: Sequence[Row]) -> int:
    """In all; of a search, its trials."""
    if study.ablation:
        return sum(row.cells + row.tuning for row in rows)
    return study.search.trials if study.space else 1


def costs(study: Study, rows: Sequence[Row]) -> tuple[int, float]:
    """Tokens and seconds of all runs; the trials of a search are taken to be like the rows on average."""
    share = 1.0 if study.ablation else number_of_runs(study, rows) / len(rows)
    return round(share * sum(row.tokens for row in rows)), share * sum(row.seconds for row in rows)


def runs_of(study: Study) -> list[Named]:
    """Every arm, or few points of a search that between them meet every option."""
    from dense_lab.cli.live import brief

    points: list[tuple[str, dict[str, Any]]] = [(arm.name, {}) for arm in study.arms()]
    if not study.ablation:
        points = [(brief(point) or study.name, point) for point in study.covering()]
    found, complaints = [], list[Problem]()
    for name, point in points:
        try:
            run = study.ablation.arm(name).run if study.ablation else study.point(point)
            counting.check_sizes(run.model)
        except InputError as error:
            complaints += error.problems
        else:
            found.append((name, point, run))
    if complaints:
        raise InputError(dict.fromkeys(complaints))
    return found


def _row(study: Study, speeds: Speeds, name: str, params: dict[str, Any], run: RunSpec) -> Row:
    vocabulary = corpus(run.data).vocab_size
    flops = counting.flops_per_token(run.model, vocabulary)
    cells, tuning, tuning_tokens = 1, 0, 0
    if study.ablation:
        cells = len(study.ablation.spec.seeds)
        if (tune := study.ablation.tune) is not None:
            tuning, tuning_tokens = len(tune.grid()), tune.tokens or run.train.tokens
    seconds, source = speeds.seconds(name, flops, run.train)
    share = tuning_tokens / run.train.tokens
    return Row(
        name,
        params,
        run.model.width,
        getattr(run.model.ffn, "hidden", None),
        len(run.model.layers()),
        counting.parameters_by_part(run.model, vocabulary),
        flops,
        counting.state_bytes(run.model),
        cells,
        tuning,
        cells * run.train.tokens + tuning * tuning_tokens,
        seconds * (cells + tuning * share),
        source,
    )


def _warnings(study: Study, rows: Sequence[Row], runs: Sequence[RunSpec]) -> Iterable[str]:
    """What a reader of the results might hold against them."""
    yield from _about_sizes(study, rows)
    if study.ablation:
        seeds = len(study.ablation.spec.seeds)
        if seeds < SEEDS:
            yield f"{seeds} seed{'s' * (seeds > 1)}: fewer than {SEEDS} say little about the spread"
        if study.ablation.tune is None:
            yield "no `tune`: every arm is trained at the learning rate written, which may suit some better than others"
    if (study.ablation or len(rows) > 1) and all(any(_spans(run.model)) for run in runs):
        yield "no plain arm (`model.dense: none`) that dense connections could be compared with"
    for row, run in zip(rows, runs, strict=True):
        span = run.model.dense.span
        if span >= row.depth > 1 and run.model.dense.pattern.kind_name() == "recent":
            yield f"{row.name}: span {span} reads no more than span {row.depth - 1} would: there are {row.depth} layers"
    for data, tokens in {run.data.model_dump_json(): (run.data, run.train.tokens) for run in runs}.values():
        there = corpus(data).tokens("train")
        if there and tokens > there:
            yield f"{human(tokens)} training tokens from {human(there)} of data: {tokens / there:.1f} passes over it"


def _about_sizes(study: Study, rows: Sequence[Row]) -> Iterable[str]:
    sizes = [row.non_embedding for row in rows]
    tolerance = study.budget.tolerance if study.budget else 0.05
    if study.budget is None and len(rows) > 1 and max(sizes) > min(sizes) * (1 + tolerance):
        yield (
            f"sizes differ by {max(sizes) / min(sizes) - 1:.0%} ({human(min(sizes))} to {human(max(sizes))} without "
            f"embedding): a `budget` brings all to one"
        )
    odd = [f"{row.name} ({row.width})" for row in rows if row.width % 8]
    if 0 < len(odd) < len(rows):
        named = ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
        yield (
            f"width is no multiple of 8: {named}, of others it is; on a GPU its matrix products are slower for that "
            "alone (a quarter of a Mamba's speed at 404 instead of 400): compare speeds by `dense-lab overhead`"
        )
    if study.ablation and (study.budget is None or study.budget.target != "flops_per_token"):
        limit = study.budget.flops_tolerance if study.budget else LOOSE
        own = next(row.flops_per_token for row in rows if row.name == study.ablation.baseline)
        for row in rows:
            if abs(off := row.flops_per_token / own - 1) > limit:
                yield f"{row.name}: {off:+.0%} FLOPs per token: the certificate will say NOT FAIR (limit {limit:.0%})"


def _spans(model: ModelSpec) -> list[int]:
    return [(layer.dense or model.dense).span for layer in model.layers()]
