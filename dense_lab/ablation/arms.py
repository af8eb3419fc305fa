"""Arms: from what a study says of an ablation to named, closed studies, all checked before anything runs."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from dense_lab.ablation import factors
from dense_lab.ablation.spec import KEYS, AblationSpec, TuneSpec
from dense_lab.errors import InputError, Problem, did_you_mean
from dense_lab.metric_names import direction
from dense_lab.space_frozen import plain
from dense_lab.space_parse import open_tree
from dense_lab.space_problems import problems
from dense_lab.space_tree import Origins, Point, Table, close

if TYPE_CHECKING:
    from dense_lab.space import Study
    from dense_lab.space_set import Draft
    from dense_lab.study import RunSpec, StudySpec

SECTIONS = ("model", "train", "budget", "kernels")
"""Keys of a study below which an arm's nested mapping means the same as dotted paths."""
SET_ELSEWHERE = {
    "seed": "the seeds of all arms are those of `seeds`",
    "search": "an ablation has no search",
    "dense_lab": "it is the grammar's version",
    "name": "it is the study's",
} | dict.fromkeys(KEYS, "it is the same for all arms")
"""What an arm cannot change, and why."""


@dataclass(frozen=True)
class Arm:
    """One architecture of an ablation."""

    name: str
    study: Study
    """The study that the arm is a point of: closed by the arm's overrides, or that of `ablate`."""
    point: Point
    """The point of it, empty for one that is closed."""
    overrides: dict[str, Any]
    """What the arm changes, by dotted path, values as in the file; for `ablate`, the point."""
    spec: StudySpec
    """What it means, before any budget is solved."""
    where: str
    """`file:line:column` of its name."""

    @functools.cached_property
    def run(self) -> RunSpec:
        """The arm's run at the study's own seed, with the budget solved; raises InputError when nothing fits."""
        try:
            return self.study.solved(self.spec.run())
        except InputError as error:
            raise InputError(replace(p, message=f"arm {self.name!r}: {p.message}") for p in error.problems) from None

    @functools.cached_property
    def leaves(self) -> dict[str, Any]:
        """Every single value of the arm, by dotted path, what a budget decides as it is before that."""
        return plain(self.spec.run().model_dump(mode="json"))


@dataclass(frozen=True)
class Ablation:
    """What a study with arms says."""

    spec: AblationSpec
    arms: tuple[Arm, ...]
    baseline: str

    @property
    def tune(self) -> TuneSpec | None:
        """The grid that every arm is tuned on."""
        return self.spec.tune

    @functools.cached_property
    def by_name(self) -> dict[str, Arm]:
        """The arms by name."""
        return {arm.name: arm for arm in self.arms}

    def arm(self, name: str) -> Arm:
        """The arm of a name; raises InputError when there is none."""
        if name not in self.by_name:
            raise InputError(f"no arm named {name!r}.{did_you_mean(name, self.by_name)}")
        return self.by_name[name]

    def cell(self, arm: str, seed: int, values: Mapping[str, float], role: str) -> RunSpec:
        """The run of one arm with one seed, its budget solved; `values` are tuned ones, such as `train.lr`.

        In the role `tune` it is as long as tuning runs are, and is not tested: nothing is selected on the test split.
        Raises InputError for an arm that is none, and when nothing meets the budget.
        """
        run = self.arm(arm).run
        changed: dict[str, Any] = {path.removeprefix("train."): value for path, value in values.items()}
        if role == "tune" and self.tune:
            changed |= {"tokens": self.tune.tokens or run.train.tokens, "test_tokens": 0, "checkpoints": 0}
        train = type(run.train).model_validate(run.train.model_dump() | changed)
        return run.model_copy(update={"seed": seed, "train": train})

    @property
    def metric(self) -> str:
        """The metric that arms are compared by."""
        tested = all(arm.spec.train.test_tokens for arm in self.arms)
        return self.spec.analysis.metric or ("test/loss" if tested else "valid/loss")

    def analysis(self) -> dict[str, Any]:
        """How arms are compared, as JSON, with the metric and its direction decided."""
        decided = {"metric": self.metric, "direction": direction(self.metric)}
        return self.spec.analysis.model_dump(mode="json") | decided

    def as_json(self) -> dict[str, Any]:
        """What is stored of it for readers, see `dense_lab.ablation.results`."""
        return {
            "baseline": self.baseline,
            "arms": {arm.name: arm.overrides for arm in self.arms},
            "seeds": list(self.spec.seeds),
            "analysis": self.analysis(),
            "tune": self.tune.model_dump(mode="json") if self.tune else None,
        }


def wanted(tree: Mapping[str, Any]) -> bool:
    """Whether a study's plain tree is that of an ablation."""
    return not tree.keys().isdisjoint(KEYS)


def expanded(study: Study, draft: Draft) -> Study:
    """`study`, not checked yet, with its arms; raises InputError with every problem of every arm."""
    spec = _spec(study)
    _check_keys(study, draft, spec)
    arms = _ablated(study, spec) if spec.ablate else _overridden(study, draft, spec)
    _check_different(arms)
    baseline = spec.baseline if spec.baseline is not None else arms[0].name
    first = arms[0].spec
    found = Ablation(spec, tuple(arms), baseline)
    return replace(study, name=first.name, search=_search(found), budget=first.budget, ablation=found)


def _search(ablation: Ablation) -> Any:
    """What displays go by: the validation's curve of what arms are compared by."""
    from dense_lab.study import SearchSpec

    metric = "valid/accuracy" if ablation.metric.endswith("/accuracy") else "valid/loss"
    cells = len(ablation.arms) * len(ablation.spec.seeds)
    return SearchSpec.model_validate(
        {"sampler": "grid", "trials": cells, "objective": {direction(metric): metric}, "seed": 0}
    )


def _spec(study: Study) -> AblationSpec:
    root = replace(study.root, items={key: node for key, node in study.root.items.items() if key in KEYS})
    origins: Origins = {}
    closed = close(root, _never, origins)
    try:
        return AblationSpec.model_validate(closed)
    except ValidationError as error:
        raise InputError(problems(error, closed, origins, study.registry)) from None


def _never(parameter: Any) -> Any:
    raise InputError(f"{parameter.path} is open")


def _check_keys(study: Study, draft: Draft, spec: AblationSpec) -> None:
    """Raise InputError for keys that do not go together."""

    def said(key: str, message: str) -> Problem:
        return Problem(message, key, draft.key((key,)))

    found = []
    if not spec.arms and spec.ablate is None:
        key = next(key for key in KEYS if key in draft.tree)
        found.append(said(key, "this is for ablations: name the architectures under `arms`, or write `ablate`"))
    if spec.arms and spec.ablate is not None:
        found.append(said("ablate", "it makes the arms itself: leave out one of `arms` and `ablate`"))
    for key, why in (("search", "every cell is trained"), ("seed", "`seeds` names the seeds of all arms")):
        if key in draft.tree:
            found.append(said(key, f"leave it out: in an ablation {why}"))
    if spec.tune is not None and spec.tune.seed in spec.seeds:
        message = f"the seed {spec.tune.seed} is one of `seeds`: tuning needs one of its own"
        found.append(Problem(message, "tune.seed", draft.where(("tune", "seed"))))
    if spec.ablate is not None and spec.baseline is not None and not spec.arms:
        found.append(said("baseline", "with `ablate`, the baseline is `ablate.baseline`"))
    if spec.arms and spec.baseline not in spec.arms:
        names = ", ".join(spec.arms)
        if spec.baseline is None:
            message = f"name the arm that the others are compared with, such as `baseline: {next(iter(spec.arms))}`"
            found.append(Problem(message, "baseline", draft.where(("arms",))))
        else:
            near = did_you_mean(spec.baseline, spec.arms)
            message = f"no arm named {spec.baseline!r}.{near} Arms: {names}"
            found.append(Problem(message, "baseline", draft.where(("baseline",))))
    if found:
        raise InputError(found)


def _overridden(study: Study, draft: Draft, spec: AblationSpec) -> list[Arm]:
    """The arms of `arms`: the study with each one's overrides."""
    shared, places = draft.branch(KEYS), draft.each("arms")
    found, complaints = [], defaultdict(list)
    for name, overrides in draft.tree["arms"].items():
        if name.startswith("x-"):
            continue
        try:
            found.append(_arm(study, shared, draft, places[name], name, overrides or {}))
        except InputError as error:
            for problem in error.problems:
                complaints[problem].append(name)
    if complaints:
        raise InputError(_named(problem, names, len(spec.arms)) for problem, names in complaints.items())
    return found


def _named(problem: Problem, names: list[str], count: int) -> Problem:
    """A problem of some arms only says of which."""
    if len(names) == count or any(f"arm {name!r}" in problem.message for name in names):
        return problem
    several = ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
    return replace(problem, message=f"{problem.message} (in arm {several})")


def _arm(study: Study, shared: Draft, draft: Draft, places: Draft, name: str, overrides: dict[str, Any]) -> Arm:
    own, said = shared.branch(()), dict[str, Any]()
    pairs = list(_flat(overrides, ("arms", name)))
    # Which preset it is must be known before anything can be said about what it means.
    for path, value, at in sorted(pairs, key=lambda pair: pair[0] != "model.preset"):
        head = path.split(".")[0]
        if head in SET_ELSEWHERE:
            raise InputError(Problem(f"an arm cannot change {head!r}: {SET_ELSEWHERE[head]}", path, draft.key(at)))
        if path in said:
            raise InputError(Problem(f"arm {name!r} says {path} twice", path, draft.key(at)))
        own.put(path, value, places, at)
        said[path] = value
    own.expand()
    closed = replace(study, tree=own.tree, root=open_tree(own.tree, own, study.registry))
    where = draft.key(("arms", name))
    if closed.space:
        paths = ", ".join(parameter.path for parameter in closed.space)
        message = f"arm {name!r} leaves these open: {paths}. Give each of them a value, in the arm or in the study"
        raise InputError(Problem(message, f"arms.{name}", where))
    spec = closed.validated({})
    closed = replace(closed, name=spec.name, budget=spec.budget, search=spec.search)
    return Arm(name, closed, {}, said, spec, where)


def _flat(overrides: dict[str, Any], at: tuple[str, ...]) -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    """(dotted path, value, place) of an arm's overrides; a mapping below a section of the study is walked into."""
    for key, value in overrides.items():
        if key.startswith("x-"):
            continue
        if key in SECTIONS and isinstance(value, dict):
            for below, item in value.items():
                yield f"{key}.{below}", item, (*at, key, below)
        else:
            yield key, value, (*at, key)


def _ablated(study: Study, spec: AblationSpec) -> list[Arm]:
    """The arms of `ablate`: points of the study."""
    assert spec.ablate is not None
    node = study.root.items["ablate"]
    given = node.items.get("baseline") if isinstance(node, Table) else None
    places = {key: item.key for key, item in given.items.items()} if isinstance(given, Table) else {}
    found, complaints = [], defaultdict(list)
    points = factors.points(study.root, spec.ablate, places, node.key)
    for name, point in points.items():
        try:
            checked = study.validated(point)
        except InputError as error:
            for problem in error.problems:
                complaints[problem].append(name)
            continue
        closed = replace(study, name=checked.name, budget=checked.budget, search=checked.search)
        found.append(Arm(name, closed, point, dict(point), checked, node.key))
    if complaints:
        raise InputError(_named(problem, names, len(points)) for problem, names in complaints.items())
    return found


def _check_different(arms: list[Arm]) -> None:
    """Raise InputError when two arms are one and the same."""
    seen: dict[str, Arm] = {}
    found = []
    for arm in arms:
        meaning = arm.spec.run().canonical() + (arm.spec.budget.model_dump_json() if arm.spec.budget else "")
        first = seen.setdefault(meaning, arm)
        if first is not arm:
            message = f"arms {first.name!r} and {arm.name!r} are one and the same: leave one of them out"
            found.append(Problem(message, f"arms.{arm.name}", arm.where))
    if found:
        raise InputError(found)
