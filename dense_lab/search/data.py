"""The data of a study, prepared once before its first trial, so that no trial fails for a file that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from dense_lab.errors import InputError

if TYPE_CHECKING:
    from dense_lab.components import Data
    from dense_lab.space import Study


def prepare(study: Study) -> None:
    """Prepare every data source that the study names; raises InputError for one that cannot be.

    MachineError passes through: the network may be missing.
    """
    for source in sources(study):
        try:
            corpus = source.prepare()
        except InputError as error:
            place = study.document.where(("data",))
            raise InputError(
                replace(p, path=p.path or "data", where=p.where or place) for p in error.problems
            ) from None
        if study.ablation and study.ablation.metric.startswith("test/") and corpus.tokens("test") == 0:
            message = (
                f"{study.ablation.metric} is to be compared, but the data has no test split: give it one, or write "
            )
            raise InputError(message + "`analysis: {metric: valid/loss}`")


def sources(study: Study) -> Iterator[Data]:
    """The different data sources among the arms, or among points that cover the study."""
    seen = set()
    for spec in [arm.spec for arm in study.arms()] or map(study.validated, study.covering()):
        if (key := spec.data.model_dump_json()) not in seen:
            seen.add(key)
            yield spec.data
