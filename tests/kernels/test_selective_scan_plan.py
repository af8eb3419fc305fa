"""The launch rules of the selective scan on a GPU, which need none."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from dense_lab_kernels.selective_scan import triton_plan as plans


@pytest.mark.parametrize("channels", [1, 32, 50, 2048])
@pytest.mark.parametrize("sources", [0, 1, 2])
def test_pieces_of_time_lie_within_each_other(channels: int, sources: int) -> None:
    options = {"carried": sources > 1, "softplus": True, "gated": True, "skip": True}
    sizes = [(1, 1, 132), (1, 16, 132), (3, 200, 132), (64, 16, 132), (2, 16, 7)]
    for (batch, states, units), tokens in product(sizes, [1, 63, 64, 65, 1000, 4096, 100_000]):
        plan = plans.make_plan(torch.Size((batch, tokens, channels)), states, 1, sources, units, **options)
        plan.check()
        assert plan.spans == 1 or plan.walks_back == math.ceil(plan.spans / plan.spans_back)


@pytest.mark.parametrize("changes", [{"segment": 96}, {"span": 5, "back": 64}, {"back": 128}, {"tile": 5}], ids=str)
def test_plans_whose_pieces_do_not_fit_are_refused(changes: dict[str, int]) -> None:
    options = {"carried": True, "softplus": True, "gated": True, "skip": True}
    plan = plans.make_plan(torch.Size((1, 1000, 64)), 16, 1, 1, 132, **options)
    plan.check()
    with pytest.raises(AssertionError):
        plan._replace(**changes).check()
