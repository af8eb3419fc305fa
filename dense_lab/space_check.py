"""What a closed study may get wrong that its specs cannot see: names of kernels, sizes that a budget decides."""

from __future__ import annotations

from dense_lab.errors import InputError, Problem, did_you_mean
from dense_lab.registry import Registry
from dense_lab.space_tree import Origins
from dense_lab.study import StudySpec


def check(spec: StudySpec, origins: Origins, registry: Registry) -> None:
    """Raise InputError, with its place, for the first thing that is wrong."""
    _check_kernels(spec, origins, registry)
    for at, node in origins.items():
        if spec.budget is not None and spec.budget.decides(at):
            what = "the width" if at == ("model", "width") else "the width of feed-forward layers"
            message = f"the budget chooses {what}: leave `{node.path}` out, or leave out `budget`"
            raise InputError(Problem(message, node.path, node.key))


def _check_kernels(spec: StudySpec, origins: Origins, registry: Registry) -> None:
    libraries = {operation: library for library in registry.kernels for operation in library.OPERATIONS}
    for operation, chosen in spec.kernels.items():
        node = origins["kernels", operation]
        if operation not in libraries:
            near = did_you_mean(operation, libraries)
            message = f"no operation {operation!r}.{near} Operations: {', '.join(libraries)}"
            raise InputError(Problem(message, node.own, node.key))
        # A library of a plugin may not say what it has; it then complains at the first call.
        if not hasattr(libraries[operation], "implementations"):
            continue
        known = ("auto", *libraries[operation].implementations(operation))
        if chosen not in known:
            near = did_you_mean(chosen, known)
            message = f"{operation} has no implementation {chosen!r}.{near} There are: {', '.join(known)}"
            raise InputError(Problem(message, node.own, node.where))
