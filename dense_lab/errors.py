"""What a user reads when something cannot be done: what, where, got, what would do. Each class fixes an exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, replace


class DenseLabError(Exception):
    """Something failed while running; exit code 1."""

    exit_code = 1


class MachineError(DenseLabError):
    """The machine lacks something (a package, a device, a free port, the network); exit code 3."""

    exit_code = 3


@dataclass(frozen=True)
class Problem:
    """One thing wrong with an input: a sentence, and where it was found."""

    message: str
    path: str = ""
    """Dotted path within the study, such as `model.core.heads`."""
    where: str = ""
    """`file:line:column`, `--set`, ... ; empty when the input did not come from a file."""

    def __str__(self) -> str:
        # `--set model.width` names the path already.
        path = "" if self.where.endswith(f" {self.path}") else self.path
        head = " ".join(part for part in (self.where, path) if part)
        return f"{head}: {self.message}" if head else self.message


class InputError(DenseLabError):
    """The user's input is wrong; exit code 2. Carries every problem found, not only the first."""

    exit_code = 2

    def __init__(self, problems: str | Problem | Iterable[Problem]):
        if isinstance(problems, str):
            problems = Problem(problems)
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def located(self, where: str) -> InputError:
        """The same error with `where` filled in for every problem that has none."""
        return InputError(p if p.where else replace(p, where=where) for p in self.problems)


def did_you_mean(got: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the nearest of `known`, or an empty string."""
    nearest = difflib.get_close_matches(got, list(known), n=1, cutoff=0.6)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""
