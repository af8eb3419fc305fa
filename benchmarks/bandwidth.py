"""What the benchmarks of operations share: times from replayed graphs and eager calls, and the copy that bounds them.

A replayed CUDA graph of many calls leaves out what Python and the launches cost; the calls rotate among several sets of
inputs, so that none finds the last one's in the L2 cache.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from dense_lab_kernels.verify import verify

CALLS = 12  # per graph


class Timing(NamedTuple):
    """Milliseconds per call: median and the 10 % and 90 % points over replays."""

    median: float
    low: float
    high: float


def graphed(calls: Sequence[Callable[[], Any]], prepare: Callable[[], Any] | None = None, replays: int = 50) -> Timing:
    """Time of one call, when `calls` follow each other in one graph. `prepare` runs first, on the same stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        if prepare is not None:
            prepare()
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = [calls[i % len(calls)]() for i in range(CALLS)]
    del kept
    graph.replay()
    return _timed(graph.replay, replays, CALLS)


def eager(calls: Sequence[Callable[[], Any]], rounds: int = 20, count: int = CALLS) -> Timing:
    """Time of one call, when `count` of them follow each other as Python makes them: the host's if that is longer."""
    for call in calls:
        call()
    torch.cuda.synchronize()

    def some() -> None:
        for i in range(count):
            calls[i % len(calls)]()

    return _timed(some, rounds, count)


def _timed(work: Callable[[], Any], rounds: int, calls: int) -> Timing:
    """Milliseconds per call of `work`, which makes `calls`."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for start, end in events:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) / calls for start, end in events)
    return Timing(times[rounds // 2], times[rounds // 10], times[rounds * 9 // 10])


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy of 4 GiB (not in a graph, where copy engines do it, slower)."""
    source = torch.ones(1 << 30, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / (_timed(lambda: target.copy_(source), 20, 1).median * 1e-3)


def line(name: str, timing: Timing, size: int, copy: float) -> str:
    """One row: microseconds, spread, GB/s of the necessary bytes, share of the copy's bandwidth."""
    median, low, high = (1e3 * t for t in timing)
    rate = size / (median * 1e-6)
    return f"{name:44} {median:9.1f} us [{low:.1f}, {high:.1f}] {rate / 1e9:8.0f} GB/s {rate / copy:6.1%} of copy"


def refuse_if_wrong(operation: str, arguments: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Exit unless the Triton form of the operation is right for these arguments: no time for a wrong result."""
    verdict = verify(operation, "triton", arguments, options)
    if not verdict.ok:
        sys.exit(f"no timing: the result is wrong: {verdict}")
