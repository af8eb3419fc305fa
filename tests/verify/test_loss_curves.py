"""The benchmark that trains with kernels and with references, at a size that takes seconds."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dense_lab.corpus import Batch, Corpus

FILE = Path(__file__).parents[2] / "benchmarks" / "loss_curves.py"


class Text(Corpus):
    """Bytes that repeat themselves."""

    vocab_size, scores_accuracy = 16, False

    def train_batches(self, size: int, seed: int, skip: int = 0):
        generator = torch.Generator().manual_seed(seed)
        while True:
            ids = torch.randint(4, (size, 13), generator=generator).repeat(1, 2)
            yield Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())

    def eval_batches(self, split: str, size: int, tokens: int):
        yield next(self.train_batches(size, 99))


@pytest.fixture
def curves(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("loss_curves", FILE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "loss_curves", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def found(curves: ModuleType) -> list:
    place = curves.choose_place("cpu", "fp32")
    plan = curves.Plan(["mamba dense"], seeds=3, twins=2, references=1, exact=1)
    return [curves.run(Text(), "mamba dense", by, start, place, curves.Size(2, 24, 3)) for by, start in plan.runs()]


def test_kernels_train_as_references_do(curves: ModuleType, found: list, tmp_path: Path, capsys) -> None:
    assert [curve.ran for curve in found[:4]] == ["numba,reference"] * 4
    assert [curve.ran for curve in found[4:]] == ["reference"] * 2
    assert found[5].train == found[4].train  # Here both are in float32.
    assert found[0].train == pytest.approx(found[4].train, abs=1e-4)
    assert found[0].train != found[1].train
    assert curves.compare(found)
    said = capsys.readouterr().out
    assert "mamba dense" in said
    assert f"in float32 {found[5].valid:.4f} (1 twins)" in said
    curves.draw(found, tmp_path / "curves.svg")
    assert "references" in (tmp_path / "curves.svg").read_text()


def test_a_difference_beyond_the_noise_is_told(curves: ModuleType, found: list, capsys) -> None:
    assert not curves.compare([*found[:4], found[4]._replace(valid=found[4].valid + 1)])
    assert "BEYOND" in capsys.readouterr().out
