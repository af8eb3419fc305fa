"""Datasets through `datasets`, from a local folder laid out like a hub repository; and what is said offline."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from dense_lab.errors import InputError, MachineError
from dense_lab_plugins.data.huggingface import HuggingFace


@pytest.fixture
def folder(tmp_path: Path) -> str:
    import pandas

    root = tmp_path / "set"
    (root / "data").mkdir(parents=True)
    for split, rows in (("train", 50), ("validation", 10)):
        frame = pandas.DataFrame({"text": [f"{split} {i:02d} " * 4 for i in range(rows)]})
        frame.to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")
    return str(root)


def text(corpus, split: str) -> str:
    rows = torch.cat([batch.inputs for batch in corpus.eval_batches(split, 4, 10**6)])
    return bytes(rows.flatten().tolist()).decode()


@pytest.mark.parametrize("access", ["download", "stream"])
def test_own_splits_and_cut_ones(folder: str, access: str) -> None:
    corpus = HuggingFace(name=folder, valid_split="validation", test=0.2, seq_len=8, access=access, rows=40).prepare()
    assert text(corpus, "valid").startswith("validation 00 ")
    assert text(corpus, "test").startswith("train 32 ")
    assert corpus.tokens("train") == 32 * 36 + 31  # 36 bytes a row, one byte between rows


def test_both_ways_of_access_give_the_same_batches(folder: str) -> None:
    fingerprints = {
        HuggingFace(name=folder, seq_len=8, access=access, rows=30).prepare().fingerprint
        for access in ("download", "stream")
    }
    assert len(fingerprints) == 1


def test_streams_need_an_end() -> None:
    with pytest.raises(ValidationError, match="needs `rows`"):
        HuggingFace(name="x/y", access="stream")


def test_unknown_split_and_field(folder: str) -> None:
    with pytest.raises(InputError, match=r"data: dataset .*split 'trian'.*Unknown split"):
        HuggingFace(name=folder, split="trian").prepare()
    with pytest.raises(InputError, match=r"no field 'txt'. Did you mean 'text'"):
        HuggingFace(name=folder, field="txt").prepare()


def test_offline_by_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tests/conftest.py` sets HF_HUB_OFFLINE before `datasets` is imported."""
    start = time.perf_counter()
    with pytest.raises(MachineError, match=r"cannot be reached .*local files"):
        HuggingFace(name="nobody/nothing").prepare()
    assert time.perf_counter() - start < 10


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port at which nobody listens stands for a machine without network."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    start = time.perf_counter()
    with pytest.raises(MachineError, match=r"which cannot be reached .*HF_HUB_OFFLINE=1"):
        HuggingFace(name="nobody/nothing").prepare()
    assert time.perf_counter() - start < 10
