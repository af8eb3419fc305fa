"""Proof before use: every operation that a run would call, judged against float64 on this machine, and remembered.

A model of the run is built, one batch goes through it, and every call of an operation that it makes is made again: by
the implementation that served it, by the reference in the same precision, and by the reference in float64. Verdicts are
kept in `verified.json` in the user's cache folder ($DENSE_LAB_CACHE) for as long as the machine, the versions and the
kernels' source stay the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from dense_lab import __version__
from dense_lab import registry as registries
from dense_lab.errors import DenseLabError
from dense_lab.files import read_json, write_json
from dense_lab.training.device import Place, choose_place, out_of_memory

if TYPE_CHECKING:
    from dense_lab.study import RunSpec

SWITCH = "DENSE_LAB_VERIFY"
"""Environment variable: `off` leaves kernels unverified, and runs say so."""
NOT_CHECKED = "unverified: not checked"
REFERENCE = "reference"
Use = Literal["training", "training and decoding"]
_TOKENS = {"cuda": 300, "cpu": 72}
"""Longest sequence judged: beyond one chunk of every kernel, and short enough for a reference that walks."""
_NUMBERS = {"cuda": 2**22, "cpu": 2**14}
"""Most numbers of a [B, T, width] tensor judged; the reference's gradient keeps hundreds of such."""
_REMEMBERED = 4000


class KernelError(DenseLabError):
    """An implementation is wrong on this machine; exit code 1."""


@dataclass(frozen=True)
class Finding:
    """What was found of one implementation at one set of shapes."""

    operation: str
    implementation: str
    dtype: str
    shapes: str
    size: str
    """Batch and length judged, `of` those of the run where they were reduced."""
    worst: str
    """The output, state or gradient (`d` and the name) that used most of what it may."""
    used: float | None
    """Its error over what is allowed; None where it holds a NaN or nothing came of the call."""
    ok: bool
    text: str = ""
    """What went wrong, in a sentence."""

    @property
    def name(self) -> str:
        """`operation/implementation`."""
        return f"{self.operation}/{self.implementation}"


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
        tokens = min(length, _TOKENS[kind])
        fitting = max(1, _NUMBERS[kind] // (tokens * spec.model.width))
        judged = (min(batch, fitting), tokens) if size == "reduced" else (batch, length)
        return cls(spec, place, use, (batch, length), judged)

    @property
    def size(self) -> str:
        """For people."""
        judged, trained = (f"B{batch} T{tokens}" for batch, tokens in (self.judged, self.trained))
        return judged if judged == trained else f"{judged} of {trained}"

    def key(self) -> str:
        """What decides which calls are made, and by what."""
        spec = self.spec
        said = [spec.model.model_dump(mode="json"), spec.kernels, spec.data.model_dump(mode="json"), self.judged]
        return _digest(machine(self.place), _sources(), _kernels(), str(self.place.dtype), self.use, said)


def ensure(
    specs: Iterable[RunSpec], device: str = "auto", allow: Literal["verified", "unverified"] = "verified"
) -> str:
    """Judge all that the runs would call on `device`, unless it is known already; the tag `kernels.verified`.

    That is "all", or "unverified: " and names. Raises KernelError when an implementation is wrong and `allow` is
    "verified", MachineError when the device is not here.
    """
    if os.environ.get(SWITCH) == "off":
        return NOT_CHECKED
    wrong = {found.name: found for found in examine(specs, device) if not found.ok}
    if wrong and allow == "verified":
        lines = [f"{found.name} is wrong on this machine: {found.text} ({found.shapes})" for found in wrong.values()]
        ways = "choose another implementation in `kernels:`, or mark the results with --allow-unverified"
        raise KernelError("\n".join([*lines, ways]))
    return _tag(wrong)


def examine(specs: Iterable[RunSpec], device: str = "auto", use: Use = "training") -> list[Finding]:
    """A finding for every set of shapes of every operation that the runs call, those of earlier times included."""
    memory, findings = _read(), {}
    for case in {case.key(): case for case in (Case.of(spec, device, use) for spec in specs)}.values():
        key = case.key()
        if not all(name in memory["verdicts"] for name in memory["cases"].get(key, [""])):
            memory["cases"][key] = list(_judged(case, memory["verdicts"]))
            _write(memory)
        for name in memory["cases"][key]:
            findings[name] = Finding(**memory["verdicts"][name]["finding"])
    return list(findings.values())


def tag(spec: RunSpec, place: Place, ran: Mapping[str, str]) -> str:
    """The tag `kernels.verified` of a run that `ran` {operation: implementation}, by what is remembered."""
    if os.environ.get(SWITCH) == "off":
        return NOT_CHECKED
    memory = _read()
    names = memory["cases"].get(Case.of(spec, str(place.device), "training").key())
    here, kernels = machine(place), _kernels()
    if names is not None:
        known = [memory["verdicts"][name]["finding"] for name in names if name in memory["verdicts"]]
    else:  # A point of the space that lies between those judged: by the implementations.
        entries = memory["verdicts"].values()
        known = [e["finding"] for e in entries if e["machine"] == here and e["kernels"] == kernels]
    states: dict[str, bool] = {}
    for found in known:
        name = f"{found['operation']}/{found['implementation']}"
        states[name] = states.get(name, True) and found["ok"]
    used = [f"{operation}/{name}" for operation, name in sorted(ran.items()) if name != REFERENCE]
    return _tag([name for name in used if not states.get(name, False)])


def _tag(names: Iterable[str]) -> str:
    text = ", ".join(names)
    return f"unverified: {text}" if text else "all"


def machine(place: Place) -> str:
    """What verdicts hold for: the device and the versions of what computes."""
    if place.device.type == "cuda":
        device = torch.cuda.get_device_name(place.device)
    else:
        device = f"{platform.machine()} {_processor()}"
    return f"{device}, torch {torch.__version__}, triton {_version('triton')}, dense-lab {__version__}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _libraries() -> Iterator[Any]:
    """Libraries of operations that can judge their calls."""
    return (library for library in registries.default().kernels if hasattr(library, "judge"))


def _kernels() -> str:
    return _digest([library.fingerprint(name) for library in _libraries() for name in library.OPERATIONS])


def _sources() -> str:
    """Digest of the files of all installed components, which decide what is called."""
    registry = registries.default()
    found = {registry.find(slot, kind).__module__ for slot in registry.slots() for kind in registry.kinds(slot)}
    files = {getattr(sys.modules.get(module), "__file__", None) for module in found} - {None}
    return _digest([Path(file).read_bytes().hex() for file in sorted(map(str, files)) if Path(file).exists()])


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _judged(case: Case, verdicts: dict[str, Any]) -> Iterator[str]:
    """Names of the verdicts of a case; those not known yet are found and added."""
    for library, key, call in calls(case):
        here = machine(case.place)
        name = _digest(here, library.fingerprint(call.operation), call.operation, call.implementation, key)
        if name not in verdicts:
            finding = _finding(library, call, case)
            verdicts[name] = {"machine": here, "kernels": _kernels(), "finding": asdict(finding)}
        yield name


def _finding(library: Any, call: Any, case: Case) -> Finding:
    head = (call.operation, call.implementation)
    try:
        verdict = library.judge(call)
    except (RuntimeError, ValueError) as error:  # What torch, Triton and operations raise.
        if out_of_memory(error):
            torch.cuda.empty_cache()
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return Finding(*head, "", "", case.size, "call", None, ok=False, text=text)
    used = verdict.used if math.isfinite(verdict.used) else None
    text = ""
    if not verdict.ok:
        far = "holds NaN" if used is None else f"is {used:.3g} times as far from float64 as allowed"
        text = f"{verdict.worst} {far} ({verdict.measure} error {verdict.error:.2e}, allowed {verdict.allowed:.2e})"
    return Finding(*head, verdict.dtype, verdict.shapes, case.size, verdict.worst, used, ok=verdict.ok, text=text)


def calls(case: Case) -> list[tuple[Any, str, Any]]:
    """(library, what distinguishes it, call) of every different call that the case makes."""
    from contextlib import ExitStack

    found = []
    with ExitStack() as stack:
        watched = [(library, stack.enter_context(library.watching())) for library in _libraries()]
        devices = [case.place.device] if case.place.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            try:
                _run(case)
            # The isolation boundary: a component that cannot run fails its own trials, and says why there.
            except Exception as error:  # noqa: BLE001
                if out_of_memory(error):
                    torch.cuda.empty_cache()
        for library, seen in watched:
            found += [(library, key, call) for key, call in seen.items()]
    return [item for item in found if item[2].implementation != REFERENCE]


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


def _file() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dense-lab"
    return Path(os.environ.get("DENSE_LAB_CACHE") or default) / "verified.json"


def _read() -> dict[str, Any]:
    stored = _here or read_json(_file())
    return {name: dict(stored.get(name, {})) for name in ("cases", "verdicts")}


_here: dict[str, Any] = {}
"""What this process found, where the cache folder cannot be written."""


def _write(memory: dict[str, Any]) -> None:
    newest = {name: dict(list(entries.items())[-_REMEMBERED:]) for name, entries in memory.items()}
    try:
        write_json(_file(), newest)
    except OSError:
        _here.update(newest)
