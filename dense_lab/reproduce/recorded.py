"""What is to be reproduced: the stored runs, chosen by arm and seed, and the study that trains them again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dense_lab.errors import InputError, did_you_mean
from dense_lab.files import read_json
from dense_lab.loose import missing
from dense_lab.registry import Registry
from dense_lab.results import TRIALS, StudyResults, TrialView, read_study, read_trial
from dense_lab.runs import SINGLE
from dense_lab.study import RunSpec

SPEC_NOTES = ("digest", "plugins")
"""Keys of spec.json that are not the spec's."""


@dataclass(frozen=True)
class Recorded:
    """Finished runs, by arm and seed."""

    name: str
    """Of the study, or of the run's folder."""
    folder: Path
    """Of the study; of a run that belongs to none, its own."""
    key: str
    """Names the selection: `all`, `trial-0003`, or a digest."""
    metric: str
    """What is compared."""
    alpha: float
    baseline: str
    """The first arm where there is no baseline among those chosen."""
    chosen: dict[str, dict[int, TrialView]]
    """What is trained again."""
    known: dict[str, dict[int, TrialView]]
    """Everything that is recorded of these arms: whence their spread."""
    left_out: tuple[str, ...]
    """Sentences about recorded runs that are not trained again."""

    @property
    def trials(self) -> list[TrialView]:
        """Those that are trained again."""
        return [trial for cells in self.chosen.values() for trial in cells.values()]

    def tree(self, registry: Registry) -> dict[str, Any]:
        """A study of these arms and seeds, every value written out; raises InputError for a spec of another release."""
        arms = {}
        for arm, cells in self.chosen.items():
            spec = stored_spec(next(iter(cells.values())), registry).model_dump(mode="json")
            sections = {f"{key}.{name}": value for key in ("model", "train") for name, value in spec[key].items()}
            kernels = {"kernels": spec["kernels"]} if spec["kernels"] else {}
            arms[arm] = {"data": spec["data"], **sections, **kernels}
        seeds = list(next(iter(self.chosen.values())))
        analysis = {"metric": self.metric, "alpha": self.alpha}
        name = "".join(one if one.isalnum() or one in "._-" else "-" for one in self.name).lstrip("._-")
        named = {"dense_lab": 1, "name": f"{name or 'run'}-again", "arms": arms, "baseline": self.baseline}
        return {**named, "seeds": seeds, "analysis": analysis}


def stored_spec(trial: TrialView, registry: Registry) -> RunSpec:
    """The spec of a finished run; raises InputError when this release cannot read it."""
    stored = {key: value for key, value in trial.spec.items() if key not in SPEC_NOTES}
    try:
        return RunSpec.model_validate(stored, context={"registry": registry})
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(map(str, first["loc"]))
        plugins = ", ".join(f"{name} {version}" for name, version in trial.spec.get("plugins", {}).items())
        study = (trial.folder.parent.parent,) if trial.folder and trial.folder.parent.name == TRIALS else ()
        hint = missing(registry, *study, *filter(None, [trial.folder]))
        raise InputError(
            f"{trial.folder}/spec.json: {path}: {first['msg']}. It was written with {plugins}"
            + (f". {hint}" if hint else ": install these versions")
        ) from None


def recorded(folder: Path, arms: Collection[str] = (), seeds: Collection[int] = ()) -> Recorded:
    """What is recorded in the folder of a study, of one of its trials, or of a single run.

    `arms` and `seeds` choose from a study; by default all. Raises InputError when there is nothing to train again.
    """
    folder = folder.resolve()
    if (folder / "study.json").exists():
        return _of_study(read_study(folder), arms, seeds)
    if not (folder / "spec.json").exists():
        raise InputError(f"{folder}: no study and no run here (no study.json, no spec.json)")
    if arms or seeds:
        raise InputError(f"{folder} is a single run: --arms and --seeds choose from a study")
    trial = _run(folder)
    if trial.state != "complete":
        raise InputError(f"{folder}: this run is {trial.state}, so there is nothing to compare with. {trial.reason}")
    if folder.parent.name == TRIALS and (folder.parent.parent / "study.json").exists():
        return _of_trial(read_study(folder.parent.parent), trial)
    metric = "test/loss" if "test/loss" in trial.metrics else "valid/loss"
    cells = {"run": {int(trial.spec["seed"]): trial}}
    name = folder.parent.name if folder.name == SINGLE else folder.name
    return Recorded(name, folder, "all", metric, 0.05, "run", cells, cells, ())


def _run(folder: Path) -> TrialView:
    """The run in a folder that need not be called by a number."""
    from dataclasses import replace

    if folder.name.isdigit() and (found := read_trial(folder)):
        return found
    result = read_json(folder / "result.json")
    state = result.get("status", "interrupted")
    trial = TrialView(0, state, {}, result.get("metrics", {}), result.get("tags", {}), "", {}, folder)
    return replace(trial, reason=result.get("reason", ""))


def _of_trial(results: StudyResults, trial: TrialView) -> Recorded:
    known, metric, alpha, _ = _known(results)
    if trial.role == "tune" or metric not in trial.metrics:
        known, metric = {}, "valid/loss"
    arm, seed = _arm(trial), int(trial.spec["seed"])
    mine = {arm: known.get(arm, {seed: trial})}
    key = f"trial-{trial.number:04d}"
    return Recorded(results.name, results.folder, key, metric, alpha, arm, {arm: {seed: trial}}, mine, ())


def _of_study(results: StudyResults, arms: Collection[str], seeds: Collection[int]) -> Recorded:
    known, metric, alpha, baseline = _known(results)
    if unknown := [arm for arm in arms if arm not in known]:
        near = did_you_mean(unknown[0], known)
        raise InputError(
            f"{results.name} has no complete cell of an arm {unknown[0]!r}.{near} Arms: {', '.join(known)}"
        )
    names = [arm for arm in known if known[arm] and (not arms or arm in arms)]
    every = sorted({seed for arm in names for seed in known[arm]})
    shared = [seed for seed in every if all(seed in known[arm] for arm in names)]
    wanted = [seed for seed in shared if not seeds or seed in seeds]
    if not names or not wanted or set(seeds) - set(shared):
        raise InputError(
            f"{results.name}: no such cells to train again. Seeds that all of these arms have completed: "
            f"{', '.join(map(str, shared)) or 'none'}; arms: {', '.join(names) or 'none'}"
        )
    left = [seed for seed in every if seed not in shared and not seeds]
    left_out = [f"not trained again, since not every arm has completed them: seeds {', '.join(map(str, left))}"]
    chosen = {arm: {seed: known[arm][seed] for seed in wanted} for arm in names}
    whole = not arms and not seeds
    key = "all" if whole else hashlib.sha256(json.dumps([names, wanted]).encode()).hexdigest()[:8]
    base = baseline if baseline in names else names[0]
    mine = {arm: known[arm] for arm in names}
    return Recorded(
        results.name, results.folder, key, metric, alpha, base, chosen, mine, tuple(left_out if left else ())
    )


def _known(results: StudyResults) -> tuple[dict[str, dict[int, TrialView]], str, float, str]:
    """Complete cells by arm and seed, the metric, alpha and the baseline; of a search every trial is an arm."""
    ablation = results.ablation
    metric = ablation.analysis.metric if ablation else results.goals[0].metric
    found: dict[str, dict[int, TrialView]] = {}
    for trial in results.having("complete"):
        if trial.folder is not None and trial.spec and trial.role != "tune" and metric in trial.metrics:
            found.setdefault(_arm(trial), {})[int(trial.spec["seed"])] = trial
    alpha = ablation.analysis.alpha if ablation else 0.05
    return {arm: dict(sorted(cells.items())) for arm, cells in found.items()}, metric, alpha, _base(results, found)


def _base(results: StudyResults, found: dict[str, Any]) -> str:
    return results.ablation.baseline if results.ablation else next(iter(found), "")


def _arm(trial: TrialView) -> str:
    return trial.label or f"trial {trial.number}"
