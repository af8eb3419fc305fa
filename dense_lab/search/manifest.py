"""A study's folder: what is written when it is created, and whether a later search is still the same study."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dense_lab import __version__
from dense_lab.ablation import cells
from dense_lab.ablation.frozen import extended
from dense_lab.errors import InputError
from dense_lab.files import read_json, write_json, write_text
from dense_lab.loose import FILES
from dense_lab.search.plan import Plan
from dense_lab.urls import masked

if TYPE_CHECKING:
    from dense_lab.ablation.cells import CellPlan
    from dense_lab.space import Study
    from dense_lab.study import SearchSpec

MANIFEST, STUDY_JSON, STUDY_YAML = "manifest.json", "study.json", "study.yaml"
LISTED = 10_000
"""Points at most of a space that is handled as a list."""


def plan(study: Study, folder: Path, trials: int | None) -> Plan | CellPlan:
    """How many trials the study has in all, and its cells, or the points of its space if they can be listed.

    A grid has all its points unless fewer trials are asked for, which are then drawn by the study's seed.
    Raises InputError when a number of trials is asked for an ablation.
    """
    if study.ablation is not None:
        if trials is not None:
            raise InputError(f"--trials {trials}: an ablation trains every cell; `seeds` says how many there are")
        added = read_json(folder / MANIFEST).get("added", [])
        return cells.plan(study.ablation, [(arm, seed) for arm, seed in added])
    size, search = study.size(), study.search
    asked = trials or (None if search.sampler == "grid" and "trials" not in search.model_fields_set else search.trials)
    points = study.grid() if size is not None and size <= LISTED else None
    if points is not None and search.sampler == "grid" and asked is not None and asked < len(points):
        import random

        points = random.Random(search.seed).sample(points, asked)
    total = min(filter(None, (asked, size)))
    return Plan(total, search.sampler, tuple(points) if points is not None else None)


def write(study: Study, folder: Path, plan: Plan | CellPlan, *, storage: str | None, mlflow: str | None) -> None:
    """Create the study's folder, or bring what it says about resources up to date.

    Raises InputError when the folder holds a study whose trials would not be comparable with this one's.
    """
    old = read_json(folder / MANIFEST)
    if old:
        _check_storage(old, storage, folder)
        study.check_frozen(old)
    write_text(folder / STUDY_YAML, study.document.text)
    write_json(folder / STUDY_JSON, _study_json(study))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    resources = {
        "trials": plan.total,
        "sampler": _sampler(study.search),
        "pruner": study.search.pruner,
        "storage": masked(storage) if storage else None,
        "mlflow": mlflow,
        FILES: [str(file) for file in study.registry.files],
    }
    meant = study.freeze()
    frozen = {key: old[key] for key in old if key not in resources} or {
        "dense_lab": __version__,
        "created": now,
        **meant,
    }
    added = extended(frozen, meant) if study.ablation else {}
    write_json(folder / MANIFEST, {**frozen, **added, **resources})


def update(folder: Path, **values: Any) -> None:
    """Change some of what the manifest says."""
    write_json(folder / MANIFEST, {**read_json(folder / MANIFEST), **values})


def _check_storage(old: dict[str, Any], storage: str | None, folder: Path) -> None:
    before, now = old.get("storage"), masked(storage) if storage else None
    if before != now:
        raise InputError(
            f"{folder} keeps its trials in {before or 'optuna.db in the folder'}, not in {now or 'optuna.db there'}: "
            + (f"give --storage {before}" if before else "leave --storage out, or give the study a new name")
        )


def _study_json(study: Study) -> dict[str, Any]:
    """The open tree, itself a study that can be loaded; what readers want besides stands in notes."""
    return {
        **study.tree,
        "x-name": study.name,
        "x-digest": study.digest(),
        "x-search": study.search.model_dump(mode="json"),
        **({"x-ablation": study.ablation.as_json()} if study.ablation else {}),
    }


def _sampler(search: SearchSpec) -> dict[str, Any]:
    return {"name": search.sampler, "seed": search.seed}
