"""Compiled loops for the CPU: the decorator and the threads; what a loop computes with is in `_vector`.

Imported on first use only, because importing numba takes longer than most calls. Threads are plain ones started for
each call instead of numba's own: those need a threading layer that is neither safe to call from two threads nor after a
fork everywhere, and starting a thread costs some 50 microseconds.
"""

from __future__ import annotations

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
    if threads == 1:
        loop(*arrays, own[0], 0, tasks)
        return
    with ThreadPoolExecutor(threads - 1) as others:
        shares = [others.submit(loop, *arrays, own[i], cuts[i], cuts[i + 1]) for i in range(1, threads)]
        loop(*arrays, own[0], cuts[0], cuts[1])
    for share in shares:
        share.result()


def _array(argument: Any) -> Any:
    if isinstance(argument, tuple):
        return tuple(_array(x) for x in argument)
    return argument.detach().numpy() if isinstance(argument, Tensor) else argument
