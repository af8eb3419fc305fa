"""MLflow as a projection of a study's files: experiment = study, parent run = study, one nested run for each trial.

What was sent is remembered beside the files (`mlflow.json`, by tracking URI), after it was sent. Sending twice changes
nothing, because every point's time comes from the trial's own clock and MLflow keeps one of two equal points.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dense_lab.errors import MachineError
from dense_lab.files import FileLock
from dense_lab.results import FINISHED, StudyResults, TrialView, read_study
from dense_lab.tracking import record as records
from dense_lab.tracking.place import MEMORY, Memory, choose_uri, default_uri, open_client, place_of, probe
from dense_lab.urls import masked

if TYPE_CHECKING:
    from mlflow.entities import Run

Item = TypeVar("Item")
LOCK = "mlflow.lock"
"""Held, in the study's folder, by the process that is sending."""
KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Tag by which MLflow's pages open an experiment as one of training, not of language-model applications."""
_METRICS, _PARAMS = 1000, 100
"""MLflow's limits for one batch."""


class Projection:
    """Sends what MLflow is missing of a study. Raises whatever MLflow raises; sending can be taken up again."""

    def __init__(self, folder: Path, uri: str | None = None) -> None:
        self.folder, self.uri = folder, uri or default_uri(folder)
        self.place = place_of(folder, self.uri)
        self.client = open_client(self.uri)
        self.counts = Sent()

    def send(self, study: StudyResults) -> None:
        """One pass over the study and its trials."""
        probe(self.uri)
        memory = Memory(self.folder / MEMORY, self.place)
        experiment = self._experiment(study, memory)
        parent = self._run(
            memory, experiment, {"study_digest": study.digest, "role": "study"}, study.name, _first(study)
        )
        for trial in study.trials:
            if trial.folder is not None:
                self._send_trial(study, trial, experiment, parent)
        self._send_study(study, parent, memory)

    def check(self, study: StudyResults) -> None:
        """Compare what MLflow has with the files, and forget what it has lost, so that it is sent again."""
        for folder in [self.folder, *(t.folder for t in study.trials if t.folder)]:
            memory = Memory(folder / MEMORY, self.place)
            if memory.sent and not self._is_kept(folder, memory):
                memory.forget()

    def _is_kept(self, folder: Path, memory: Memory) -> bool:
        run = self._find(memory.sent.get("run_id", ""))
        if run is None or run.info.lifecycle_stage != "active":
            return False
        lines = memory.sent.get("lines", 0)
        if folder == self.folder or not lines:
            return True
        return int(lines) == len(self.client.get_metric_history(run.info.run_id, "tokens"))

    def _find(self, run_id: str) -> Run | None:
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_run(run_id) if run_id else None
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return None

    def _experiment(self, study: StudyResults, memory: Memory) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(study.name)
        if found is None:
            # Beside the database in the study's folder; elsewhere the server knows where its artifacts go.
            home = (self.folder.resolve() / "artifacts").as_uri() if self.uri == default_uri(self.folder) else None
            try:
                made = self.client.create_experiment(study.name, artifact_location=home, tags=KIND)
                return str(made)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self.client.get_experiment_by_name(study.name)
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            self.client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _run(self, memory: Memory, experiment: str, key: dict[str, str], name: str, started: int) -> str:
        """The run remembered, else the one that has the tags `key`, else a new one with these tags."""
        if memory.sent.get("run_id"):
            return str(memory.sent["run_id"])
        wanted = " and ".join(f"tags.{tag} = '{value}'" for tag, value in key.items())
        found = self.client.search_runs([experiment], wanted, max_results=1)
        if found:
            run_id = found[0].info.run_id
        else:
            run_id = self.client.create_run(experiment, start_time=started, tags=key, run_name=name).info.run_id
            self.counts["runs"] += 1
        memory.update(run_id=run_id)
        return str(run_id)

    def _send_trial(self, study: StudyResults, trial: TrialView, experiment: str, parent: str) -> None:
        assert trial.folder is not None
        memory = Memory(trial.folder / MEMORY, self.place)
        if memory.sent.get("done"):
            return
        text = _whole_lines(trial.folder / "metrics.jsonl")
        if _digest(text[: memory.sent.get("bytes", 0)]) != memory.sent.get("prefix", _digest(b"")):
            # Training went back to a checkpoint and wrote other lines; MLflow cannot take points back, only runs.
            self.client.delete_run(memory.sent["run_id"])
            memory.forget()
        key = {"study_digest": study.digest, "trial": str(trial.number), "mlflow.parentRunId": parent}
        run_id = self._run(memory, experiment, key, records.name(trial), records.milliseconds(trial.started))
        self._send_said(study, trial, run_id, memory)
        self._send_curve(trial, text, run_id, memory)
        self._send_artifacts(run_id, records.artifacts(trial.folder), memory)
        if trial.state in FINISHED:
            self._log(run_id, records.final_points(trial))
            memory.update(done=True)

    def _send_said(self, study: StudyResults, trial: TrialView, run_id: str, memory: Memory) -> None:
        from mlflow.entities import Param, RunTag

        params, tags, status = records.params(trial), records.tags(study, trial), records.status(trial)
        said = _digest(json.dumps([params, tags, status], sort_keys=True).encode())
        if memory.sent.get("said") == said:
            return
        for some in _batches(list(params.items()), _PARAMS):
            self.client.log_batch(run_id, params=[Param(key, value) for key, value in some])
        self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        if status.ended:
            self.client.set_terminated(run_id, status.name, status.ended)
        else:
            self.client.update_run(run_id, status.name)
        memory.update(said=said)

    def _send_curve(self, trial: TrialView, text: bytes, run_id: str, memory: Memory) -> None:
        start = memory.sent.get("bytes", 0)
        lines = [json.loads(line) for line in text[start:].splitlines()]
        if not lines:
            return
        self._log(run_id, records.points(trial, lines))
        memory.update(bytes=len(text), prefix=_digest(text), lines=memory.sent.get("lines", 0) + len(lines))

    def _log(self, run_id: str, points: Sequence[records.Point]) -> None:
        from mlflow.entities import Metric

        for some in _batches(points, _METRICS):
            self.client.log_batch(run_id, metrics=[Metric(*point) for point in some])
        self.counts["points"] += len(points)

    def _send_artifacts(self, run_id: str, files: Iterable[Path], memory: Memory) -> None:
        sent = dict(memory.sent.get("artifacts", {}))
        for file in files:
            now = _digest(file.read_bytes())
            if sent.get(file.name) != now:
                self.client.log_artifact(run_id, str(file))
                sent[file.name] = now
                self.counts["files"] += 1
        if sent != memory.sent.get("artifacts", {}):
            memory.update(artifacts=sent)

    def _send_study(self, study: StudyResults, parent: str, memory: Memory) -> None:
        from mlflow.entities import RunTag

        tags = records.study_tags(study)
        said = _digest(json.dumps([tags, study.complete], sort_keys=True).encode())
        if memory.sent.get("said") != said:
            self.client.log_batch(parent, tags=[RunTag(key, value) for key, value in tags.items()])
            self._log(parent, records.study_points(study))
            ended = max((records.milliseconds(trial.ended) for trial in study.trials), default=0)
            if study.complete:
                self.client.set_terminated(parent, "FINISHED", ended or None)
            else:
                self.client.update_run(parent, "RUNNING")
            memory.update(said=said)
        report = sorted(path for path in (self.folder / "report").rglob("*") if path.is_file())
        self._send_artifacts(parent, [self.folder / "study.yaml", self.folder / "study.json", *report], memory)


class Sent(Counter[str]):
    """How many runs, points and files were sent; as text, a sentence."""

    def __str__(self) -> str:
        said = ", ".join(f"{count} {what}" for what, count in self.items() if count)
        return f"sent to MLflow: {said}" if said else "MLflow has everything"


def sync(folder: Path, uri: str | None = None) -> Sent:
    """Send all that MLflow is missing of the study in `folder`; returns how much that was.

    Raises InputError when there is no study, MachineError when MLflow cannot be reached or a search is sending too.
    """
    study = read_study(folder)
    uri = choose_uri(folder, uri)
    lock = FileLock(folder / LOCK)
    if not lock.acquire(wait=False):
        raise MachineError(
            f"{folder}: another process is sending this study to MLflow just now; try again when it is done"
        )
    try:
        projection = Projection(folder, uri)
        projection.check(study)
        projection.send(study)
        return projection.counts
    # MLflow raises its own errors, SQLAlchemy's, requests' and sqlite3's; for the user it is one thing: not reached.
    except Exception as error:
        raise MachineError(f"MLflow at {masked(uri)}: {' '.join(str(error).split())[:300]}") from error
    finally:
        lock.release()


def _first(study: StudyResults) -> int:
    return min((records.milliseconds(trial.started) for trial in study.trials if trial.started), default=0)


def _whole_lines(path: Path) -> bytes:
    text = path.read_bytes() if path.is_file() else b""
    return text[: text.rfind(b"\n") + 1]


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]


def _batches(items: Sequence[Item], size: int) -> Iterable[Sequence[Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))
