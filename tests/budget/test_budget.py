"""Widths that bring architectures to one size."""

from __future__ import annotations

from pathlib import Path

import pytest

from dense_lab.budget_spec import BudgetSpec
from dense_lab.counting import count, parameters_by_part
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
    sizes = count(tight.point({}).model, vocab_size=256)
    assert abs(sizes.parameters - sizes.embedding_parameters - 150_000) <= 1500


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


def test_flops_and_state_may_be_the_budget(tmp_path: Path) -> None:
    for core in ("retnet", "mamba"):
        flops = study(tmp_path, of(f"model: {{core: {core}}}\nbudget: {{flops_per_token: 1M}}")).point({})
        vocabulary = flops.data.vocabulary()
        assert count(flops.model, vocabulary).flops_per_token == pytest.approx(1e6, rel=0.05)
        state = study(tmp_path, of(f"model: {{core: {core}}}\nbudget: {{state_bytes: 64k, tolerance: 20%}}")).point({})
        assert count(state.model, vocabulary).state_bytes == pytest.approx(64_000, rel=0.2)


def test_the_feed_forward_layer_closes_what_the_width_leaves_open(tmp_path: Path) -> None:
    text = of("model: {core: {kind: retnet, heads: 8}, ffn: FFN}\nbudget: {params: 500k, tolerance: 1%, solve: SOLVE}")
    both = text.replace("SOLVE", "[width, ffn]")
    with pytest.raises(InputError, match="no width gives 500k parameters within 1%"):
        study(tmp_path, text.replace("SOLVE", "width").replace("FFN", "swiglu")).point({})
    for ffn in ("swiglu", "torchscale"):
        model = study(tmp_path, both.replace("FFN", ffn)).point({}).model
        assert model.width % 16 == 0
        assert model.ffn.model_dump()["hidden"] % 8 == 0
        assert parameters_by_part(model, 1)["ffn"] > 0
        assert sum(parameters_by_part(model, 0).values()) == pytest.approx(500_000, rel=0.01)
    with pytest.raises(InputError, match="no widths give"):
        study(tmp_path, both.replace("FFN", "none")).point({})


def test_the_feed_forward_layer_alone(tmp_path: Path) -> None:
    text = of("model: {width: 72, core: mamba, ffn: swiglu}\nbudget: {params: 900k, tolerance: 1%, solve: ffn}")
    model = study(tmp_path, text).point({}).model
    assert model.width == 72
    assert model.ffn.model_dump()["hidden"] > 8 * 72  # As wide as it takes where the width is given.
    assert sum(parameters_by_part(model, 0).values()) == pytest.approx(900_000, rel=0.01)
    with pytest.raises(InputError, match="needs a feed-forward layer with a width of its own"):
        study(tmp_path, text.replace("swiglu", "none")).point({})


def test_blocks_with_feed_forward_layers_of_their_own(tmp_path: Path) -> None:
    blocks = "[{core: mamba, repeat: 2}, {core: {kind: retnet, heads: 2}, ffn: swiglu}]"
    text = of(f"model: {{blocks: {blocks}}}\nbudget: {{params: 300k, tolerance: 0.2%, solve: [width, ffn]}}")
    model = study(tmp_path, text).point({}).model
    assert sum(parameters_by_part(model, 0).values()) == pytest.approx(300_000, rel=0.002)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("{params: 1M, state_bytes: 64k}", "give exactly one of params, flops_per_token, state_bytes; got params and"),
        ("{flops_per_token: 1M, flops_tolerance: 1%}", "with flops_per_token, `tolerance` says it"),
        ("{tolerance: 1%}", "give exactly one of params, flops_per_token, state_bytes; got none of them"),
        ("{state_bytes: 64k, solve: [width, ffn]}", "feed-forward layers have no state"),
        ("{flops_per_token: 1M, count: all}", "leave it out with flops_per_token"),
        ("{params: 1M, solve: [ffn, ffn]}", "each once"),
        ("{params: 1M, solve: []}", "name `width`, `ffn` or both"),
    ],
)
def test_budgets_that_say_too_much_or_too_little(tmp_path: Path, budget: str, message: str) -> None:
    assert message in complaint(tmp_path, of(f"budget: {budget}"))


def test_what_the_budget_decides_is_not_written(tmp_path: Path) -> None:
    ffn = "model: {ffn: {kind: swiglu, hidden: 64}}\nbudget: {params: 1M, solve: "
    assert "x.yaml:2:29 model.ffn.hidden: the budget chooses the width of feed-forward layers" in complaint(
        tmp_path, of(ffn + "[width, ffn]}")
    )
    study(tmp_path, of(ffn + "width}"))


def test_written_as_it_was_said() -> None:
    for said in ({"params": 1000}, {"state_bytes": 64}, {"params": 1000, "solve": ["width", "ffn"]}):
        budget = BudgetSpec.model_validate(said)
        assert said.items() <= budget.model_dump(mode="json").items()
        assert BudgetSpec.model_validate_json(budget.model_dump_json()) == budget
