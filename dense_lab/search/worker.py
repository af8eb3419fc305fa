"""A worker: a process that claims trials one after another, trains them, and tells Optuna what came of it."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dense_lab.ablation import cells
from dense_lab.errors import DenseLabError, MachineError
from dense_lab.files import FileLock, read_json, read_lines, write_json, write_text
from dense_lab.results import FINISHED, TRIAL_FILE, TRIALS, TrialView, read_trial
from dense_lab.search import ending, objectives
from dense_lab.search import ledger as book
from dense_lab.search.manifest import STUDY_JSON
from dense_lab.search.owner import this_process
from dense_lab.search.plan import Plan
from dense_lab.search.reuse import Shelf, fits, take

if TYPE_CHECKING:
    import optuna

    from dense_lab.ablation.cells import CellPlan
    from dense_lab.search.stopping import Stop
    from dense_lab.space import Parameter
    from dense_lab.study import RunSpec

Train = Callable[..., Any]
"""`train(spec, folder, *, device, threads, on_evaluation, should_stop)`, as in dense_lab.training."""
LEDGER_LOCK = "ledger.lock"
"""Held while a trial is claimed, so that the local processes of a study do that one at a time."""


@dataclass(frozen=True)
class Job:
    """What a worker is started with."""

    index: int
    folder: Path
    """Of the study, which is read from there."""
    plan: Plan | CellPlan
    url: str
    """Of Optuna's storage."""
    shared: bool
    """Whether other machines use the storage too."""
    device: str
    gpus: tuple[str, ...]
    """Those that may be used, as `CUDA_VISIBLE_DEVICES` names them; shared out among the workers."""
    threads: int
    plugin_files: tuple[Path, ...]
    directory: Path
    """Which relative paths start from."""
    environment: dict[str, str]
    train: Train | None
    """None for `dense_lab.training.train`."""
    reuse: tuple[Path, ...] = ()
    """Folders of other studies whose finished trials may be taken over."""
    sharing: int = 1
    """Workers that share a device: what they measure of speed is lower than one alone would."""


class Settled(Exception):
    """Ends a trial that has no value to tell: it failed, or it repeats one that is being trained."""


class Worker:
    """The loop of a worker."""

    def __init__(self, job: Job, stop: Stop) -> None:
        from dense_lab import registry
        from dense_lab.search.samplers import pruner
        from dense_lab.search.storage import load_study
        from dense_lab.space import Study

        self.job, self.stop = job, stop
        if job.plugin_files:
            registry.set_default(registry.load(job.plugin_files))
        self.registry = registry.default()
        self.space = Study.load(job.folder / STUDY_JSON, registry=self.registry)
        self.search = self.space.search
        self.lock = FileLock(job.folder / LEDGER_LOCK)
        self.study, storage = load_study(job.url, self.space.name)
        self.study.pruner = pruner(self.search)
        self.ledger = book.Ledger(self.study, storage, shared=job.shared)
        self.train = job.train or _trainer()
        self.shelf = Shelf(job.reuse)

    def run(self) -> None:
        """Train until there is nothing left to be started, or until asked to stop."""
        try:
            while not self.stop.requested and self._one():
                pass
        # Raised by a trial that was stopped; it has been recorded and is queued again by the parent.
        except KeyboardInterrupt:
            pass

    def _one(self) -> bool:
        from dense_lab.search.samplers import sampler

        # Held from looking for work until the trial is claimed and signed, see `_objective`.
        with self.lock:
            self.ledger.requeue()
            if not self.job.plan.may_start(self.ledger):
                return False
            self.study.sampler = sampler(self.search, len(self.ledger.trials()))
            self.study.optimize(self._objective, n_trials=1, catch=(Settled,))
        return True

    def _objective(self, trial: optuna.Trial) -> list[float]:
        root = int(trial.user_attrs.get("retry_of", trial.number))
        folder = self.job.folder / TRIALS / f"{root:04d}"
        cell = trial.user_attrs.get("cell", {})
        try:
            params, spec, problem = self._cell(cell) if cell else self._close(trial)
            copied = self._copy(trial, spec)
            if copied is not None:
                return copied
            self._sign(trial, root, folder, params, spec)
        finally:
            self.lock.release()
        if spec is None:
            raise self._failed(trial, folder, problem)
        values = {**self.space.leaves(spec, params), **params}
        write_json(folder / TRIAL_FILE, {**read_json(folder / TRIAL_FILE), "values": values})
        self._reuse(spec, folder)
        return self._trained(trial, spec, folder)

    def _close(self, trial: optuna.Trial) -> tuple[dict[str, Any], RunSpec | None, str]:
        """The sampled parameters and the spec they make; or no spec, and why."""

        def suggest(parameter: Parameter) -> Any:
            said = parameter.describe()
            if said["type"] == "choice":
                return trial.suggest_categorical(said["path"], said["labels"])
            if said["type"] == "int":
                return trial.suggest_int(said["path"], said["low"], said["high"], step=said["step"], log=said["log"])
            return trial.suggest_float(said["path"], said["low"], said["high"], log=said["log"])

        try:
            spec = self.space.close(suggest)
        # Valid options may still not go together: a width that the heads do not divide, a budget out of reach.
        except DenseLabError as error:
            return trial.params, None, str(error)
        return trial.params, spec, ""

    def _cell(self, cell: dict[str, Any]) -> tuple[dict[str, Any], RunSpec | None, str]:
        """The same of a cell of an ablation."""
        params = cells.params_of(cell)
        if "failed" in cell:
            return params, None, cell["failed"]
        try:
            return params, self.space.cell(cell["arm"], cell["seed"], cell["values"], cell["role"]), ""
        except DenseLabError as error:
            return params, None, str(error)

    def _copy(self, trial: optuna.Trial, spec: RunSpec | None) -> list[float] | None:
        """What is known of this spec already; None when the trial has to be trained."""
        import optuna

        if spec is None:
            return None
        digest = self._digest(spec)
        trials = self.ledger.trials()
        twin = book.twin(trials, digest, trials[trial.number])
        if twin is None:
            return None
        trial.set_user_attr("copy_of", book.root(twin))
        if twin.state is optuna.trial.TrialState.PRUNED:
            for step, value in twin.intermediate_values.items():
                trial.report(value, step)
            raise optuna.TrialPruned
        if twin.state is not optuna.trial.TrialState.COMPLETE:
            raise Settled
        return list(twin.values)

    def _digest(self, spec: RunSpec) -> str:
        from dense_lab.study import plugins_used

        return spec.digest(plugins_used(spec, self.registry))

    def _sign(self, trial: optuna.Trial, root: int, folder: Path, params: dict[str, Any], spec: RunSpec | None) -> None:
        """Say who runs the trial, in the ledger and in its folder, before anything else happens."""
        owner, digest = this_process(), self._digest(spec) if spec else ""
        trial.set_user_attr("claim", {"owner": owner, "digest": digest})
        said: dict[str, Any] = {
            "number": root,
            "attempt": trial.number,
            "params": params,
            "digest": digest,
            "owner": owner,
            # A trial that goes on after an interruption keeps its clock, which MLflow's timestamps are made of.
            "started": read_json(folder / TRIAL_FILE).get("started") or ending.now(),
            "tags": {"sharing": str(self.job.sharing)},
        }
        if cell := trial.user_attrs.get("cell"):
            said |= {"label": cell["arm"], "role": cell["role"], "tags": said["tags"] | cells.tags_of(cell)}
            said |= {"tuned": cell["tuned"]} if "tuned" in cell else {}
        write_json(folder / TRIAL_FILE, said)

    def _reuse(self, spec: RunSpec, folder: Path) -> None:
        """Take over what another study has trained of this very spec, if there is any."""
        said = read_json(folder / TRIAL_FILE)
        known = self.shelf.find(said["digest"], said.get("role", ""))
        # A trainer of the caller's own says itself what its data is.
        if known is not None and not ending.has_ended(folder) and (self.job.train or fits(known, spec)):
            origin = take(known, folder)
            began = {"started": known.started.isoformat()} if known.started else {}
            sharing = known.tags.get("sharing", "unknown")
            tags = {**said.get("tags", {}), "sharing": sharing, "reused_from": origin}
            write_json(folder / TRIAL_FILE, {**said, **began, "reused_from": origin, "tags": tags})

    def _trained(self, trial: optuna.Trial, spec: RunSpec, folder: Path) -> list[float]:
        import optuna

        # An earlier attempt may have been killed between the end of training and telling so.
        if not ending.has_ended(folder):
            try:
                with self.stop.interrupting():
                    self.train(
                        spec,
                        folder,
                        device=self.job.device,
                        threads=self.job.threads,
                        on_evaluation=self._judge(trial, folder),
                        should_stop=lambda: self.stop.requested,
                    )
            except KeyboardInterrupt:
                if not ending.has_ended(folder):
                    self._leave(trial, folder, "stopped by the user")
                    raise
            except MachineError as error:
                self._leave(trial, folder, str(error))
                raise
            # The isolation boundary: whatever a component does, the trial fails and the study goes on.
            except Exception as error:  # noqa: BLE001
                write_text(folder / "traceback.txt", traceback.format_exc())
                raise self._failed(trial, folder, ending.reason_of(error)) from None
        found = read_trial(folder)
        if found is None or found.state not in FINISHED:
            raise self._failed(trial, folder, "the trainer wrote no result.json")
        self._record(trial, found)
        if found.state == "pruned":
            raise optuna.TrialPruned
        if found.state == "failed":
            raise Settled
        try:
            return objectives.values(self.search, found.metrics)
        except DenseLabError as error:
            raise self._failed(trial, folder, str(error)) from None

    def _judge(self, trial: optuna.Trial, folder: Path) -> Callable[[Any], None]:
        """What is called at every evaluation: tells Optuna the objective so far, and raises Pruned on its advice."""
        from dense_lab.training import Pruned

        metric = self.search.objective[0].metric

        def judge(evaluation: Any) -> None:
            value = evaluation.metrics.get(metric)
            if len(self.search.objective) > 1 or value is None:
                return
            # Evaluations before an interruption count, so that rivals are compared at the same age.
            count = sum("valid/loss" in line for line in read_lines(folder / "metrics.jsonl"))
            with self.stop.deferring():
                trial.report(value, count)
                prune = trial.should_prune()
            if prune:
                raise Pruned(f"{self.search.pruner}: {metric} {value:.4g} at evaluation {count}")

        return judge

    def _record(self, trial: optuna.Trial, found: TrialView) -> None:
        # Other machines read these from the storage; the files of this folder they may never see.
        end = {"state": found.state, "reason": found.reason, "metrics": found.metrics, "tags": found.tags}
        trial.set_user_attr("end", end)

    def _failed(self, trial: optuna.Trial, folder: Path, reason: str) -> Settled:
        """Record a failure in the folder and in the ledger; the exception ends the trial."""
        ending.fail(folder, reason)
        found = read_trial(folder)
        if found is not None:
            self._record(trial, found)
        return Settled(reason)

    def _leave(self, trial: optuna.Trial, folder: Path, why: str) -> None:
        """Leave the trial to be run again, which is not held against it."""
        trial.set_user_attr("stopped", True)
        trial.set_user_attr("interrupted", why)
        ending.interrupt(folder, why)


def _trainer() -> Train:
    from dense_lab.training import train

    trainer: Train = train
    return trainer
