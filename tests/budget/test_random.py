"""Random architectures meet random budgets, or are refused for good reason: see `tests/budget/architectures.py`."""

from __future__ import annotations

from itertools import islice

import pytest

from tests.budget.architectures import Case, built_size, cases, nearest, refusal, said, solved

SAMPLE = list(islice(cases(seed=7), 24))


@pytest.mark.parametrize("case", SAMPLE, ids=range(len(SAMPLE)))
def test_inside_the_tolerance_or_rightly_refused(case: Case) -> None:
    amount, tolerance = case.budget.amount, case.budget.tolerance
    if text := refusal(case):
        best = nearest(case)
        assert abs(best - amount) > tolerance * amount
        assert said(best) in text
    else:
        assert abs(built_size(solved(case), case.budget) - amount) <= tolerance * amount
