"""A pass in which kernels are compiled, all side by side, and nothing is launched."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any


class Compilations:
    """Those under way."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._started: list[Future[Any]] = []

    def start(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Have `work` done meanwhile; it may wait for what was started before it."""
        self._started.append(self._pool.submit(work, *arguments))
        return self._started[-1]

    def finish(self) -> None:
        """Wait; raises what a compilation raised."""
        for future in self._started:
            future.result()


_under_way: list[bool] = []
"""Whether garbage was collected when each of the present blocks began: false for all but the first."""
_counting = threading.Lock()


@contextmanager
def _no_collections() -> Iterator[None]:
    """No search for garbage: each walks all of torch's objects, and together they are a tenth of what Triton's Python
    takes. Python 3.11 also fails ("AST constructor recursion depth mismatch") where one happens while a kernel's source
    is parsed and lets another thread parse meanwhile. Blocks of several threads may overlap: the last to end counts.
    """
    with _counting:
        _under_way.append(gc.isenabled())
        gc.disable()
    try:
        yield
    finally:
        with _counting:
            if _under_way.pop():
                gc.enable()


@contextmanager
def side_by_side() -> Iterator[Compilations]:
    """What is started within the block is done when it ends. Raises what a compilation raised."""
    with _no_collections(), ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        compilations = Compilations(pool)
        yield compilations
        compilations.finish()


_current: ContextVar[Compilations | None] = ContextVar("dense_lab_kernels_ahead", default=None)


def current() -> Compilations | None:
    """Those that this call adds to, within `compiling_ahead()`."""
    return _current.get()


@contextmanager
def compiling_ahead() -> Iterator[None]:
    """Within the block Triton kernels are compiled but not launched: their results are what memory held before.

    One operation after the other would wait for its own kernels; after this all are there, in the time of the slowest.
    For other implementations it changes nothing. Raises what a compilation raised.
    """
    with side_by_side() as compilations:
        token = _current.set(compilations)
        try:
            yield
        finally:
            _current.reset(token)
