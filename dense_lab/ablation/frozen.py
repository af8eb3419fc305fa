"""What arms mean, written out, and whether those of a study that goes on are still the same ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dense_lab import space_frozen as frozen
from dense_lab.errors import Problem

if TYPE_CHECKING:
    from dense_lab.ablation.arms import Ablation
    from dense_lab.registry import Registry

Meanings = dict[str, dict[str, Any]]
"""Every single value of each arm, by the arm's name and dotted path."""
NOT_MEANT = ("dense_lab", "seed")
"""Leaves that say nothing of an arm."""


def resolved(ablation: Ablation, registry: Registry) -> dict[str, Any]:
    """What arms mean, as JSON: what they share under `fixed`, the rest by arm; how they are tuned; plugins."""
    from dense_lab.study import plugins_used

    plugins: dict[str, str] = {}
    for arm in ablation.arms:
        plugins |= plugins_used(arm.spec.run(), registry)
    return {
        **packed({arm.name: _meaning(arm) for arm in ablation.arms}),
        "tune": ablation.tune.model_dump(mode="json") if ablation.tune else {},
        "plugins": plugins,
    }


def _meaning(arm: Any) -> dict[str, Any]:
    budget = arm.spec.budget.model_dump(mode="json") if arm.spec.budget else {}
    # What the budget decides is no part of what was asked for.
    decided = {*NOT_MEANT} | ({"model.width"} if arm.spec.budget and "width" in arm.spec.budget.solve else set())
    own = {path: value for path, value in arm.leaves.items() if path not in decided}
    return own | {f"budget.{path}": value for path, value in budget.items()}


def packed(arms: Meanings) -> dict[str, Any]:
    """The values that all arms share, and those of each that are its own."""
    first = next(iter(arms.values()), {})
    shared = {p: v for p, v in first.items() if all(p in arm and arm[p] == v for arm in arms.values())}
    own = {name: {p: v for p, v in arm.items() if p not in shared} for name, arm in arms.items()}
    return {"fixed": shared, "arms": own}


def unpacked(manifest: Mapping[str, Any]) -> Meanings:
    """Every value of each arm again."""
    return {name: {**manifest.get("fixed", {}), **own} for name, own in manifest.get("arms", {}).items()}


def extended(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The arms of a manifest and those that were added since."""
    return packed(unpacked(new) | unpacked(old))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], name: str) -> list[Problem]:
    """What an arm of both manifests means in one and not in the other, and other tuning; new arms are welcome."""
    if "arms" not in old or "arms" not in new:
        return []
    before, after = unpacked(old), unpacked(new)
    common = before.keys() & after.keys()
    changed: dict[tuple[str, str | None, str | None], list[str]] = defaultdict(list)
    for arm in sorted(common):
        said = [{path: frozen.in_words(v) for path, v in meaning[arm].items()} for meaning in (before, after)]
        for path in frozen.topmost(*said):
            changed[path, said[0].get(path), said[1].get(path)].append(arm)
    found = []
    for (path, was, now), arms in changed.items():
        if len(arms) == len(common):
            found.append(Problem(frozen.difference(path, was, now, name), path))
        else:
            text = f"{path} was {was or 'absent'} when study {name!r} began, {now or 'absent'} now"
            message = f"{text}: change it back, or give the arm a new name"
            found += [Problem(message, f"arms.{arm}") for arm in arms]
    tuned = [{f"tune.{path}": frozen.in_words(v) for path, v in m.get("tune", {}).items()} for m in (old, new)]
    paths = frozen.topmost(*tuned)
    return found + [Problem(frozen.difference(p, tuned[0].get(p), tuned[1].get(p), name), p) for p in paths]
