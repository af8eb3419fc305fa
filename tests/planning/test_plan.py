"""What a plan says before anything runs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from dense_lab.cli import group
from dense_lab.counting import count
from dense_lab.errors import InputError
from dense_lab.planning import plan
from dense_lab.results import TRIALS
from dense_lab.space import Study
from dense_lab.speeds import REHEARSED, Speeds
from dense_lab.training.device import choose_place
from tests.planning.many import arms
from tests.spec.studies import of, study

DATA = "data: {kind: python_source, tokenizer: byte, seq_len: 32}\n"
TRAIN = "train: {tokens: 8k, batch_tokens: 256, valid_tokens: 1k, test_tokens: 1k}\n"
ARMS = of(
    f"name: small\n{DATA}{TRAIN}"
    """model: {depth: 3, ffn: swiglu}
budget: {params: 60k, tolerance: 1%, solve: [width, ffn]}
arms:
  plain: {model.dense: none}
  dense: {model.dense.span: 2}
  mamba: {model.core: mamba, model.dense.span: 1}
baseline: plain
seeds: 3
tune: {lr: [1e-3, 2e-3], tokens: 4k}
"""
)


def test_rows_are_the_solved_arms(tmp_path: Path) -> None:
    loaded = study(tmp_path, ARMS)
    found = plan(loaded, device="cpu")
    assert [row.name for row in found.rows] == ["plain", "dense", "mamba"]
    for row in found.rows:
        model = loaded.cell(row.name, 0).model
        counts = count(model, 256)
        assert (row.width, row.ffn_width) == (model.width, model.ffn.model_dump()["hidden"])
        assert row.non_embedding == pytest.approx(60_000, rel=0.01)
        assert (row.total, row.flops_per_token, row.state_bytes) == (counts[0], counts[2], counts[3])
        assert (row.cells, row.tuning, row.tokens) == (3, 2, 3 * 8000 + 2 * 4000)
        assert row.seconds > 0
    assert found.rows[0].parameters["dense"] == 0 < found.rows[1].parameters["dense"]
    assert (found.runs, found.tokens) == (15, 96_000)
    assert found.seconds == pytest.approx(sum(row.seconds for row in found.rows))
    assert "guessed" in found.how
    assert found.warnings == ()


def test_implementations_are_those_that_would_run(tmp_path: Path) -> None:
    chosen = plan(study(tmp_path, ARMS.replace("seq_len: 32", "seq_len: 4096")), device="cpu").implementations
    assert chosen["retnet"].keys() >= {"decay_attention", "dense_fuse", "rotate"}
    assert chosen["mamba"].keys() >= {"selective_scan", "causal_conv1d", "dense_fuse"}
    model = study(tmp_path, ARMS).cell("mamba", 0).model.build(256).initialise(0)
    import torch

    for tokens in (32, 512):  # A rehearsal is of few tokens, whatever the study's sequences have.
        ids = torch.zeros(1, tokens, dtype=torch.long)
        model.loss(ids, ids)
        assert {name: chosen["mamba"][name] for name in model.ran} == model.ran


def test_implementations_of_long_sequences_take_no_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dense_lab.model import LanguageModel

    lengths, loss = [], LanguageModel.loss
    monkeypatch.setattr(
        LanguageModel, "loss", lambda m, ids, *rest: lengths.append(ids.shape[1]) or loss(m, ids, *rest)
    )
    plan(study(tmp_path, ARMS.replace("seq_len: 32", "seq_len: 4096")), device="cpu")
    assert lengths == [REHEARSED, REHEARSED]


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (("seeds", "2"), "2 seeds: fewer than 3"),
        (("arms.dense", "{model.dense.span: 5}"), "dense: span 5 reads no more than span 2 would: there are 3 layers"),
        (("arms.plain", "{model.dense.span: 1}"), "no plain arm"),
        (("train.tokens", "1G"), "passes over it"),
        (("budget.flops_tolerance", "0.1%"), "FLOPs per token: the certificate will say NOT FAIR (limit 0%)"),
    ],
)
def test_warnings(tmp_path: Path, change: tuple[str, str], warning: str) -> None:
    found = plan(study(tmp_path, ARMS, [change]), device="cpu").warnings
    assert [text for text in found if warning in text], found


def test_untuned_and_unlike_arms_are_told(tmp_path: Path) -> None:
    lines = ARMS.splitlines()
    text = "\n".join(line for line in lines if not line.startswith(("tune:", "budget:")))
    found = plan(study(tmp_path, text, [("arms.mamba", "{model.core: mamba, model.width: 16}")]), device="cpu")
    assert any(warning.startswith("sizes differ by") for warning in found.warnings)
    found = plan(study(tmp_path, text, [("arms.mamba", "{model.core: mamba, model.width: 20}")]), device="cpu")
    assert any(warning.startswith("width is no multiple of 8: mamba (20)") for warning in found.warnings)
    assert any(warning.startswith("no `tune`") for warning in found.warnings)


def test_every_arm_that_does_not_fit_is_named(tmp_path: Path) -> None:
    odd = "{kind: retnet, heads: 64}"
    changes = [("arms.plain", f"{{model.core: {odd}}}"), ("arms.dense", f"{{model.core: {odd}, model.dense.span: 1}}")]
    with pytest.raises(InputError) as caught:
        plan(study(tmp_path, ARMS, changes), device="cpu")
    assert "arm 'plain'" in str(caught.value)
    assert "arm 'dense'" in str(caught.value)
    assert "the nearest" in str(caught.value)


def test_searches_are_shown_by_points_that_meet_every_option(tmp_path: Path) -> None:
    text = of(f"{DATA}{TRAIN}model: {{width: 32, core: {{choice: [retnet, mamba]}}}}\nsearch: {{trials: 10}}")
    found = plan(study(tmp_path, text), device="cpu")
    assert sorted(row.name for row in found.rows) == ["mamba", "retnet"]
    assert (found.runs, found.tokens) == (10, 80_000)


def finished(folder: Path, number: int, label: str, flops: float, speed: float) -> None:
    trial = folder / TRIALS / f"{number:04}"
    trial.mkdir(parents=True)
    (trial / "trial.json").write_text(json.dumps({"label": label, "params": {"arm": label, "seed": 0}}))
    metrics = {"flops_per_token": flops, "tokens_per_second": speed}
    tags = {"device": choose_place("cpu", "auto").describe()}
    (trial / "result.json").write_text(json.dumps({"status": "complete", "metrics": metrics, "tags": tags}))


def test_times_come_from_finished_runs(tmp_path: Path) -> None:
    loaded = study(tmp_path, ARMS)
    guess = {row.name: row for row in plan(loaded, device="cpu").rows}
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "study.json").write_text(json.dumps({"x-name": "small"}))
    finished(folder, 0, "plain", guess["plain"].flops_per_token, 100.0)
    found = plan(loaded, folder, "cpu")
    plain, dense, _ = found.rows
    per_run = (8000 + (8 * 1000 + 1000) / 3) / 100
    assert plain.source == "measured"
    assert plain.seconds == pytest.approx(per_run * (3 + 2 / 2))
    assert dense.source == "scaled"
    assert dense.seconds == pytest.approx(plain.seconds * dense.flops_per_token / plain.flops_per_token)
    assert "measured" in found.how
    assert "scaled" in found.how
    # An arm that has changed since is not what was measured.
    finished(folder, 1, "dense", 1.0, 100.0)
    assert plan(loaded, folder, "cpu").rows[1].source == "scaled"


def test_times_come_from_overhead_where_nothing_has_run_yet(tmp_path: Path) -> None:
    loaded = study(tmp_path, ARMS)
    dense = plan(loaded, device="cpu").rows[1]
    device = choose_place("cpu", "auto").describe()
    told = {"flops_per_token": dense.flops_per_token, "train_tokens_per_second": 200.0}
    rows = [{"arm": "dense", "twin": "m = 0", "metric": m, "dense": v, "plain": v} for m, v in told.items()]
    for where, source in ((device, "measured"), ("cuda:0 (A GPU)", "guessed")):
        (tmp_path / "overhead.json").write_text(json.dumps([{**row, "device": where} for row in rows]))
        assert plan(loaded, tmp_path, "cpu").rows[1].source == source


def test_another_device_says_nothing_about_this_one(tmp_path: Path) -> None:
    loaded = study(tmp_path, ARMS)
    train = loaded.cell("plain", 0).train
    place = choose_place("cpu", "auto")
    assert Speeds(place, {}).seconds("plain", 1e6, train)[1] == "guessed"
    assert Speeds(place, {"plain": [(1e6, 10.0)]}).seconds("plain", 1e6, train)[1] == "measured"


def run(tmp_path: Path, *args: str, **environment: str) -> Result:
    (tmp_path / "small.yaml").write_text(ARMS)
    arguments = ["plan", str(tmp_path / "small.yaml"), "--device", "cpu", "--runs", str(tmp_path / "runs"), *args]
    return CliRunner().invoke(group, arguments, catch_exceptions=False, env=environment)


def test_the_command_prints_a_table_or_json(tmp_path: Path) -> None:
    text = run(tmp_path).output
    assert "small: 15 runs on cpu" in text
    for word in ("plain", "dense", "mamba", "embedding", "3+2", "times guessed", "decay_attention by"):
        assert word in text
    told: dict[str, Any] = json.loads(run(tmp_path, "--json").output)
    assert [row["name"] for row in told["rows"]] == ["plain", "dense", "mamba"]
    assert told["rows"][1]["parameters"]["dense"] > 0
    assert not (tmp_path / "runs").exists()


def test_a_narrow_terminal_gets_fewer_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    monkeypatch.setattr("dense_lab.cli.options.console", lambda: Console(highlight=False, width=80))
    text = run(tmp_path).output
    head = next(line for line in text.splitlines() if "FLOPs" in line)
    assert head.split() == ["arm", "width", "size", "FLOPs", "state", "runs", "time"]
    assert max(map(len, text.splitlines())) <= 80
    rows = [line.split() for line in text.splitlines() if line.startswith(("  plain ", "  dense ", "  mamba "))]
    assert [len(row) for row in rows] == [8, 8, 8]  # The time has a unit.


def test_two_hundred_arms_take_seconds(tmp_path: Path) -> None:
    """About 2.5 s of processor time on a quiet machine, reading included; 25 leave room for slow and busy ones."""
    file = tmp_path / "many.yaml"
    file.write_text(arms(200))
    start = time.process_time()
    found = plan(Study.load(file), device="cpu")
    assert time.process_time() - start < 25
    assert len(found.rows) == 200
    assert all(abs(row.non_embedding / 12e6 - 1) <= 0.01 for row in found.rows)
