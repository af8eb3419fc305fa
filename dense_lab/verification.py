"""Proof before use: every operation that a run would call, judged against float64 on this machine, and remembered.

A model of the run is built, one batch goes through it, and every call of an operation that it makes is made again: by
the implementation that served it, by the reference in the same precision, and by the reference in float64. `verdicts`
remembers what was found.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from dense_lab import registry as registries
from dense_lab.counting import check_sizes
from dense_lab.errors import DenseLabError, InputError
from dense_lab.training.device import Place, choose_place, out_of_memory
from dense_lab.verdicts import Finding, digest, kernels, libraries, machine, read, sources, tag_of, write

if TYPE_CHECKING:
    from dense_lab.model import ModelSpec
    from dense_lab.study import RunSpec

SWITCH = "DENSE_LAB_VERIFY"
"""Environment variable: `off` leaves kernels unverified, and runs say so."""
NOT_CHECKED = "unverified: not checked"
REFERENCE = "reference"
MODEL = "model"
"""In place of an operation: a model that could not run, so that some of what it calls was not judged."""
Use = Literal["training", "training and decoding"]
_TOKENS = 512
"""Longest sequence judged: many chunks of every kernel, all of most studies', and about a second for a reference that
walks. Where both do not fit, rows are left out rather than tokens: rows are alike to a kernel, later tokens are not."""
_LONG = 2048
"""Of longer sequences, so many tokens are judged as well, in one row: kernels cut long sequences in pieces where there
are few rows (the scan's gradients take several tiles in a row from 1024 tokens on), which 512 tokens do not show. A
reference that walks takes seconds for them, one that compares all pairs of tokens 34 MB for each head."""
_WIDTHS = (256, 128, 64)
"""Tried in turn for a long row that does not fit at the model's own width, which on a GPU is beyond 2048: channels are
alike to a kernel, though with smaller heads a CPU may walk where it multiplies matrices at the own width."""
_NUMBERS = {"cuda": 2**22, "cpu": 2**14}
"""Most numbers of a [B, T, width] tensor judged; the reference's gradient keeps hundreds of such."""


class KernelError(DenseLabError):
    """An implementation is wrong on this machine; exit code 1."""


@dataclass(frozen=True)
class Case:
    """A model to be judged: batch and length as they are trained, and as they are judged."""

    spec: RunSpec
    place: Place
    use: Use
    trained: tuple[int, int]
    judged: tuple[int, int]

    @classmethod
    def of(cls, spec: RunSpec, device: str, use: Use, size: Literal["reduced", "whole"] = "reduced") -> Case:
        """The case of a run; raises MachineError when the device is not here. A reference needs it reduced."""
        place = choose_place(device, spec.train.precision)
        length = getattr(spec.data, "seq_len", 256)
        batch = max(1, min(spec.train.micro_batch_tokens or spec.train.batch_tokens, spec.train.batch_tokens) // length)
        kind = place.device.type
        tokens = min(length, _TOKENS)
        fitting = max(1, _NUMBERS[kind] // (tokens * spec.model.width))
        judged = (min(batch, fitting), tokens) if size == "reduced" else (batch, length)
        return cls(spec, place, use, (batch, length), judged)

    def longer(self) -> Case | None:
        """The case of one long row, narrower than the model if it must; None where no sequence is long."""
        length = self.trained[1]
        if length <= _TOKENS:
            return None
        tokens = min(length, _LONG)
        model = self.spec.model
        widths = [model.width, *(width for width in _WIDTHS if width < model.width)]
        built = [width for width in widths if _builds(model.model_copy(update={"width": width}))]
        fitting = [width for width in built if tokens * width <= _NUMBERS[self.place.device.type]]
        width = next(iter(fitting or built[-1:]), model.width)
        spec = self.spec.model_copy(update={"model": model.model_copy(update={"width": width})})
        return replace(self, spec=spec, judged=(1, tokens))

    @property
    def size(self) -> str:
        """For people."""
        judged, trained = (f"B{batch} T{tokens}" for batch, tokens in (self.judged, self.trained))
        return judged if judged == trained else f"{judged} of {trained}"

    def key(self) -> str:
        """What decides which calls are made, and by what."""
        spec = self.spec
        said = [spec.model.model_dump(mode="json"), spec.kernels, spec.data.model_dump(mode="json"), self.judged]
        return digest(machine(self.place), sources(), kernels(), str(self.place.dtype), self.use, said)


def _builds(model: ModelSpec) -> bool:
    try:
        check_sizes(model)
    except InputError:
        return False
    return True


def cases(spec: RunSpec, device: str, use: Use) -> list[Case]:
    """All that is judged for a run: its batch, and one long row if its sequences are long; raises MachineError."""
    first = Case.of(spec, device, use)
    return [case for case in (first, first.longer()) if case is not None]


def ensure(
    specs: Iterable[RunSpec], device: str = "auto", allow: Literal["verified", "unverified"] = "verified"
) -> str:
    """Judge all that the runs would call on `device`, unless it is known already; the tag `kernels.verified`.

    That is "all", or "unverified: " and names. Raises KernelError when an implementation is wrong and `allow` is
    "verified", MachineError when the device is not here.
    """
    if os.environ.get(SWITCH) == "off":
        return NOT_CHECKED
    wrong = {found.name: found for found in examine(specs, device) if not found.ok and found.operation != MODEL}
    if wrong and allow == "verified":
        lines = [f"{found.name} is wrong on this machine: {found.text} ({found.shapes})" for found in wrong.values()]
        ways = "choose another implementation in `kernels:`, or mark the results with --allow-unverified"
        raise KernelError("\n".join([*lines, ways]))
    return tag_of(wrong)


def examine(specs: Iterable[RunSpec], device: str = "auto", use: Use = "training") -> list[Finding]:
    """A finding for every set of shapes of every operation that the runs call, those of earlier times included."""
    memory, findings = read(), dict[str, Finding]()
    for case in {case.key(): case for spec in specs for case in cases(spec, device, use)}.values():
        key = case.key()
        names = memory["cases"].get(key)
        if names is None or not all(name in memory["verdicts"] for name in names):
            found, lasting = _judged(case, memory["verdicts"])
            findings |= found
            if lasting:
                memory["cases"][key] = list(found)
            write(memory)
        else:
            findings |= {name: Finding(**memory["verdicts"][name]["finding"]) for name in names}
    return list(findings.values())


def tag(spec: RunSpec, place: Place, ran: Mapping[str, str]) -> str:
    """The tag `kernels.verified` of a run that `ran` {operation: implementation}, by what is remembered."""
    if os.environ.get(SWITCH) == "off":
        return NOT_CHECKED
    memory = read()
    found = [memory["cases"].get(case.key()) for case in cases(spec, str(place.device), "training")]
    here, source = machine(place), kernels()
    if all(names is not None for names in found):
        names = [name for some in found for name in some]
        known = [memory["verdicts"][name]["finding"] for name in names if name in memory["verdicts"]]
    else:  # A point of the space that lies between those judged: by the implementations.
        entries = memory["verdicts"].values()
        known = [e["finding"] for e in entries if e["machine"] == here and e["kernels"] == source]
    states: dict[str, bool] = {}
    for found in known:
        name = f"{found['operation']}/{found['implementation']}"
        states[name] = states.get(name, True) and found["ok"]
    used = [f"{operation}/{name}" for operation, name in sorted(ran.items()) if name != REFERENCE]
    return tag_of([name for name in used if not states.get(name, False)])


def _judged(case: Case, verdicts: dict[str, Any]) -> tuple[dict[str, Finding], bool]:
    """Findings of a case by name, those not known yet added to `verdicts`; and whether they are all there is to know.

    What failed for a reason that may be gone next time, such as memory that ran out, is told but not remembered.
    """
    made, problem = calls(case)
    found, lasting, here = dict[str, Finding](), not problem, machine(case.place)
    for library, key, call in made:
        name = digest(here, library.fingerprint(call.operation), call.operation, call.implementation, key)
        if name in verdicts:
            found[name] = Finding(**verdicts[name]["finding"])
            continue
        found[name], settled = _finding(library, call, case)
        lasting = lasting and settled
        if settled:
            verdicts[name] = {"machine": here, "kernels": kernels(), "finding": asdict(found[name])}
    if problem:
        core = case.spec.model.layers()[0].core.kind_name()
        found[case.key()] = Finding(MODEL, core, "forward", "", "", case.size, "call", None, ok=False, text=problem)
    return found, lasting


def _finding(library: Any, call: Any, case: Case) -> tuple[Finding, bool]:
    """What was found of a call, and whether it would be found again."""
    passes = "forward" if call.gradients == "none" else "forward and backward"
    head = (call.operation, call.implementation, passes)
    try:
        verdict = library.judge(call)
    except (RuntimeError, ValueError) as error:  # What torch, Triton and operations raise.
        found = Finding(*head, "", "", case.size, "call", None, ok=False, text=_told(error))
        return found, not out_of_memory(error)
    used = verdict.used if math.isfinite(verdict.used) else None
    text = ""
    if not verdict.ok:
        far = "holds NaN" if used is None else f"is {used:.3g} times as far from float64 as allowed"
        text = f"{verdict.worst} {far} ({verdict.measure} error {verdict.error:.2e}, allowed {verdict.allowed:.2e})"
    return Finding(*head, verdict.dtype, verdict.shapes, case.size, verdict.worst, used, ok=verdict.ok, text=text), True


def _told(error: Exception) -> str:
    if out_of_memory(error):
        torch.cuda.empty_cache()
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def calls(case: Case) -> tuple[list[tuple[Any, str, Any]], str]:
    """(library, what distinguishes it, call) of every different call that the case makes, and what stopped it, if
    anything did."""
    found, problem = [], ""
    with ExitStack() as stack:
        watched = [(library, stack.enter_context(library.watching())) for library in libraries()]
        devices = [case.place.device] if case.place.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            try:
                _run(case)
            # The isolation boundary: a component that cannot run fails its own trials, and says why there.
            except Exception as error:  # noqa: BLE001
                problem = _told(error)
        for library, seen in watched:
            found += [(library, key, call) for key, call in seen.items()]
    return [item for item in found if item[2].implementation != REFERENCE], problem


def _run(case: Case) -> None:
    """A batch of random tokens through the model: as in training, and, if asked for, a prompt and a token behind it."""
    vocabulary = _vocabulary(case.spec)
    torch.manual_seed(0)
    with case.place.device:
        model = case.spec.model.build(vocabulary).initialise(0)
        _disturb(model)
        ids = torch.randint(vocabulary, (case.judged[0], case.judged[1] + 1))
    model.kernels = case.spec.kernels
    with case.place.autocast():
        model.loss(ids[:, :-1], ids[:, 1:])
    if case.use == "training":
        return
    model = model.to(case.place.dtype).eval()
    with torch.no_grad():
        state = model.run(ids[:, :-1]).state
        with registries.default().states_reused():
            model.step(ids[:, -1], state)


def _vocabulary(spec: RunSpec) -> int:
    """As the study has it, or 256: data is not prepared for this, and only the class of shapes counts."""
    said = (getattr(part, "vocab", None) for part in (spec.data, getattr(spec.data, "tokenizer", None)))
    return next((number for number in said if isinstance(number, int)), 256)


def _disturb(model: nn.Module) -> None:
    """Small random numbers on every weight: those that begin at zero would hide what is wrong behind them."""
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.1 if parameter.ndim < 2 else 0.1 * parameter.shape[-1] ** -0.5
            parameter.add_(torch.randn_like(parameter) * scale)
