"""An ablation that the tests share, and trainers that cost nothing."""

import random
from pathlib import Path

import pytest

from dense_lab.errors import InputError
from dense_lab.files import read_json, write_json
from dense_lab.space import Study
from tests.search import fakes

ARMS = """\
dense_lab: 1
name: s
model: {width: 16, depth: 2, core: {choice: [retnet, mamba]}}
train: {tokens: 4k, test_tokens: 256}
arms:
  plain: {model.core: retnet}
  span-1: {model: {core: retnet, dense: {span: 1}}}
  mamba: {model.core: mamba, model.core.state: 8}
baseline: plain
seeds: 2
"""


def study(tmp_path: Path, text: str = ARMS, *changes: tuple[str, str], name: str = "s.yaml") -> Study:
    """The study of `text` with some of it replaced."""
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = tmp_path / name
    path.write_text(text)
    return Study.load(path)


def complaint(tmp_path: Path, text: str, *changes: tuple[str, str]) -> str:
    """What is said about it, one problem a line, with the folder cut off."""
    with pytest.raises(InputError) as caught:
        study(tmp_path, text, *changes)
    return str(caught.value).replace(f"{tmp_path}/", "")


def train(spec, folder, **options):
    """test/loss = valid/loss = |log10(lr) + 3| + 0.1 x depth + noise of the seed; deterministic."""
    fakes.train(spec, folder, **options)
    result = read_json(folder / "result.json")
    noise = random.Random(f"{spec.seed} {spec.model.core.kind} {spec.model.depth}").gauss(0, 0.01)
    loss = fakes.loss(spec, fakes.STEPS) + 0.1 * spec.model.depth + noise
    write_json(folder / "result.json", {**result, "metrics": {**result["metrics"], "test/loss": loss}})
