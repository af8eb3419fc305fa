"""Better launch parameters than the rules', by measuring: one number after the other, kept where it is clearly faster.

    with watching() as calls:
        model.loss(inputs, targets)
    for call in calls.values():
        for gain in tune(call):
            print(gain)

Every candidate is compiled, so a call takes minutes; nothing of this happens outside of `dense-lab tune`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from dense_lab_kernels import _tuned
from dense_lab_kernels._dispatch import Call
from dense_lab_kernels._tuned import Changes, Met
from dense_lab_kernels.verify import repeated

GAIN = 0.02
"""Least part of the time that a change must save: less is noise."""


class Gain(NamedTuple):
    """What was found for one call."""

    operation: str
    shape: str
    """The class of shapes whose rule is changed."""
    changes: dict[str, int]
    """Empty where nothing beats the rule."""
    rule_ms: float
    """Time of the call, forward and backward, with the rules."""
    tuned_ms: float
    """The same with this and earlier changes."""


Timer = Callable[[Callable[[], Any]], float]


def milliseconds(work: Callable[[], Any]) -> float:
    """Median time of `work` on the GPU, in a CUDA graph, as training runs it: the host's time does not count."""
    from triton.testing import do_bench_cudagraph

    work()
    return float(do_bench_cudagraph(work, rep=40, return_mode="median"))


def tune(call: Call, time: Timer = milliseconds) -> Iterator[Gain]:
    """Try what the operation's rules leave open, shape class by shape class.

    Speed alone counts here; whoever keeps a gain has the operation judged with it (`verify.judge`, at a size that the
    reference can bear) and takes it back where it fails.
    """
    best: dict[tuple[str, str], Changes] = {}
    rule_ms = _time(call, {}, time)
    if rule_ms is None:
        return
    fastest = rule_ms
    with _tuned.trying({}) as met:
        repeated(call)()
    for key, rule in met.items():
        for name, value in _others(rule):
            trial = {**best, key: {**best.get(key, {}), name: value}}
            took = _time(call, trial, time)
            if took is not None and took < fastest * (1 - GAIN):
                best, fastest = trial, took
        yield Gain(*key, dict(best.get(key, {})), rule_ms, fastest)


def keep(gains: Iterable[Mapping[str, Any]]) -> None:
    """Write gains (their fields by name) to the file that overrides rules; no changes remove what stood there."""
    _tuned.store({(gain["operation"], gain["shape"]): gain["changes"] for gain in gains})


def _others(met: Met) -> Iterator[tuple[str, int]]:
    """Every open number with every value that is not the rule's."""
    for name, values in met.knobs.items():
        present: Any = met.rule
        for part in name.split("."):
            present = getattr(present, part)
        yield from ((name, value) for value in values if value != present)


def _time(call: Call, choices: Mapping[tuple[str, str], Changes], time: Timer) -> float | None:
    """None for what does not compile, does not fit, or is refused by the rule."""
    with _tuned.trying(choices):
        try:
            return time(repeated(call))
        except (RuntimeError, ValueError) as error:  # Triton's and torch's errors, and the rules' own.
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return None
