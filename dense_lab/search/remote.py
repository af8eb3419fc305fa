"""The trials of a study that other machines ran, from Optuna's storage alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dense_lab.ablation.cells import params_of, tags_of
from dense_lab.errors import DenseLabError
from dense_lab.results import State, TrialView
from dense_lab.search import ledger as book
from dense_lab.search.owner import liveness
from dense_lab.search.storage import load_study

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


def remote_trials(url: str, name: str) -> list[TrialView]:
    """What the storage knows of each trial; empty when it cannot be asked, since files are read all the same."""
    try:
        study, _ = load_study(url, name)
    except (DenseLabError, KeyError):
        return []
    return [
        _view(number, trial)
        for number, trial in book.latest(study.get_trials(deepcopy=False)).items()
        if book.standing(trial) in ("running", "finished")
    ]


def _view(number: int, trial: FrozenTrial) -> TrialView:
    end, claim, cell = book.end(trial), book.claim(trial), book.cell(trial)
    state: State = end.get("state", "failed")
    if book.standing(trial) == "running":
        state = "interrupted" if liveness(claim.get("owner")) == "dead" else "running"
    return TrialView(
        number=number,
        state=state,
        params=params_of(cell) if cell else trial.params,
        metrics=end.get("metrics", {}),
        tags={**end.get("tags", {}), **(tags_of(cell) if cell else {})},
        reason=end.get("reason") or trial.user_attrs.get("interrupted", ""),
        values={},
        folder=None,
        label=cell.get("arm", ""),
        role=cell.get("role", ""),
        digest=claim.get("digest", ""),
        started=trial.datetime_start.astimezone() if trial.datetime_start else None,
        ended=trial.datetime_complete.astimezone() if trial.datetime_complete else None,
    )
