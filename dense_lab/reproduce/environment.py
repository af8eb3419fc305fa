"""Whether the machine, the code and the data are those that the recorded runs had."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from dense_lab.reproduce.recorded import Recorded, stored_spec
from dense_lab.results import TrialView

if TYPE_CHECKING:
    from dense_lab.registry import Registry
    from dense_lab.study import RunSpec

CHECKED = (
    *("commit", "dense_lab", "code", "device", "dtype", "torch", "triton", "numba", "python", "plugins", "data"),
    *("host", "cpu"),
)
"""Tags that are compared; `data` is the one that decides whether numbers can be compared at all."""


class Difference(NamedTuple):
    """Something that is not as it was."""

    what: str
    recorded: str
    now: str

    def __str__(self) -> str:
        return f"{self.what}: recorded {self.recorded}, now {self.now}"


def differences(recorded: Recorded, device: str, threads: int | None, registry: Registry) -> list[Difference]:
    """Everything of CHECKED that differs for some run; prepares the data. A tag that was never recorded is left out."""
    found: dict[Difference, None] = {}
    data: dict[str, str] = {}
    for cells in recorded.chosen.values():
        for trial in cells.values():
            now = _now(stored_spec(trial, registry), device, threads, registry, data)
            said = [Difference(name, trial.tags[name], now[name]) for name in CHECKED if name in trial.tags]
            found |= dict.fromkeys(one for one in said if one.recorded != one.now)
    return list(found)


def _now(spec: RunSpec, device: str, threads: int | None, registry: Registry, data: dict[str, str]) -> dict[str, str]:
    from dense_lab.study import plugins_used
    from dense_lab.training.code import code
    from dense_lab.training.device import choose_place
    from dense_lab.training.provenance import listed, surroundings

    place = choose_place(device, spec.train.precision)
    key = spec.data.model_dump_json()
    data[key] = data.get(key) or spec.data.prepare().fingerprint
    now = surroundings(place)
    if place.device.type == "cpu" and threads:
        now["device"] = re.sub(r"\d+ threads", f"{threads} threads", now["device"])
    return {**now, "code": code(spec), "plugins": listed(plugins_used(spec, registry)), "data": data[key]}


def threads(trials: Sequence[TrialView]) -> int | None:
    """CPU threads that the runs were trained with, which decide the order of sums; None when unknown or on a GPU."""
    found = {match[1] for t in trials if (match := re.search(r"\((\d+) threads\)", t.tags.get("device", "")))}
    return int(found.pop()) if len(found) == 1 else None
