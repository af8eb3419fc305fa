"""What Triton does around its first kernels, begun before them: with empty caches it is most of a first call.

Left alone, each kernel waits for everything before it: Triton builds the C code of its driver, reads its own 400 MB for
the key of its cache, compiles the kernel, then builds the C code of the kernel's launcher. But compilation asks the
driver only for the kind of GPU, and a launcher depends on the kernel's signature alone: all can go side by side.
Where Triton's insides are not as expected, nothing here happens and Triton does as it always does.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
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
        shape_of = _SHAPES.get(function)
        if shape_of is not None and not kwargs:
            shape = shape_of(*args)
            if shape is not None:
                first = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
                return first.new_empty(shape)
        return function(*args, **(kwargs or {}))


_Shape = tuple[int, ...]


def _shape_like(tensor: torch.Tensor, *rest: Any) -> _Shape | None:
    return tuple(tensor.shape) if tensor.is_meta and tensor.is_contiguous() and not rest else None


def _shape_of_stack(tensors: Any, *rest: Any) -> _Shape | None:
    first = tensors[0]
    alike = all(t.is_meta and t.shape == first.shape and t.dtype == first.dtype for t in tensors)
    return (len(tensors), *first.shape) if alike and not rest else None


def _shape_of_sum(tensor: torch.Tensor, *dims: Any) -> _Shape | None:
    if not tensor.is_meta or not tensor.is_floating_point() or len(dims) != 1 or not isinstance(dims[0], int):
        return None
    shape = list(tensor.shape)
    del shape[dims[0]]
    return tuple(shape)


_SHAPES: dict[Any, Callable[..., _Shape | None]] = {
    torch.empty_like: _shape_like,
    torch.zeros_like: _shape_like,
    torch.stack: _shape_of_stack,
    torch.Tensor.sum: _shape_of_sum,
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
        """Triton's own driver, which takes its place again."""
        with self._building:
            driver = triton.runtime.driver.default
            triton.runtime.driver.set_active(driver)
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
    start(_quietly, _ask_for_versions)
    key = getattr(triton.runtime.cache, "triton_key", None)
    return None if key is None else start(_quietly, key)


def _ask_for_versions() -> None:
    """Triton starts ptxas twice to ask for its version."""
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
    if source is None or "nvTmaDesc" in source or "tensordesc" in source:
        return None
    if source not in _launchers:
        _launchers[source] = start(_quietly, _build, cuda, source)
    return _launchers[source]


def _source(cuda: Any, signature: dict[str, Any]) -> Any:
    return cuda.make_launcher({}, signature, None)


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
