"""Is an implementation right, here, on this machine? Results, states and every gradient against float64.

The rule: a fast form may be at most twice as far from float64 as the reference is when it runs the same arguments in
their own, low precision (or a few roundings of its arithmetic), plus what rounding the result itself costs. "Far" is
the root mean square over a tensor; the largest single difference, which chance alone moves more, may be four times as
large, and so a single wrong element shows too. Few numbers vary more by chance: both limits are 1 + 20 / n times as
wide for a tensor of n (the 99.9 % quantile of the ratio of two root mean squares of n normal errors).

    verdict = verify("dense_fuse", "triton", {"own": own, "sources": (source,), "weight": weight})
    assert verdict.ok, verdict

    with watching() as calls:
        model.loss(inputs, targets).backward()
    verdicts = [judge(call) for call in calls.values()]
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dense_lab_kernels import _tuned
from dense_lab_kernels._checks import compute_dtype
from dense_lab_kernels._dispatch import Call, copy_of

FACTOR = 2.0  # how much farther from float64 than the plain low-precision reference, by root mean square
ROUNDINGS = 8
"""Of the arithmetic (float32 for all but float64), that any form may be off by, relative to the size of the result: the
reference may be nearer by luck. A GPU's exponential is right to two (PTX ISA, ex2.approx: 2^-22), and what is off in a
decay stays in the state for many tokens."""
MEASURES = ("rms", "largest")
Of = Literal["all", "own", "none"]


class Verdict(NamedTuple):
    """What was compared, and the tensor that used most of what it was allowed."""

    operation: str
    implementation: str
    device: str
    dtype: str
    shapes: str
    worst: str  # "output", "final_state", ...; "d" and the argument's name for a gradient
    measure: str  # "rms" or "largest" difference from float64
    error: float  # that difference; NaN where the tensor holds one
    allowed: float
    ok: bool

    @property
    def used(self) -> float:
        """Share of what is allowed; infinite for NaN."""
        return _used(self.error, self.allowed)


def _used(error: float, allowed: float) -> float:
    if error <= allowed:
        return error / allowed if allowed else 0.0
    return error / allowed if allowed and error == error else float("inf")


class Deviation(NamedTuple):
    """One measure of one tensor's difference from float64, and the most it may be."""

    name: str
    measure: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        """NaN is never within what is allowed."""
        return self.error <= self.allowed

    @property
    def used(self) -> float:
        """See `Verdict.used`."""
        return _used(self.error, self.allowed)


def verify(
    operation: str,
    implementation: str,
    arguments: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    of: Of = "all",
) -> Verdict:
    """Judge one implementation of one operation on these arguments.

    operation: "dense_fuse", ...; implementation: what its `impl=` takes. arguments: its tensors (also nested in tuples)
    by name, with the device, dtypes and shapes to judge; None for what is absent. options: its other keyword arguments.
    of: the gradients that are compared, see `run_with_gradients`.

    Raises ImplementationError when the implementation cannot run these arguments, ModuleNotFoundError for an unknown
    operation.
    """
    public = getattr(importlib.import_module(f"dense_lab_kernels.{operation}"), operation)

    def run(function: Callable[..., Any], inputs: Mapping[str, Any], **changed: Any) -> dict[str, Tensor]:
        given = {**(options or {}), **changed}
        return run_with_gradients(lambda **tensors: function(**tensors, **given), inputs, of=of)

    fast = run(public, arguments, impl=implementation)
    plain = dict(zip(fast, run(_plain_form(operation, public, arguments), arguments).values(), strict=True))
    wide = {name: torch.float64 for name, value in (options or {}).items() if isinstance(value, torch.dtype)}
    exact = run(public, as_dtype(arguments, torch.float64), **wide, impl="reference")
    worst = max(deviations(fast, plain, exact), key=lambda deviation: deviation.used)
    given = flat(tuple(arguments.values()))
    return Verdict(
        operation,
        implementation,
        str(given[0].device),
        str(given[0].dtype).removeprefix("torch."),
        ", ".join(f"{name} {_shape(value)}" for name, value in arguments.items() if value is not None),
        *worst,
        worst.ok,
    )


def _plain_form(operation: str, public: Callable[..., Any], arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """What is plain in the arguments' precision: `plain.py` where it is low and there is one, else the reference."""
    narrow = any(t.is_floating_point() and t.element_size() < 4 for t in flat(tuple(arguments.values())))
    name = f"dense_lab_kernels.{operation}.plain"
    if narrow and importlib.util.find_spec(name):
        return getattr(importlib.import_module(name), operation)
    return functools.partial(public, impl="reference")


def judge(call: Call) -> Verdict:
    """Judge the implementation that a call (of `watching()`) ran, on the call's own arguments."""
    tensors, options, of = _parts(call)
    return verify(call.operation, call.implementation, tensors, options, of)


def repeated(call: Call) -> Callable[[], None]:
    """What makes a call again, forward and, where gradients were wanted, backward; nothing else, to be timed."""
    tensors, options, of = _parts(call)
    public = getattr(importlib.import_module(f"dense_lab_kernels.{call.operation}"), call.operation)
    given = {name: copy_of(value) for name, value in tensors.items()}
    leaves = [tensor for tensor in flat(tuple(given.values())) if tensor.requires_grad and of != "none"]

    def forward() -> list[Tensor]:
        with torch.set_grad_enabled(of != "none"):
            results = flat((public(**given, **options, impl=call.implementation),))
        return [result for result in results if result.requires_grad]

    upstreams = [torch.randn_like(result) for result in forward()]

    def work() -> None:
        results = forward()
        if results:
            torch.autograd.grad(results, leaves, upstreams, allow_unused=True)

    return work


def _parts(call: Call) -> tuple[dict[str, Any], dict[str, Any], Of]:
    """Tensors, other options, and the gradients that the call wanted."""
    tensors = {name: value for name, value in call.arguments.items() if flat((value,))}
    options = {name: value for name, value in call.arguments.items() if name not in tensors}
    return tensors, options, "none" if call.gradients == "none" else "own"


def fingerprint(operation: str) -> str:
    """12 hex digits: the operation's source, all that is shared, and its tuned launch parameters.

    A verdict holds as long as this stays the same.
    """
    return hashlib.sha256(f"{_source(operation)} {_tuned.text(operation)}".encode()).hexdigest()[:12]


@functools.cache
def _source(operation: str) -> str:
    folder = Path(__file__).parent
    files = sorted([*folder.glob("*.py"), *(folder / operation).glob("*.py")])
    running = hashlib.sha256("".join(file.name for file in files).encode())
    for file in files:
        running.update(file.read_bytes())
    return running.hexdigest()


def deviations(
    fast: Mapping[str, Tensor], plain: Mapping[str, Tensor], exact: Mapping[str, Tensor], factor: float = FACTOR
) -> list[Deviation]:
    """Both measures of each tensor; the three mappings come from `run_with_gradients`.

    Raises ValueError when they do not hold the same names and shapes.
    """
    shapes = [{name: list(tensor.shape) for name, tensor in found.items()} for found in (fast, plain, exact)]
    if not shapes[0] == shapes[1] == shapes[2]:
        raise ValueError(f"names and shapes must agree, got {shapes[0]}, plain {shapes[1]}, exact {shapes[2]}")
    found = []
    for name, tensor in fast.items():
        errors, from_plain = differences(tensor, exact[name]), differences(plain[name], exact[name])
        band = rounding_band(tensor.dtype, exact[name])
        arithmetic = rounding_band(compute_dtype(tensor), exact[name])
        wide = factor * (1 + 20 / max(1, tensor.numel()))
        for i, measure in enumerate(MEASURES):
            plain_error = max(from_plain[i], ROUNDINGS * arithmetic[i])
            found.append(Deviation(name, measure, errors[i], wide * (1 + i) * (plain_error + band[i])))
    return found


def flat(results: Any) -> list[Tensor]:
    """The tensors in nested tuples or lists, in order; None is skipped."""
    return list(_named(results, "").values())


def _named(results: Any, name: str) -> dict[str, Tensor]:
    """The tensors in nested tuples or lists with their fields' names or "[i]"."""
    if isinstance(results, Tensor):
        return {name: results}
    if not isinstance(results, tuple | list):
        return {}
    fields = getattr(results, "_fields", [f"{name}[{i}]" for i in range(len(results))])
    return {key: t for field, item in zip(fields, results, strict=True) for key, t in _named(item, field).items()}


def as_dtype(inputs: Mapping[str, Any], dtype: torch.dtype, *, keep: Sequence[str] = ()) -> dict[str, Any]:
    """A detached copy of the (nested) inputs in `dtype`; the names in `keep` and what is no float stay as they are."""

    def change(_: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)

    return {name: value if name in keep else _mapped(value, change, name) for name, value in inputs.items()}


def _mapped(value: Any, change: Callable[[str, Tensor], Tensor], name: str) -> Any:
    """The nested value with every tensor changed; NamedTuples stay what they are."""
    if isinstance(value, Tensor):
        return change(name, value)
    if isinstance(value, tuple | list):
        items = [_mapped(item, change, f"{name}[{i}]") for i, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def run_with_gradients(
    function: Callable[..., Any],
    inputs: Mapping[str, Any],
    upstreams: Sequence[Tensor] | None = None,
    of: Of = "all",
) -> dict[str, Tensor]:
    """Call `function(**inputs)`; return its results and the gradient of every tensor among the (nested) inputs.

    of: "own" for the gradients of those inputs only that require one, "none" for no gradients.

    The gradients are those of sum(result * upstream) over all results; upstreams are cast to each result's dtype and
    device, None draws them from a fixed seed, so that two calls with equal shapes see the same ones.
    Keys: the fields of a NamedTuple result or "output", and "d<name>" (with "[i]" where an input is nested).
    """
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, tensor: Tensor) -> Tensor:
        copied: Tensor = copy_of(tensor).detach()
        if tensor.is_floating_point() and (of == "all" or (of == "own" and tensor.requires_grad)):
            leaves[name] = copied.requires_grad_()
        return copied

    with torch.set_grad_enabled(of != "none"):
        results = _named(function(**{name: _mapped(value, leaf, name) for name, value in inputs.items()}), "output")
    if upstreams is None:
        generator = torch.Generator().manual_seed(1234)
        upstreams = [torch.randn(result.shape, generator=generator) for result in results.values()]
    # A result may depend on no input (the first state of a convolution of width 1 is empty).
    pairs = [(r, u.to(r)) for r, u in zip(results.values(), upstreams, strict=True) if r.requires_grad]
    if pairs:
        torch.autograd.backward(*zip(*pairs, strict=True))
    found = {name: result.detach() for name, result in results.items()}
    return found | {f"d{name}": tensor.grad for name, tensor in leaves.items() if tensor.grad is not None}


def differences(tensor: Tensor, exact: Tensor) -> tuple[float, float]:
    """Root mean square and largest absolute difference from `exact`, measured in float64."""
    if tensor.numel() == 0:
        return 0.0, 0.0
    difference = (tensor.detach().double() - exact.detach().to(tensor.device, torch.float64)).abs()
    return difference.square().mean().sqrt().item(), difference.max().item()


def rounding_band(dtype: torch.dtype, exact: Tensor) -> tuple[float, float]:
    """What storing `exact` in `dtype` may cost, root mean square and largest: one unit in the last place."""
    size, largest = differences(exact, torch.zeros_like(exact))
    return torch.finfo(dtype).eps * size, torch.finfo(dtype).eps * largest


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return "x".join(map(str, value.shape)) or "number"
    return f"({', '.join(_shape(item) for item in value)})"
