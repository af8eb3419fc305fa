"""Widths that bring architectures to one size."""

from __future__ import annotations

from pathlib import Path

import pytest

from dense_lab.budget import size_of
from dense_lab.counting import count
from dense_lab.errors import InputError
from tests.spec.studies import complaint, of, study

ARMS = "model: {depth: 2, core: {choice: [retnet, gau_retnet, mamba]}, dense: {span: {choice: [0, 2]}}}\n"


def test_every_arm_meets_the_budget(tmp_path: Path) -> None:
    arms = study(tmp_path, of(ARMS + "budget: {params: 200k, tolerance: 10%}"))
    sizes = {}
    for point in arms.grid():
        run = arms.point(point)
        sizes[tuple(point.values())] = counts = count(run.model, vocab_size=256)
        assert counts.parameters - counts.embedding_parameters == pytest.approx(200_000, rel=0.1), point
        assert run.model.width % 8 == 0, point
    assert len(sizes) == 6


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_all_parameters_may_be_counted(tmp_path: Path, head: str) -> None:
    text = of(f"model: {{head: {head}, core: mamba}}\nbudget: {{params: 200k, count: all, tolerance: 2%}}")
    run = study(tmp_path, text).point({})
    assert count(run.model, vocab_size=256).parameters == pytest.approx(200_000, rel=0.02)


def test_a_tighter_tolerance_gives_up_round_widths(tmp_path: Path) -> None:
    text = of("model: {core: mamba}\nbudget: {params: 150k, tolerance: {}}")
    loose, tight = (study(tmp_path, text.replace("{}", tolerance)) for tolerance in ("15%", "1%"))
    assert loose.point({}).model.width % 8 == 0
    assert tight.point({}).model.width % 8
    assert tight.budget is not None
    assert abs(size_of(tight.point({}), tight.budget) - 150_000) <= 1500


def test_no_width_fits(tmp_path: Path) -> None:
    text = of("model: {core: {kind: retnet, heads: 8}, depth: 3}\nbudget: {params: 200k, tolerance: 1%}")
    with pytest.raises(InputError) as caught:
        study(tmp_path, text).check_sizes()
    said = str(caught.value)
    assert (
        "x.yaml:3:9 budget: no width gives 200k parameters within 1%: the nearest are 154k at width 80 and 222k" in said
    )
    assert "raise `budget.tolerance`" in said


def test_what_is_wrong_besides_the_width_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no dense-able stream 'u'"):
        study(tmp_path, of("model: {dense: {sites: [u]}}\nbudget: {params: 200k}")).point({})


def test_other_things_to_solve_for_are_refused(tmp_path: Path) -> None:
    said = complaint(tmp_path, of("budget: {params: 200k, solve: depth}"))
    assert said == "x.yaml:2:31 budget.solve: expected 'width' or 'ffn', got 'depth'. Did you mean 'width'?"
