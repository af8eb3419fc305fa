"""A study: what its YAML and `--set` say, checked at once, with its open values as parameters to be searched over."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dense_lab import registry as registries
from dense_lab import space_check
from dense_lab import space_frozen as frozen
from dense_lab import space_tree as trees
from dense_lab.ablation import arms
from dense_lab.ablation import frozen as arm_meanings
from dense_lab.ablation.arms import Ablation, Arm
from dense_lab.errors import InputError, Problem
from dense_lab.registry import Registry
from dense_lab.space_parse import open_tree
from dense_lab.space_problems import problems
from dense_lab.space_set import Draft
from dense_lab.space_tree import Choice, Float, Int, Origins, Parameter, Point, Table
from dense_lab.study import GRAMMAR, BudgetSpec, RunSpec, SearchSpec, StudySpec, plugins_used
from dense_lab.yaml_file import Document, load

__all__ = ["Choice", "Float", "Int", "Parameter", "Point", "Study"]

DEEPEST = 1000
"""Blocks of a model; more is a slip."""
_FEW = 64
"""Up to this many points, each of them is looked at before anything runs."""


@dataclass(frozen=True)
class Study:
    """A study that is valid: every option of every choice and both ends of every range were checked."""

    name: str
    tree: dict[str, Any]
    """Plain values after `--set` and presets, open values still open, notes (`x-` keys) included."""
    search: SearchSpec
    budget: BudgetSpec | None
    document: Document
    """The file as it was read; its text is empty when there was none."""
    registry: Registry
    root: Table
    """The open tree."""
    ablation: Ablation | None = None
    """Its arms, if it compares some; nothing is searched over then."""

    @classmethod
    def load(
        cls,
        path: Path | None,
        overrides: Iterable[tuple[str, str]] = (),
        registry: Registry | None = None,
    ) -> Study:
        """The study of a file, or of the defaults alone, with `--set` overrides (dotted path, YAML text) applied.

        Raises InputError that holds every problem found, each with its place.
        """
        registry = registry or registries.default()
        document = load(path) if path is not None else Document("defaults", {"dense_lab": GRAMMAR, "name": "run"})
        draft = Draft(document, registry)
        draft.apply(list(overrides))
        _check_version(draft)
        draft.tree.setdefault("name", path.stem if path is not None else "run")
        root = open_tree(draft.tree, draft, registry)
        study = cls("", draft.tree, SearchSpec(), None, document, registry, root)
        return arms.expanded(study, draft) if arms.wanted(draft.tree) else study._checked()

    def _checked(self) -> Study:
        """This study with what does not vary filled in; raises InputError with every problem of every closing."""
        found: dict[Problem, None] = {}
        spec = None
        for point in trees.cover(self.root):
            origins: Origins = {}
            closed = trees.close(self.root, _lookup(point), origins)
            try:
                spec = self._validated(closed, origins)
            except InputError as error:
                found |= dict.fromkeys(error.problems)
        if found or spec is None:
            raise InputError(sorted(found, key=_line))
        study = replace(self, name=spec.name, search=spec.search, budget=spec.budget)
        if spec.search.sampler == "grid" and study.space:
            study.grid()
        return study

    def validated(self, params: Mapping[str, Any]) -> StudySpec:
        """What the study says at a point, before any budget is solved; raises InputError with every problem."""
        origins: Origins = {}
        return self._validated(trees.close(self.root, _lookup(params), origins), origins)

    def _validated(self, closed: Any, origins: Origins) -> StudySpec:
        try:
            spec = StudySpec.model_validate(closed, context={"registry": self.registry})
        except ValidationError as error:
            raise InputError(problems(error, closed, origins, self.registry)) from None
        space_check.check(spec, origins, self.registry)
        return spec

    @property
    def space(self) -> list[Parameter]:
        """Every parameter, conditional ones included; empty for a single run and for an ablation."""
        return [] if self.ablation else trees.parameters(self.root)

    def arms(self) -> list[Arm]:
        """The architectures that an ablation compares, in the order of the file; empty for other studies."""
        return list(self.ablation.arms) if self.ablation else []

    def cell(self, arm: str, seed: int, values: Mapping[str, float] | None = None, role: str = "cell") -> RunSpec:
        """See `Ablation.cell`."""
        if self.ablation is None:
            raise InputError(f"study {self.name!r} has no arms")
        return self.ablation.cell(arm, seed, values or {}, role)

    def size(self) -> int | None:
        """Number of points, or None when there are infinitely many; cells of an ablation."""
        if self.ablation:
            return len(self.ablation.arms) * len(self.ablation.spec.seeds)
        return trees.size(self.root)

    def grid(self) -> list[Point]:
        """Every point, in a fixed order; raises InputError when they cannot be listed."""
        try:
            return trees.grid(self.root)
        except InputError as error:
            place = self._place("search.sampler")
            raise InputError(Problem(error.problems[0].message, "search.sampler", place)) from None

    def covering(self) -> list[Point]:
        """Few points that between them meet every option of every choice and both ends of every range, or every arm."""
        if self.ablation:
            return [{"arm": arm.name, "seed": self.ablation.spec.seeds[0]} for arm in self.ablation.arms]
        return trees.cover(self.root)

    def points(self) -> list[Point]:
        """Every point if there are few, otherwise those of `covering`."""
        size = self.size()
        return self.grid() if not self.ablation and size is not None and size <= _FEW else self.covering()

    def close(self, suggest: Callable[[Parameter], Any]) -> RunSpec:
        """The run whose open values `suggest` decides: a label of a Choice, a number within a range.

        With a budget the width is solved here. Raises InputError when a value is not on offer, or when no width fits.
        """
        origins: Origins = {}
        closed = trees.close(self.root, suggest, origins)
        return self.solved(self._validated(closed, origins).run())

    def solved(self, run: RunSpec) -> RunSpec:
        """`run`, a point of this study, with the budget solved; raises InputError when no width fits."""
        if self.budget is None:
            return run
        from dense_lab import budget

        try:
            return budget.solve(run, self.budget)
        except InputError as error:
            place = self._place("budget")
            raise InputError(replace(p, path=p.path or "budget", where=place) for p in error.problems) from None

    def point(self, params: Mapping[str, Any]) -> RunSpec:
        """The run at a point, such as the stored parameters of a trial; raises InputError when it is none of ours."""
        if self.ablation and "arm" in params:
            return self.cell(params["arm"], params["seed"])
        asked = set()

        def pick(parameter: Parameter) -> Any:
            asked.add(parameter.path)
            return _lookup(params)(parameter)

        run = self.close(pick)
        if unknown := sorted(params.keys() - asked):
            raise InputError(f"study {self.name!r} has no open value {unknown[0]} at this point")
        return run

    def leaves(self, run: RunSpec, params: Mapping[str, Any]) -> dict[str, Any]:
        """Every single value of `run`, the one at `params`, by dotted path: what `--set` takes and MLflow shows."""
        if self.ablation:
            return frozen.plain(run.model_dump(mode="json"))
        return frozen.by_path(run.model_dump(mode="json"), self.origins(params))

    def origins(self, params: Mapping[str, Any]) -> Origins:
        """What every value at a point was written as, and where, by keys and indices."""
        found: Origins = {}
        trees.close(self.root, _lookup(params), found)
        return found

    def check_sizes(self) -> None:
        """Build the architectures on the meta device, all if there are few; raises InputError when sizes clash."""
        from dense_lab.counting import check_sizes

        found: dict[str, Problem] = {}
        seen = set()
        for point in self.points():
            try:
                model = self.point(point).model
                if (text := model.model_dump_json()) in seen:
                    continue
                seen.add(text)
                depth = sum(block.repeat for block in model.blocks) if model.blocks else model.depth
                if depth > DEEPEST:
                    raise InputError(f"a model has at most {DEEPEST} blocks, got {depth}")
                check_sizes(model)
            except InputError as error:
                named = [path for path in point if path.startswith(("model", "arm"))]
                chosen = ", ".join(f"{path}={point[path]}" for path in named)
                for p in error.problems:
                    text = f"{p.message} (at {chosen})" if chosen else p.message
                    where = p.where or self._place(p.path or "model")
                    found.setdefault(p.message, Problem(text, p.path or "model", where))
        if found:
            raise InputError(found.values())

    def resolved(self) -> dict[str, Any]:
        """What the study means, defaults written out, as JSON: parameters, fixed values, search, budget, plugins."""
        if self.ablation:
            return {"grammar": GRAMMAR, "parameters": []} | arm_meanings.resolved(self.ablation, self.registry)
        found: list[dict[str, Any]] = []
        plugins: dict[str, str] = {}
        for point in self.covering():
            origins: Origins = {}
            run = self._validated(trees.close(self.root, _lookup(point), origins), origins).run()
            found.append(frozen.by_path(run.model_dump(mode="json"), origins))
            plugins |= plugins_used(run, self.registry)
        decided = {"dense_lab", *(p.path for p in self.space)}
        decided |= {"model.width"} if self.budget and "width" in self.budget.solve else set()
        return {
            "grammar": GRAMMAR,
            "parameters": [parameter.describe() for parameter in self.space],
            "fixed": frozen.merged(found, decided),
            "search": self.search.model_dump(mode="json"),
            "budget": self.budget.model_dump(mode="json") if self.budget else {},
            "plugins": plugins,
        }

    def digest(self) -> str:
        """First 12 hex digits of the sha256 over what the study means; its name and resources are left out."""
        return _digest(self.resolved())

    def freeze(self) -> dict[str, Any]:
        """What is kept of a study when it is created, for `check_frozen`: a JSON mapping."""
        resolved = self.resolved()
        objective = self.search.model_dump(mode="json")["objective"]
        return {**resolved, "name": self.name, "objective": objective, "digest": _digest(resolved)}

    def check_frozen(self, manifest: Mapping[str, Any]) -> None:
        """Raise InputError when trials of this study and of the one that `freeze` described would not be alike.

        The number of trials, the sampler, its seed and the pruner may change; arms and seeds may be added.
        """
        now = self.freeze()
        found = frozen.differences(manifest, now, self.name) + arm_meanings.differences(manifest, now, self.name)
        if found:
            raise InputError(replace(p, where=self._place(p.path)) for p in found)

    def _place(self, path: str) -> str:
        """Place of what has the dotted path `path`, or of the nearest thing above it."""
        nodes = {node.path: node for node in trees.walk(self.root)}
        while path and path not in nodes:
            path = path.rpartition(".")[0]
        return nodes[path].where if path in nodes else self.root.where


def _digest(resolved: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()[:12]


def _line(problem: Problem) -> list[int]:
    """Line and column, so that problems come in the order of the file."""
    return [int(word) for word in problem.where.split(":")[-2:] if word.isdecimal()]


def _lookup(params: Mapping[str, Any]) -> Callable[[Parameter], Any]:
    def pick(parameter: Parameter) -> Any:
        if parameter.path not in params:
            raise InputError(f"the open value {parameter.path} is not given: it is one of {parameter.describe()}")
        return params[parameter.path]

    return pick


def _check_version(draft: Draft) -> None:
    """Raise InputError unless the study says which grammar it is written in, and it is this one."""
    if "dense_lab" not in draft.tree:
        message = f"the key `dense_lab` is missing: write `dense_lab: {GRAMMAR}`, the version of the grammar"
        raise InputError(Problem(message, "dense_lab", draft.where(())))
    version = draft.tree["dense_lab"]
    if version != GRAMMAR or isinstance(version, bool):
        message = f"this release reads grammar {GRAMMAR}, got {version!r}: write `dense_lab: {GRAMMAR}`"
        raise InputError(Problem(message, "dense_lab", draft.where(("dense_lab",))))
