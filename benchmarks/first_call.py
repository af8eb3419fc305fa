"""Where the time of a first call goes: what Triton does in which thread, from when to when."""

from __future__ import annotations

import functools
import importlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

# Where, name, and what to call it; what a version of Triton or of ours does not have is left out.
PARTS = [
    ("triton.runtime.driver", "_create_driver", "driver"),
    ("triton.runtime.cache", "triton_key", "key of the cache"),
    ("triton.compiler.code_generator", "ast_to_ttir", "front end"),
    ("triton.backends.nvidia.compiler.CUDABackend", "make_ttir", "passes"),
    ("triton.backends.nvidia.compiler.CUDABackend", "make_ttgir", "passes"),
    ("triton.backends.nvidia.compiler.CUDABackend", "make_llir", "LLVM"),
    ("triton.backends.nvidia.compiler.CUDABackend", "make_ptx", "LLVM"),
    ("triton.backends.nvidia.compiler.CUDABackend", "make_cubin", "ptxas"),
    ("triton.backends.nvidia.driver", "compile_module_from_src", "C code"),
    ("triton.backends.nvidia.driver", "compile_module_from_file", "C code"),
    ("triton.compiler.compiler.CompiledKernel", "_init_handles", "loading"),
    ("dense_lab_kernels.selective_scan.triton", "_launches", "dry run"),
    ("dense_lab_kernels.selective_scan.triton", "compile_once", "all compiling"),
    ("dense_lab_kernels.selective_scan.triton", "_run_forward", "launching"),
    ("dense_lab_kernels.selective_scan.triton", "_run_backward", "launching"),
]


class Span(NamedTuple):
    """Something that a thread did, in seconds of `time.perf_counter`, and the processor time of that thread in it."""

    start: float
    end: float
    busy: float
    part: str
    detail: str
    thread: str


@contextmanager
def traced() -> Iterator[list[Span]]:
    """Spans of `PARTS` within the block."""
    spans: list[Span] = []
    undo = []
    for place, name, part in PARTS:
        owner = _find(place)
        if owner is not None and name in vars(owner):
            found = vars(owner)[name]
            undo.append((owner, name, found))
            plain = found.__func__ if isinstance(found, staticmethod) else found
            wrapped = _timed(plain, part, spans)
            setattr(owner, name, staticmethod(wrapped) if isinstance(found, staticmethod) else wrapped)
    try:
        yield spans
    finally:
        for owner, name, found in undo:
            setattr(owner, name, found)


def report(spans: list[Span], start: float) -> None:
    """Print spans of a millisecond and more in order, in seconds since `start`, then what each part took together."""
    totals: dict[str, list[float]] = {}
    for span in sorted(spans):
        total = totals.setdefault(span.part, [0.0, 0.0, 0.0])
        for i, value in enumerate((span.end - span.start, span.busy, 1)):
            total[i] += value
        if span.end - span.start >= 0.001:
            times = f"{span.start - start:7.3f} to {span.end - start:7.3f} s, busy {span.busy:.3f} s"
            print(f"  {times}  {span.thread:8} {span.part} {span.detail}")
    for part, (taken, busy, count) in sorted(totals.items(), key=lambda item: -item[1][0]):
        print(f"  {part:17} {taken:6.3f} s in all, {busy:6.3f} s of it busy, {count:.0f} times", flush=True)


def _find(place: str) -> Any:
    """A module, or a class in one; None where there is none."""
    module, _, name = place.rpartition(".")
    try:
        if name.islower():
            return importlib.import_module(place)
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def _timed(function: Callable[..., Any], part: str, spans: list[Span]) -> Callable[..., Any]:
    @functools.wraps(function)
    def timed(*arguments: Any, **options: Any) -> Any:
        start, busy = time.perf_counter(), time.thread_time()
        try:
            return function(*arguments, **options)
        finally:
            named = (getattr(argument, "name", None) or getattr(argument, "__name__", None) for argument in arguments)
            detail = options.get("name") or next((name for name in named if isinstance(name, str)), "")
            thread = threading.current_thread().name.rpartition("-")[2]
            spans.append(Span(start, time.perf_counter(), time.thread_time() - busy, part, detail, thread))

    return timed
