"""Compiled loops for the CPU: the decorator and the threads; what a loop computes with is in `_vector`.

Imported on first use only, because importing numba takes longer than most calls. Loops run in the OpenMP threads of
torch: those wait for torch's next operation by spinning for milliseconds, so that any thread beside them shares a core
with one that does nothing, and gets half of it. Where torch has another kind of threads, plain ones are started for
each call, which costs some 50 microseconds; numba's own need a threading layer that is not safe to call from two
threads everywhere.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numba
import torch
from torch import Tensor

_Loop = TypeVar("_Loop", bound=Callable[..., Any])

# A product and a sum may be fused; nothing else is loosened, so sums keep their order and NaN its meaning. Without
# numba's reference counts (_nrt), whose atomic instructions cost more than the arithmetic between them, a loop cannot
# allocate: it gets its scratch memory from `run`.
_OPTIONS = {"nogil": True, "fastmath": {"contract"}, "error_model": "numpy", "_nrt": False}


def compiled(function: _Loop) -> _Loop:
    """Compile a loop on first call, run it without the interpreter lock; kept on disk where numba finds a folder."""
    try:
        return numba.njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # numba finds no folder that it may write
        return numba.njit(**_OPTIONS)(function)


def inlined(function: _Loop) -> _Loop:
    """Compile a part of a loop into the loops that call it; Python cannot call it."""
    return numba.njit(forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, **_OPTIONS)(function)


# Vector operations that are worth a thread of their own: some 100 microseconds.
_SHARE = 20_000


def run(loop: Callable[..., None], tasks: int, cost: int, scratch: Tensor, *arguments: Any) -> None:
    """Call `loop(*arguments, scratch, first, stop)` on equal shares of `tasks`; wait for all, raise what one raised.

    Shares run in up to as many threads as torch has. cost: vector operations per task, roughly; little work stays in
    the calling thread. scratch: a tensor of the shape and dtype that each share gets uninitialised memory of. Tensors,
    alone or in tuples, are passed as arrays.
    """
    arrays = [_array(x) for x in arguments]
    threads = max(1, min(torch.get_num_threads(), tasks, tasks * cost // _SHARE))
    cuts = [tasks * i // threads for i in range(threads + 1)]
    own = torch.empty((threads, *scratch.shape), dtype=scratch.dtype).numpy()
    shares = iter(range(threads))

    def work(*_: Any) -> None:
        for i in shares:
            loop(*arrays, own[i], cuts[i], cuts[i + 1])

    if threads == 1:
        work()
    else:
        _everywhere(work, threads)


def _everywhere(work: Callable[..., None], threads: int) -> None:
    """Run `work` in as many threads, or fewer when there are not so many; wait, and raise what one raised."""
    failed: list[BaseException] = []

    @_CALLBACK
    def guarded(_: Any) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - none may pass through C code; it is raised below
            failed.append(error)

    if _OPENMP is not None:
        _OPENMP(guarded, None, threads, 0)
    else:
        with ThreadPoolExecutor(threads - 1) as others:
            for _ in range(threads - 1):
                others.submit(guarded, None)
            guarded(None)
    if failed:
        raise failed[0]


_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _openmp() -> Any:
    """GOMP_parallel(function, data, threads, flags) of the OpenMP library that torch has loaded, or None.

    It is what compilers emit for `#pragma omp parallel`, part of the interface of GNU's library and of LLVM's.
    """
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # other systems, other libraries
        return None
    parallel.argtypes, parallel.restype = (_CALLBACK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return parallel


_OPENMP = _openmp()


def _array(argument: Any) -> Any:
    if isinstance(argument, tuple):
        return tuple(_array(x) for x in argument)
    return argument.detach().numpy() if isinstance(argument, Tensor) else argument
