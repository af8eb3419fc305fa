"""Compiled loops in several threads: every task once, what one raises reaches the caller."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

pytest.importorskip("numba")
from dense_lab_kernels import _numba


@pytest.fixture(params=["torch's threads", "plain threads"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "plain threads":
        monkeypatch.setattr(_numba, "_OPENMP", None)
    elif _numba._OPENMP is None:
        pytest.skip("torch's OpenMP library has no GOMP_parallel")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def count(counts: Any, scratch: Any, first: int, stop: int) -> None:
    scratch[:] = first  # a share's own
    counts[first:stop] += 1
    if scratch[0] != first:
        raise AssertionError("two shares write to one scratch memory")


def counted() -> list[int]:
    counts = torch.zeros(100)
    _numba.run(count, 100, 10**6, torch.empty(2), counts)
    return counts.tolist()


@pytest.mark.usefixtures("threads")
def test_every_task_runs_once_also_from_several_callers() -> None:
    assert counted() == [1] * 100
    with ThreadPoolExecutor(4) as callers:
        assert all(found.result() == [1] * 100 for found in [callers.submit(counted) for _ in range(20)])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("failing", [0, 99])
def test_what_a_share_raises_is_raised(failing: int) -> None:
    def fail(scratch: Any, first: int, stop: int) -> None:
        if first <= failing < stop:
            raise KeyError(failing)

    with pytest.raises(KeyError, match=str(failing)):
        _numba.run(fail, 100, 10**6, torch.empty(2))
    assert counted() == [1] * 100
