"""What a worker gets of the machine: GPUs, threads, environment."""

import pytest

from dense_lab.search import process
from dense_lab.search.process import Share, share

FOUR = ("0", "1", "2", "3")


@pytest.mark.parametrize(
    ("device", "index", "gpus", "expected"),
    [
        ("auto", 0, FOUR, Share("cuda", "0")),
        ("auto", 3, FOUR, Share("cuda", "3")),
        ("auto", 5, FOUR, Share("cuda", "1")),
        ("cuda", 6, FOUR, Share("cuda", "2")),
        ("auto", 1, ("GPU-aa", "MIG-bb"), Share("cuda", "MIG-bb")),
        ("auto", 1, ("7",), Share("cuda", "7")),
        ("cuda:2", 0, FOUR, Share("cuda", "2")),
        ("cuda:1", 5, ("4", "6"), Share("cuda", "6")),
        ("cuda:9", 0, FOUR, Share("cuda:9", None)),
        ("auto", 2, (), Share("auto", None)),
        ("cuda", 0, (), Share("cuda", None)),
        ("cpu", 1, FOUR, Share("cpu", None)),
    ],
)
def test_every_worker_sees_one_gpu_as_device_0(device, index, gpus, expected):
    assert share(device, index, gpus) == expected


def test_eight_workers_on_four_gpus_are_two_each():
    seen = [share("auto", index, FOUR).visible for index in range(8)]
    assert sorted(seen) == sorted(FOUR * 2)


@pytest.mark.parametrize(
    ("said", "count", "expected"),
    [(None, 4, FOUR), ("", 4, FOUR), ("2,3", 2, ("2", "3")), (" 1 , 0 ", 2, ("1", "0")), ("0,9", 1, ("0",))],
)
def test_gpus_hidden_by_the_user_stay_hidden(monkeypatch, said, count, expected):
    # torch counts what CUDA_VISIBLE_DEVICES leaves.
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    assert process.visible_gpus({} if said is None else {process.VISIBLE: said}) == expected


def test_the_users_threads_win():
    assert process.threads({"OMP_NUM_THREADS": "3"}, 8) == 3
    assert process.threads({"OMP_NUM_THREADS": "many"}, 10**6) == process.threads({}, 10**6) == 1
    told = process.environment({"OMP_NUM_THREADS": "3", "HOME": "/h"}, 2, Share("cuda", "5"))
    assert told == {
        "OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "2", "NUMBA_NUM_THREADS": "2", "HOME": "/h",
        "CUDA_VISIBLE_DEVICES": "5",
    }  # fmt: skip
    assert "CUDA_VISIBLE_DEVICES" not in process.environment({}, 2, Share("cpu", None))
