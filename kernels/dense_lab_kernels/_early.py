"""What Triton does around its first kernels, begun before them: with empty caches it is most of a first call.

Left alone, each kernel waits for everything before it: Triton builds the C code of its driver, reads its own 400 MB for
the key of its cache, compiles the kernel, then builds the C code of the kernel's launcher. But compilation asks the
driver only for the kind of GPU, and a launcher depends on the kernel's signature alone: all can go side by side.
Where Triton's insides are not as expected, nothing here happens and Triton does as it always does.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from itertools import pairwise
from typing import Any

import torch
import triton
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget

Start = Callable[..., "Future[Any]"]
"""Has a function done in a thread: `start(function, *arguments)`."""


class WithoutMemory(TorchFunctionMode):
    """A dry run on tensors of the device "meta" that does not wait for torch's compiler to be imported.

    torch finds the shapes of some results in Python code, at whose first use it imports sympy and its compiler: 1.1 s.
    Those that our dry runs need are found here, for the usual arguments; all other calls are torch's.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """`function(*args, **kwargs)`, or an empty tensor of the shape, dtype and device that it would have."""
        options = kwargs or {}
        known = _ANSWERS[function](*args, **options) if function in _ANSWERS else None
        return function(*args, **options) if known is None else known


def _like(tensor: torch.Tensor, **options: Any) -> torch.Tensor | None:
    strides = tensor.stride()
    if options or not tensor.is_meta:
        return None
    if tensor.is_contiguous():
        return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    if all(left > right for left, right in pairwise((*strides, 0))):  # In order, but with gaps, which are closed.
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return None


def _stacked(tensors: Any, *dim: Any, **options: Any) -> torch.Tensor | None:
    first = tensors[0]
    if dim or options or not all(t.is_meta and t.shape == first.shape and t.dtype == first.dtype for t in tensors):
        return None
    return torch.empty((len(tensors), *first.shape), dtype=first.dtype, device=first.device)


def _summed(
    tensor: torch.Tensor,
    *dims: Any,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor | None:
    if options or not (tensor.is_meta and tensor.is_floating_point()) or [*map(type, dims)] != [int]:
        return None
    shape = list(tensor.shape)
    del shape[dims[0]]
    if out is None:
        return torch.empty(shape, dtype=dtype or tensor.dtype, device=tensor.device)
    return out if out.is_meta and list(out.shape) == shape and dtype in (None, out.dtype) else None


_ANSWERS: dict[Any, Callable[..., torch.Tensor | None]] = {
    torch.empty_like: _like,
    torch.zeros_like: _like,
    torch.stack: _stacked,
    torch.Tensor.sum: _summed,
    torch.sum: _summed,
}


class _DriverToCome:
    """Stands in for Triton's driver while its C code is being built; whoever needs more than is here waits for it."""

    def __init__(self) -> None:
        self._building = threading.Lock()

    def get_current_device(self) -> int:
        return torch.cuda.current_device()

    def get_current_stream(self, device: int) -> int:
        return torch.cuda.current_stream(device).cuda_stream

    def get_current_target(self) -> GPUTarget:
        major, minor = torch.cuda.get_device_capability()
        return GPUTarget("cuda", 10 * major + minor, 32)

    def build(self) -> Any:
        """Triton's own driver, which takes its place again unless somebody has put another one there.

        Raises what Triton raises where there can be none (without a C compiler, say); Triton is then as it was before.
        """
        config, driver = triton.runtime.driver, None
        with self._building:
            try:
                driver = config.default
            finally:
                if vars(config).get("_active") is self:
                    config.set_active(driver)
        return driver

    def __getattr__(self, name: str) -> Any:
        return getattr(self.build(), name)


def begin(start: Start) -> Future[Any] | None:
    """Begin with what no kernel needs to be known for; the future is that of the cache's key, for which kernels wait.

    Triton would compute the key once per thread, at the same time, from the same files.
    """
    config = triton.runtime.driver
    if torch.version.hip is None and vars(config).get("_active", config) is None and hasattr(config, "set_active"):
        coming = _DriverToCome()
        config.set_active(coming)
        start(coming.build)
    start(_quietly, _prepare)
    key = getattr(triton.runtime.cache, "triton_key", None)
    return None if key is None else start(_quietly, key)


def _prepare() -> None:
    """The first front end imports another 40 modules (0.1 s), and ptxas is run twice to ask for its version."""
    importlib.import_module("triton.compiler.code_generator")
    triton.compiler.make_backend(triton.runtime.driver.active.get_current_target()).hash()


def read(kernel: Any) -> None:
    """Have Triton read a kernel and what it calls, for its share of the cache's key, while it hashes its own files."""
    _quietly(getattr, kernel, "cache_key")


def signature_of(kernel: Any, arguments: tuple[Any, ...], options: Any) -> dict[str, Any]:
    """Triton's type of every parameter of a launch, as its own launcher is made for."""
    *_, bind = kernel.device_caches[torch.cuda.current_device()]
    wrapped = map(triton.runtime.jit.MockTensor.wrap_dtype, arguments)
    _, specialization, _ = bind(*wrapped, **options)
    return {name: kind for name, (kind, *_) in zip(kernel.arg_names, specialization, strict=True)}


_launchers: dict[str, Future[Any]] = {}


def launcher(start: Start, kernel: Any, arguments: tuple[Any, ...], options: Any) -> Future[Any] | None:
    """Begin with a launcher's C code, which is found in Triton's cache when the kernel asks for it.

    Nothing with later Tritons, which have one launcher for all signatures; nor for tensor descriptors, whose launchers
    cannot be loaded before the driver.
    """
    cuda = sys.modules.get("triton.backends.nvidia.driver")
    if not hasattr(cuda, "make_launcher"):
        return None
    source = _quietly(lambda: _source(cuda, signature_of(kernel, arguments, options)))
    if source is None:
        return None
    if source not in _launchers:
        _launchers[source] = start(_quietly, _build, cuda, source)
    return _launchers[source]


def _source(cuda: Any, signature: dict[str, Any]) -> Any:
    described = any(word in str(signature) for word in ("tensordesc", "nvTmaDesc"))
    return None if described else cuda.make_launcher({}, signature, None)


def _build(cuda: Any, source: str) -> None:
    cuda.compile_module_from_src(
        src=source, name="__triton_launcher", library_dirs=cuda.library_dirs(), include_dirs=cuda.include_dirs,
        libraries=cuda.libraries,
    )  # fmt: skip


def _quietly(work: Callable[..., Any], *arguments: Any) -> Any:
    """`work(*arguments)`, or None where it fails: Triton does the same later, and its error is the one to see."""
    try:
        return work(*arguments)
    except Exception:  # noqa: BLE001 - whatever another Triton's insides raise
        return None
