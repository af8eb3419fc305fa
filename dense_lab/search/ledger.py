"""What the trials in Optuna's storage mean to a search: which count, which were lost and run again, which are copies.

Optuna numbers every attempt. A trial keeps the number of its first attempt (its *root*) and that number's folder;
later attempts say `retry_of`. A point that was trained already is not trained again: the trial that proposed it is a
*copy*, is told the known value, and does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

from dense_lab.search.owner import liveness
from dense_lab.search.storage import GRACE

if TYPE_CHECKING:
    import optuna
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

Standing = Literal["waiting", "running", "finished", "lost", "copy"]
ATTEMPTS = 3
"""Deaths of its worker after which a trial is given up; being stopped by the user is no death."""


def root(trial: FrozenTrial) -> int:
    """The number under which the user knows the trial."""
    return int(trial.user_attrs.get("retry_of", trial.number))


def claim(trial: FrozenTrial) -> dict[str, Any]:
    """What the worker that took the attempt said of it: `owner` and `digest`; empty before that."""
    said: dict[str, Any] = trial.user_attrs.get("claim", {})
    return said


def end(trial: FrozenTrial) -> dict[str, Any]:
    """What the worker said when training had ended: `state`, `reason`, `metrics`, `tags`; empty before that."""
    said: dict[str, Any] = trial.user_attrs.get("end", {})
    return said


def cell(trial: FrozenTrial) -> dict[str, Any]:
    """Which cell of an ablation the trial is, see `dense_lab.ablation.cells`; empty in a search."""
    said: dict[str, Any] = trial.user_attrs.get("cell", {})
    return said


def deaths(trial: FrozenTrial) -> int:
    """How often the trial's worker has died, this attempt included if it failed without an outcome."""
    died = trial.state.name == "FAIL" and not trial.user_attrs.get("stopped")
    return int(trial.user_attrs.get("deaths", 0)) + died


def standing(trial: FrozenTrial) -> Standing:
    """What one attempt amounts to; `lost` is an attempt that ended without an outcome and has to be run again."""
    if "copy_of" in trial.user_attrs:
        return "copy"
    if trial.state.name in ("WAITING", "RUNNING"):
        return "waiting" if trial.state.name == "WAITING" else "running"
    settled = trial.state.name != "FAIL" or end(trial).get("state") == "failed" or deaths(trial) >= ATTEMPTS
    return "finished" if settled else "lost"


def latest(trials: Iterable[FrozenTrial]) -> dict[int, FrozenTrial]:
    """The last attempt of each trial by root, copies left out; `trials` are in the order of their numbers."""
    return {root(trial): trial for trial in trials if "copy_of" not in trial.user_attrs}


def started(trials: Iterable[FrozenTrial]) -> int:
    """Trials that are running or finished: what the total of a study counts."""
    return sum(standing(trial) in ("running", "finished") for trial in latest(trials).values())


def finished(trials: Iterable[FrozenTrial]) -> int:
    """Trials that nothing changes any more."""
    return sum(standing(trial) == "finished" for trial in latest(trials).values())


def twin(trials: Iterable[FrozenTrial], digest: str, own: FrozenTrial) -> FrozenTrial | None:
    """The trial that is training or has trained the spec of this digest already, in the same role; finished first."""
    same = [
        trial
        for number, trial in latest(trials).items()
        if claim(trial).get("digest") == digest and number != root(own) and standing(trial) in ("running", "finished")
        if (cell(trial).get("role"), cell(trial).get("arm")) == (cell(own).get("role"), cell(own).get("arm"))
    ]
    return min(same, key=lambda trial: (standing(trial) == "running", trial.number), default=None)


def copies_in_a_row(trials: list[FrozenTrial]) -> int:
    """How many of the last trials, counted from the end, were copies."""
    count = 0
    for trial in reversed(trials):
        if standing(trial) != "copy":
            break
        count += 1
    return count


def point(params: dict[str, Any]) -> frozenset[tuple[str, Any]]:
    """Sampled parameters as something that can be compared and kept in a set."""
    return frozenset(params.items())


def wanted(trial: FrozenTrial) -> dict[str, Any]:
    """The parameters a trial has, or is to have once it is claimed."""
    return {**trial.system_attrs.get("fixed_params", {}), **trial.params}


class Ledger:
    """A study in its storage. Changing methods are called with the folder's lock held, so none is done twice here."""

    def __init__(self, study: optuna.Study, storage: BaseStorage, *, shared: bool) -> None:
        self.study, self.storage = study, storage
        self.shared = shared
        """Whether other machines may work on the same study."""
        self._study_id = storage.get_study_id_from_name(study.study_name)

    def trials(self) -> list[FrozenTrial]:
        """All attempts by number."""
        return self.study.get_trials(deepcopy=False)

    def note(self, number: int, **attributes: Any) -> None:
        """Write user attributes of an attempt that is still running."""
        trial_id = self.storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        for key, value in attributes.items():
            self.storage.set_trial_user_attr(trial_id, key, value)

    def reap(self, why: Callable[[dict[str, Any]], dict[str, Any]], gave_up: Callable[[int, str], None]) -> list[int]:
        """Fail the running attempts whose process is gone; returns their roots.

        `why(owner)` gives attributes: `interrupted`, how the process ended, and `stopped` if it is not the trial's
        fault. `gave_up(root, reason)` is called for trials that are not to be run again.
        """
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        roots = []
        for trial in self.trials():
            owner = claim(trial).get("owner")
            if trial.state is not TrialState.RUNNING or not self._is_dead(trial, owner):
                continue
            said = why(owner or {})
            try:
                self.note(trial.number, **said)
                self.study.tell(trial.number, state=TrialState.FAIL)
            # It finished, or another machine has failed it, since the list was read.
            except (UpdateFinishedTrialError, ValueError):
                continue
            roots.append(root(trial))
            if not said.get("stopped") and int(trial.user_attrs.get("deaths", 0)) + 1 >= ATTEMPTS:
                gave_up(root(trial), f"{said['interrupted']}; given up after {ATTEMPTS} attempts")
        return roots

    def _is_dead(self, trial: FrozenTrial, owner: dict[str, Any] | None) -> bool:
        if owner is not None:
            # What ran on another machine is judged by its heartbeat, see `fail_silent`.
            return liveness(owner) == "dead"
        # Attempts are signed under the lock that the caller holds, so nobody here is about to sign this one.
        age = datetime.now() - (trial.datetime_start or datetime.min)
        return not self.shared or age > timedelta(seconds=GRACE)

    def fail_silent(self) -> None:
        """Fail the running attempts, of any machine, whose heartbeat has stopped."""
        import warnings

        import optuna

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(self.study)

    def requeue(self) -> list[int]:
        """Queue every lost trial again, with the same parameters; returns their roots."""
        lost = [trial for trial in latest(self.trials()).values() if standing(trial) == "lost"]
        for trial in lost:
            said = {"cell": cell(trial)} if cell(trial) else {}
            self.study.enqueue_trial(wanted(trial), {"retry_of": root(trial), "deaths": deaths(trial), **said})
        return [root(trial) for trial in lost]

    def enqueue_cell(self, said: dict[str, Any]) -> None:
        """Queue a cell of an ablation."""
        self.study.enqueue_trial({}, {"cell": said})

    def enqueue(self, points: Iterable[dict[str, Any]]) -> None:
        """Queue a trial at each point."""
        for params in points:
            self.study.enqueue_trial(params)
