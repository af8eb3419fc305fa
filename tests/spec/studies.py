"""Studies that the tests of the grammar share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from dense_lab.errors import InputError
from dense_lab.space import Study

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "studies").glob("*.yaml"))
SPACE = """\
dense_lab: 1                                  # version of the grammar
name: dense-span
data: {kind: python_source, seq_len: 256}
model:
  width: 128
  depth: 6
  core:
    choice:
      - {kind: retnet, heads: {choice: [4, 2]}}
      - {kind: mamba, state: {choice: [8, 16]}}
  dense:
    choice:
      - none
      - kind: densessm
        span: {int: [1, 4]}
        transition: {projection: {choice: [identity, linear]}, gate: {choice: [linear, mlp]}}
        fusion: {choice: [add, concat, attention]}
train: {tokens: 2M, batch_tokens: 4k, lr: {float: [3e-4, 3e-2], log: true}}
search: {sampler: tpe, trials: 30, pruner: asha, objective: {minimize: valid/loss}}
x-why: the study of the design
"""
FINITE = [("train.lr", "0.01"), ("model.dense", "{choice: [none, {span: {int: [1, 2]}}]}")]
"""Overrides that leave 4 x 3 points of SPACE."""


def study(tmp_path: Path, text: str = SPACE, overrides: Sequence[tuple[str, str]] = ()) -> Study:
    """The study of `text`, read from a file."""
    file = tmp_path / "x.yaml"
    file.write_text(text)
    return Study.load(file, overrides)


def complaint(tmp_path: Path, text: str, overrides: Sequence[tuple[str, str]] = ()) -> str:
    """What is said about `text`, one problem a line, with the folder cut off."""
    with pytest.raises(InputError) as caught:
        study(tmp_path, text, overrides)
    return str(caught.value).replace(f"{tmp_path}/", "")


def of(text: str) -> str:
    """A study that says `text` besides the version."""
    return f"dense_lab: 1\n{text}"
