"""The data of a study, prepared and held against its runs before the first trial, so that none fails for want of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from dense_lab.errors import InputError, Problem
from dense_lab.training.schedule import plan

if TYPE_CHECKING:
    from dense_lab.components import Data
    from dense_lab.corpus import Corpus
    from dense_lab.space import Study
    from dense_lab.space_tree import Origins
    from dense_lab.study import StudySpec


def prepare(study: Study, how: Callable[[Data], Corpus | None] = lambda source: source.prepare()) -> None:
    """Prepare every data source among the arms, or among points that cover the study, and see whether runs fit it.

    `how` may keep what it prepared, or give None for what it leaves alone. Raises InputError with every problem at
    its place. MachineError passes through: the network may be missing.
    """
    sources: dict[str, list[tuple[StudySpec, Origins]]] = {}
    for spec, origins in _runs(study):
        sources.setdefault(spec.data.model_dump_json(), []).append((spec, origins))
    found: dict[Problem, None] = {}
    for runs in sources.values():
        try:
            corpus = how(runs[0][0].data)
        except InputError as error:
            found |= dict.fromkeys(_placed(p, origins) for p in error.problems for _, origins in runs)
            continue
        if corpus is None:
            continue
        for spec, origins in runs:
            try:
                _check(study, spec, corpus)
            except InputError as error:
                found |= dict.fromkeys(_placed(p, origins) for p in error.problems)
    if found:
        raise InputError(found)


def _runs(study: Study) -> Iterator[tuple[StudySpec, Origins]]:
    """Every arm, or points that cover the study, with the places of what is written."""
    for arm in study.arms():
        yield arm.spec, arm.study.origins(arm.point)
    for point in [] if study.ablation else study.covering():
        yield study.validated(point), study.origins(point)


def _check(study: Study, spec: StudySpec, corpus: Corpus) -> None:
    """Raise InputError when a run of these values cannot use this data."""
    plan(spec.train, corpus.seq_len)
    ablation = study.ablation
    if ablation is None:
        return
    if ablation.tune is not None and ablation.tune.tokens is not None:
        try:
            plan(spec.train.model_copy(update={"tokens": ablation.tune.tokens}), corpus.seq_len)
        except InputError as error:
            place = study.document.where(("tune", "tokens"))
            raise InputError(replace(p, path="tune.tokens", where=place) for p in error.problems) from None
    if ablation.metric.startswith("test/") and corpus.tokens("test") == 0:
        message = f"{ablation.metric} is to be compared, but the data has no test split: give it one, or write "
        raise InputError(Problem(message + "`analysis: {metric: valid/loss}`", "data"))


def _placed(problem: Problem, origins: Origins) -> Problem:
    """The problem at the place of its path, or of the nearest value above it that is written."""
    path = problem.path or "data"
    keys = tuple(path.split("."))
    at = next(keys[:n] for n in range(len(keys), -1, -1) if keys[:n] in origins)
    node, rest = origins[at], ".".join(keys[len(at) :])
    named = f"{node.path}.{rest}".lstrip(".") if rest else node.own
    return replace(problem, path=named, where=problem.where or node.where)
