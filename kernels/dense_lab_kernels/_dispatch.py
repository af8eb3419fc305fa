"""Who computes an operation: explicit, recorded, never a silent fallback.

The name of an operation fixes its mathematics. An *implementation* ("reference", "chunked", "numba", "triton", ...)
only says who computes it. Each operation calls `choose` once per call with what every implementation has to say about
the arguments at hand: `None` if it can run, else the sentence that says why not.

Precedence: the `impl=` argument, then the innermost `using(...)` block, then "auto".
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
AUTO = "auto"

_requested: ContextVar[Mapping[str, str]] = ContextVar("dense_lab_kernels_requested", default=MappingProxyType({}))
_log: ContextVar[dict[str, str] | None] = ContextVar("dense_lab_kernels_log", default=None)
_watch: ContextVar[dict[str, Call] | None] = ContextVar("dense_lab_kernels_watch", default=None)
_reuse: ContextVar[bool] = ContextVar("dense_lab_kernels_reuse", default=False)
_rehearsal: ContextVar[bool] = ContextVar("dense_lab_kernels_rehearsal", default=False)


class ImplementationError(ValueError):
    """The implementation asked for cannot run these arguments here; the message says which can."""


def choose(operation: str, impl: str, verdicts: Mapping[str, str | None]) -> str:
    """Name of the implementation to run.

    `verdicts` maps every implementation, best first, to None (it can run these arguments) or the reason why it cannot.

    Raises ImplementationError when the one asked for is unknown or cannot run, or when none can.
    """
    wanted = requested(operation, impl)
    if wanted == AUTO:
        wanted = next((name for name, reason in verdicts.items() if reason is None), AUTO)
    if verdicts.get(wanted, "unknown") is not None:
        raise ImplementationError(_explain(operation, wanted, verdicts))
    log = _log.get()
    if log is not None:
        log[operation] = wanted
    return "reference" if _rehearsal.get() and verdicts.get("reference", "") is None else wanted


class Call(NamedTuple):
    """A call of an operation, to be made again: arguments by name, tensors copied."""

    operation: str
    implementation: str
    arguments: dict[str, Any]
    gradients: str
    """"wanted", or "none" where it was made without."""


def operation(function: Callable[P, R]) -> Callable[P, R]:
    """Marks the public function of an operation, so that `watching()` sees its calls."""
    name, signature = function.__name__, inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        seen = _watch.get()
        if seen is None:
            return function(*args, **kwargs)
        arguments = dict(signature.bind(*args, **kwargs).arguments)
        arguments.pop("impl", None)
        gradients = "wanted" if torch.is_grad_enabled() else "none"
        key = f"{name} {gradients} {described(arguments)}"
        copied = copy_of(arguments) if key not in seen else {}
        with recording() as ran:
            result = function(*args, **kwargs)
        if (outer := _log.get()) is not None:
            outer.update(ran)
        if copied:
            seen[key] = Call(name, ran[name], copied, gradients)
        return result

    return call


def described(value: Any) -> str:
    """Shapes, dtypes and who wants a gradient of the tensors in a (nested) value, and the text of everything else."""
    if isinstance(value, Tensor):
        sizes = "x".join(map(str, value.shape))
        return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]{'*' if value.requires_grad else ''}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={described(item)}" for name, item in value.items())
    if isinstance(value, tuple | list):
        return f"({', '.join(map(described, value))})"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def copy_of(value: Any) -> Any:
    """The (nested) value with every tensor copied, strides too; copies want a gradient where the tensors do."""
    if isinstance(value, Tensor):
        return _copied(value).requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {name: copy_of(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        items = [copy_of(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def _copied(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if 0 in tensor.stride():
        return tensor.clone()
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def implementation(operation: str, name: str) -> Callable[..., Any]:
    """The function of the implementation `name`, imported on first use: `cpu.py` holds numba's, others `<name>.py`."""
    path = f"dense_lab_kernels.{operation}.{'cpu' if name == 'numba' else name}"
    module = sys.modules.get(path) or importlib.import_module(path)
    return getattr(module, operation)


_FILES = {"triton": "triton", "numba": "cpu", "chunked": "chunked", "reference": "reference"}
"""The file that each implementation is in."""


def implementations(operation: str) -> tuple[str, ...]:
    """Names of the implementations of an operation, whether this machine can run them or not."""
    package = f"dense_lab_kernels.{operation}"
    return tuple(name for name, file in _FILES.items() if importlib.util.find_spec(f"{package}.{file}"))


def preferring(name: str, verdicts: Mapping[str, str | None]) -> dict[str, str | None]:
    """The verdicts with that of `name` first, so that "auto" takes it whenever it can run."""
    return {name: verdicts[name], **verdicts}


def requested(operation: str, impl: str) -> str:
    """The implementation that the call, else the innermost `using(...)` block, asks for; else "auto"."""
    return impl if impl != AUTO else _requested.get().get(operation, AUTO)


def triton_verdict(operation: str, impl: str, device: torch.device, *args: Any, **kwargs: Any) -> str | None:
    """Why the operation's Triton kernels cannot run these (validated) arguments, or None when they can.

    Triton is imported only for tensors on a GPU, or when it is asked for by name under TRITON_INTERPRET=1 (tests).
    """
    if device.type != "cuda":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1" and requested(operation, impl) == "triton"
        if not interpreted:
            return f"tensors are on {device.type}"
    elif device.index != torch.cuda.current_device():
        return f"tensors are on {device}, which is not the current GPU: call within torch.cuda.device({device.index})"
    name = f"dense_lab_kernels.{operation}.triton"
    try:
        module = sys.modules.get(name) or importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return "triton is not installed"
        if error.name == name:
            return "this operation has no Triton kernel"
        raise
    return module.unsupported(*args, **kwargs)


def numba_verdict(device: torch.device) -> str | None:
    """Why compiled CPU loops cannot run on tensors of this device, or None when they can; does not import numba."""
    if device.type != "cpu":
        return f"tensors are on {device.type}"
    return None if _numba_is_installed() else "numba is not installed"


@functools.cache
def _numba_is_installed() -> bool:
    return importlib.util.find_spec("numba") is not None


def _explain(operation: str, wanted: str, verdicts: Mapping[str, str | None]) -> str:
    runnable = [name for name, reason in verdicts.items() if reason is None]
    if wanted == AUTO:
        why = "; ".join(f"{name}: {reason}" for name, reason in verdicts.items())
        return f"{operation}: no implementation can run these arguments ({why})"
    reason = verdicts.get(wanted) or f"unknown; there are {', '.join(verdicts)}"
    return f"{operation}: impl={wanted!r} cannot run here: {reason}. These can: auto, {', '.join(runnable)}"


@contextlib.contextmanager
def using(implementations: Mapping[str, str]) -> Iterator[None]:
    """Within the block, calls with impl="auto" use `{operation: implementation}` instead of choosing."""
    token = _requested.set({**_requested.get(), **implementations})
    try:
        yield
    finally:
        _requested.reset(token)


@contextlib.contextmanager
def recording() -> Iterator[dict[str, str]]:
    """Yield a dictionary that fills with `{operation: implementation that ran}` for the calls made within the block."""
    log: dict[str, str] = {}
    token = _log.set(log)
    try:
        yield log
    finally:
        _log.reset(token)


@contextlib.contextmanager
def watching() -> Iterator[dict[str, Call]]:
    """Yield a dictionary that fills with the calls made within the block, one for each set of shapes and options."""
    seen: dict[str, Call] = {}
    token = _watch.set(seen)
    try:
        yield seen
    finally:
        _watch.reset(token)


@contextlib.contextmanager
def reusing_states() -> Iterator[None]:
    """Within the block, a call without gradients may overwrite `initial_state` by the final state of a single token.

    What an operation did shows in its result: the tensor it was given, or another.
    """
    token = _reuse.set(True)
    try:
        yield
    finally:
        _reuse.reset(token)


@contextlib.contextmanager
def rehearsing() -> Iterator[None]:
    """Within the block operations run their reference, while `recording()` tells what they would have run: nothing is
    compiled."""
    token = _rehearsal.set(True)
    try:
        yield
    finally:
        _rehearsal.reset(token)


def may_reuse_states() -> bool:
    """Whether this call runs within `reusing_states()`."""
    return _reuse.get()
