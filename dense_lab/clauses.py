"""The clauses of a fairness certificate, one function each."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

from dense_lab.budget_spec import LOOSE
from dense_lab.recorded import SIZES, Quantity, Record
from dense_lab.results import TrialView
from dense_lab.units import human

FEWEST_SEEDS = 3
TUNED = ("lr", "weight_decay")
"""Keys of `train` in which arms may differ if all were tuned alike."""
NOWHERE = ", whose code is in no commit: whether it stayed the same is not recorded"
ELSEWHERE = ", whose code is in no commit; the source of dense-lab and of its plugins stayed the same"
"""Said of runs outside of a git repository, or of one with changes."""
ROUNDING = ("checkpoints", "micro_batch_tokens")
"""Keys of `train` that change a result by rounding at most."""


class Clause(NamedTuple):
    """One condition, whether it holds, and the figures."""

    name: str
    passed: bool
    detail: str

    @property
    def measured(self) -> bool:
        """Whether the detail belongs into the certificate's line: a figure, or code that nobody can look up."""
        named = self.name in ("seeds", *(name for name, _ in SIZES.values()))
        return named or (self.name == "code" and self.detail.endswith((NOWHERE, ELSEWHERE)))


def seeds(record: Record) -> list[Clause]:
    """Enough of them, and the same ones for all arms."""
    have = {arm: set(cells) for arm, cells in record.cells.items()}
    asked, baseline = set(record.ablation.seeds), have[record.ablation.baseline]
    wrong = [f"{arm} lacks {_listed(asked - own)}" for arm, own in have.items() if asked - own]
    if record.ablation.looks:
        # Seeds were added until arms were decided, so arms have unlike ones; each is to be paired all the same.
        wrong += [
            f"the baseline lacks {_listed(own - baseline)} of {arm}" for arm, own in have.items() if own - baseline
        ]
    else:
        wrong += [f"{arm} has {_listed(own - asked)} besides" for arm, own in have.items() if own - asked]
    if len(asked) < FEWEST_SEEDS:
        wrong.append(f"{len(asked)} where at least {FEWEST_SEEDS} are needed")
    counts = sorted(len(own) for own in have.values())
    told = f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}, added until decided,"
    return [_clause("seeds", wrong, f"{len(have)} arms, {told} seeds each")]


def sizes(record: Record) -> list[Clause]:
    """Parameters and FLOPs, and the state if the budget is about it: what is matched closely, the rest loosely."""
    return [_size(record, about) for about in SIZES if about != "state_bytes" or record.budget.about == about]


def _size(record: Record, about: Quantity) -> Clause:
    name, called = SIZES[about]
    budget = record.budget
    amounts = {arm: _amount(cell, about, budget.counted) for arm, cell in record.one.items()}
    own = amounts.get(record.ablation.baseline)
    limit, wanted = budget.flops_tolerance if about == "flops_per_token" else LOOSE, own
    if budget.about == about:
        limit, wanted = budget.tolerance, budget.amount or own
    missing = [arm for arm, amount in amounts.items() if amount is None]
    if missing or not wanted:
        return Clause(name, False, f"{called} not recorded of {_listed(missing or [record.ablation.baseline])}")
    off = {arm: amount / wanted - 1 for arm, amount in amounts.items() if amount is not None}
    most = max(map(abs, off.values()))
    # What stands on the limit is within it, whatever the last digit of a float says.
    wrong = [
        f"{arm} has {human(amounts[arm] or 0)}, {_percent(share, '+')} from {human(wanted)} (limit {_percent(limit)})"
        for arm, share in off.items()
        if abs(share) > limit * (1 + 1e-9)
    ]
    if about == "params" and budget.counted != "all":
        # An untied head is not counted, and would be parameters for nothing.
        heads = ((str(cell.spec.get("model", {}).get("head")), arm) for arm, cell in record.one.items())
        wrong += _unlike("head", _groups(heads))
    called = f"non-embedding {called}" if about == "params" and budget.counted != "all" else called
    return _clause(name, wrong, f"{called} within {_percent(most)} (limit {_percent(limit)})")


def _amount(trial: TrialView, about: Quantity, count: str) -> float | None:
    if about != "params":
        return trial.metrics.get(about)
    parameters, outside = trial.metrics.get("parameters"), trial.metrics.get("embedding_parameters")
    if parameters is None or (outside is None and count != "all"):
        return None
    return parameters if count == "all" else parameters - (outside or 0)


def data(record: Record) -> list[Clause]:
    """The same tokens, by hash, and read in the same way."""
    found = _groups((trial.tags.get("data", ""), trial.label) for trial in record.all)
    wrong = _unlike("hash", found) or _unlike(
        "keys", _groups((str(t.spec.get("data", "")), t.label) for t in record.all)
    )
    return [_clause("data", wrong, f"sha256 {next(iter(found))[:12]}")]


def batches(record: Record) -> list[Clause]:
    """Arms with one seed saw the same batches in the same order."""
    wrong = []
    for seed in sorted({seed for cells in record.cells.values() for seed in cells}):
        mine = [cells[seed] for cells in record.cells.values() if seed in cells]
        wrong += _unlike(f"sequence of seed {seed}", _groups((t.tags.get("batches", ""), t.label) for t in mine))
    return [_clause("batches", wrong, "equal for arms with the same seed, by hash")]


def tokens(record: Record) -> list[Clause]:
    """As many of them, and every other key of `train` that is not tuned."""
    recipes = {arm: cell.spec.get("train", {}) for arm, cell in record.one.items()}
    wrong = [f"recipe of {arm} not recorded" for arm, recipe in recipes.items() if not recipe.get("tokens")]
    for key in sorted({key for recipe in recipes.values() for key in recipe} - {*TUNED, *ROUNDING}):
        wrong += _unlike(key, _groups((str(recipe.get(key)), arm) for arm, recipe in recipes.items()))
    most = max(recipe.get("tokens", 0) for recipe in recipes.values())
    return [_clause("tokens", wrong, f"{human(most)}, by the same recipe")]


def tuning(record: Record) -> list[Clause]:
    """The same grid of rates for every arm, or none for any."""
    if record.ablation.tune is None:
        wrong = []
        for key in TUNED:
            used = ((str(cell.spec.get("train", {}).get(key)), arm) for arm, cell in record.one.items())
            wrong += [f"{problem}, and no arm was tuned" for problem in _unlike(key, _groups(used))]
        return [_clause("tuning", wrong, "no arm was tuned, all have the rates written")]
    points = {arm: sorted(str(_rates(t.params)) for t in record.tuning(arm)) for arm in record.cells}
    wrong = [f"{arm} was not tuned" for arm, tried in points.items() if not tried]
    wrong += _unlike("grid", _groups(("; ".join(tried), arm) for arm, tried in points.items() if tried))
    edge = {t.label for t in record.all if t.tags.get("tune.edge")}
    note = f"; at the edge of it: {_listed(edge)}" if edge else ""
    return [_clause("tuning", wrong, f"a grid of {max(map(len, points.values()))} for every arm{note}")]


def _rates(params: Mapping[str, Any]) -> dict[str, Any]:
    return {key: params[f"train.{key}"] for key in TUNED if f"train.{key}" in params}


def selection(record: Record) -> list[Clause]:
    """Rates are the best on validation, and arms are compared on what nothing was chosen by."""
    metric = record.ablation.analysis.metric
    if record.ablation.tune is None:
        return [Clause("selection", True, f"nothing was chosen; arms compared on {metric}")]
    wrong = []
    if metric.startswith("valid/"):
        wrong.append(f"rates were chosen on the split of {metric}: give the study test tokens")
    for arm, cells in record.cells.items():
        tried = [t for t in record.tuning(arm) if t.state == "complete" and "valid/loss" in t.metrics]
        if any(name.startswith("test/") for t in tried for name in t.metrics):
            wrong.append(f"tuning of {arm} saw the test split")
        best = min((t.metrics["valid/loss"] for t in tried), default=None)
        good = [_rates(t.params) for t in tried if t.metrics["valid/loss"] == best]
        used = [{k: v for k, v in cell.spec.get("train", {}).items() if k in TUNED} for cell in cells.values()]
        if tried and not all(any(rates.items() <= own.items() for rates in good) for own in used):
            wrong.append(f"{arm} is not trained with its best rates on valid/loss")
    return [_clause("selection", wrong, f"rates chosen on valid/loss, arms compared on {metric}")]


def device(record: Record) -> list[Clause]:
    """Device and precision; how many threads a CPU lent is no difference."""
    names = [(re.sub(r" \(\d+ threads\)", "", t.tags.get("device", "")), t.label) for t in record.all]
    wrong = _unlike("device", _groups(names)) + _unlike("precision", _tagged(record, "dtype"))
    return [_clause("device", wrong, f"{names[0][0]}, {record.all[0].tags.get('dtype', '')}")]


def code(record: Record) -> list[Clause]:
    """Project, plugins and torch."""
    wrong = _unlike("commit", _tagged(record, "commit")) + _unlike("torch", _tagged(record, "torch"))
    wrong += _one_each("plugin", record, "plugins") + _one_each("source", record, "code")
    commit = record.all[0].tags.get("commit", "")
    lookup = ELSEWHERE if all(trial.tags.get("code") for trial in record.all) else NOWHERE
    lookup = lookup if commit.endswith("-dirty") or commit == "unknown" else ""
    return [_clause("code", wrong, f"commit {commit[:12]}{lookup}")]


def kernels(record: Record) -> list[Clause]:
    """One implementation of each operation, and each judged right on the machine that used it."""
    wrong = _one_each("implementation", record, "implementations")
    states = _groups((_verified(trial.tags), trial.label) for trial in record.all)
    wrong += [f"{state} ({_listed(arms)})" for state, arms in states.items() if state != "all"]
    used = _by_name(record.all, "implementations")
    return [_clause("kernels", wrong, "verified: " + ", ".join(f"{op} {_listed(ran)}" for op, ran in used.items()))]


def _verified(tags: Mapping[str, str]) -> str:
    ran = [name.partition("=")[2] for name in tags.get("implementations", "").split(",") if name]
    if ran and all(name == "reference" for name in ran):
        return "all"
    return tags.get("kernels.verified", "unverified: not recorded")


CHECKS: tuple[Callable[[Record], list[Clause]], ...] = (
    seeds,
    sizes,
    data,
    batches,
    tokens,
    tuning,
    selection,
    device,
    code,
    kernels,
)


def _one_each(what: str, record: Record, tag: str) -> list[str]:
    several = {name: found for name, found in _by_name(record.all, tag).items() if len(found) > 1}
    return [f"{what} of {name} differs: {_listed(found)}" for name, found in several.items()]


def _by_name(trials: Iterable[TrialView], tag: str) -> dict[str, set[str]]:
    """What follows each name in a tag such as `a=1,b=2`, over all trials."""
    found: dict[str, set[str]] = defaultdict(set)
    for trial in trials:
        for item in filter(None, trial.tags.get(tag, "").split(",")):
            name, _, value = item.partition("=")
            found[name].add(value)
    return dict(sorted(found.items()))


def _tagged(record: Record, tag: str) -> dict[str, set[str]]:
    return _groups((trial.tags.get(tag, ""), trial.label) for trial in record.all)


def _groups(pairs: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    """Arms by value."""
    found: dict[str, set[str]] = defaultdict(set)
    for value, arm in pairs:
        found[value].add(arm)
    return dict(found)


def _unlike(what: str, groups: Mapping[str, set[str]]) -> list[str]:
    if "" in groups:
        return [f"{what} not recorded of {_listed(groups[''])}"]
    if len(groups) < 2:
        return []
    return [f"{what} differs: " + "; ".join(f"{value[:40]} ({_listed(arms)})" for value, arms in groups.items())]


def _listed(items: Iterable[Any]) -> str:
    names = [str(item) for item in sorted(items)]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _percent(share: float, sign: Literal["", "+"] = "") -> str:
    return f"{100 * share:{sign}.2g} %" if abs(share) < 1 else f"{100 * share:{sign}.0f} %"


def _clause(name: str, wrong: list[str], right: str) -> Clause:
    return Clause(name, not wrong, "; ".join(wrong) or right)
