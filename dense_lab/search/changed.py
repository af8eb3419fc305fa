"""Whether a study goes on with the code that its trials were trained with."""

from __future__ import annotations

import sys
from pathlib import Path

from dense_lab.results import read_study
from dense_lab.training.code import digest


def changed(folder: Path) -> list[str]:
    """A sentence for each package, loose plugins included, whose source is not that of all trials finished in `folder`.

    Packages that this process has not imported are not looked at.
    """
    recorded: dict[str, dict[str, int]] = {}
    for trial in read_study(folder).having("complete"):
        for named in filter(None, trial.tags.get("code", "").split(",")):
            package, _, then = named.partition("=")
            counts = recorded.setdefault(package, {})
            counts[then] = counts.get(then, 0) + 1
    found = []
    for package, counts in sorted(recorded.items()):
        now = digest(package) if package in sys.modules else ""
        if now and (others := {old: count for old, count in counts.items() if old != now}):
            found.append(
                f"the source of {package} is {now} now; {sum(others.values())} of {sum(counts.values())} finished "
                f"trials were trained with {', '.join(others)}. Results of both will stand in one table (of an "
                "ablation NOT FAIR): for one code, give the study another `name`"
            )
    return found
