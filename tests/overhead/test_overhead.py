"""Overhead of dense connections, at a size that says nothing but takes no time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from dense_lab import overhead
from dense_lab.cli import group
from dense_lab.counting import count
from dense_lab.errors import InputError
from dense_lab.overhead import NO_ARM, Options, measure, pairs, runs_of
from tests.spec.studies import of, study

SMALL = of(
    """name: small
data: {kind: python_source, tokenizer: byte, seq_len: 16}
train: {tokens: 4k, batch_tokens: 64}
model: {depth: 2, width: 16}
arms:
  plain: {model.dense: none}
  span-1: {model.dense.span: 1}
  twice: {model.dense: {span: 1, fusion: concat}}
  hybrid: {model.core: mamba, model.dense.span: 1}
baseline: plain
"""
)
QUICK = Options(rounds=3, seconds=0.001, decode_batch=2)


def test_a_twin_has_equal_widths_and_nothing_dense(tmp_path: Path) -> None:
    text = SMALL.replace("width: 16", "ffn: swiglu") + "budget: {params: 20k, tolerance: 1%, solve: [width, ffn]}\n"
    found = pairs(runs_of(study(tmp_path, text)))
    assert [pair.arm for pair in found] == ["span-1", "twice", "hybrid"]
    for pair in found:
        assert pair.plain.model.dense.span == 0
        assert pair.plain.model.width == pair.dense.model.width
        assert pair.plain.model.ffn == pair.dense.model.ffn
        # The study's own plain arm is wider, so it is nobody's twin.
        assert pair.twin == NO_ARM


def test_without_dense_connections_there_is_nothing_to_measure(tmp_path: Path) -> None:
    runs = runs_of(study(tmp_path, SMALL))
    with pytest.raises(InputError, match="no architecture of this study has dense connections"):
        pairs({"plain": runs["plain"]})


def test_rows(tmp_path: Path) -> None:
    runs = runs_of(study(tmp_path, SMALL))
    rows = measure(pairs(runs), "cpu", QUICK, lambda _: None)
    found = {(row.arm, row.metric): row for row in rows}
    metrics = ("parameters", "flops_per_token", "state_bytes", "train_tokens_per_second", "decode_tokens_per_second")
    assert set(found) == {(arm, metric) for arm in ("span-1", "twice", "hybrid") for metric in metrics}
    for arm in ("span-1", "twice", "hybrid"):
        sizes = count(runs[arm].model, 256)._asdict()
        for metric in metrics[:3]:
            row = found[arm, metric]
            assert row.dense == sizes[metric]
            assert row.ratio == row.low == row.high == row.dense / row.plain
        assert found[arm, "parameters"].ratio > 1
        assert found[arm, "state_bytes"].ratio == 1
        for metric in metrics[3:]:
            row = found[arm, metric]
            assert 0 < row.low <= row.ratio <= row.high
            assert row.rounds == 3
    assert found["span-1", "parameters"].twin == "plain"
    assert found["hybrid", "parameters"].twin == NO_ARM
    train, decode = (found["twice", metric] for metric in metrics[3:])
    assert (train.batch, train.seq_len, decode.batch) == (4, 16, 2)
    assert (train.dtype, train.device.split()[0]) == ("float32", "cpu")


def test_ratios_are_taken_within_rounds(tmp_path: Path) -> None:
    """A machine that slows down tenfold during a round slows both sides."""
    from dense_lab.training.device import choose_place

    (pair, *_) = pairs(runs_of(study(tmp_path, SMALL)))
    plain = [100.0, 10.0, 100.0, 10.0, 100.0]
    row = overhead._row(
        pair, "train_tokens_per_second", [speed / 2 for speed in plain], plain, choose_place("cpu", "auto"), 4
    )
    assert (row.low, row.ratio, row.high) == (0.5, 0.5, 0.5)


def test_the_command_writes_what_the_report_reads(tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(SMALL)
    arguments = [
        "overhead",
        str(file),
        "--device",
        "cpu",
        "--rounds",
        "2",
        "--seconds",
        "0.001",
        "--runs",
        str(tmp_path),
    ]
    result = CliRunner().invoke(group, arguments, catch_exceptions=False)
    assert "training tokens/s" in result.output
    rows = json.loads((tmp_path / "small" / "overhead.json").read_text())
    assert {row["arm"] for row in rows} == {"span-1", "twice", "hybrid"}
    asked = {"arm", "twin", "metric", "dense", "plain", "ratio", "low", "high", "rounds", "device", "dtype", "batch"}
    assert all(set(row) == asked | {"seq_len"} for row in rows)
