"""Byte pair encoding: learned on the training text alone, the same every time, kept in a cache."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from dense_lab.cli import group
from dense_lab.errors import MachineError
from dense_lab_plugins.data.text import Text
from dense_lab_plugins.tokenizers import bpe
from dense_lab_plugins.tokenizers.bpe import BPE

WORDS = ["the quick brown fox jumps over the lazy dog\n" * 40, "naïve café, 7 §\n" * 20]
DOCUMENTS = [text.encode() for text in WORDS]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(bpe.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_tokens_stand_for_the_text_and_end_documents() -> None:
    encoder = BPE(vocab=300).fit(DOCUMENTS)
    tokens = encoder.encode(DOCUMENTS)
    assert encoder.vocab_size == 300
    assert tokens.dtype == np.uint16
    end = encoder.model.token_to_id(bpe.END)
    [boundary] = np.flatnonzero(tokens == end)
    assert encoder.model.decode(tokens[:boundary].tolist()) == WORDS[0]
    assert encoder.model.decode(tokens[boundary + 1 :].tolist()) == WORDS[1]
    assert len(tokens) < sum(map(len, DOCUMENTS)) / 3


def test_any_bytes_can_be_encoded() -> None:
    encoder = BPE(vocab=257).fit([b"aaaa"])
    tokens = encoder.encode(["日本 \U0001f600\0".encode()])
    assert encoder.model.decode(tokens.tolist()) == "日本 \U0001f600\0"


def test_training_is_repeatable_and_cached(cache: Path) -> None:
    first = BPE(vocab=400).fit(DOCUMENTS)
    tokens = np.array(first.encode(DOCUMENTS))
    files = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(files) == 2
    again = BPE(vocab=400).fit(DOCUMENTS)
    assert np.array_equal(again.encode(DOCUMENTS), tokens)
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == files
    for path in cache.iterdir():
        path.unlink()
    assert np.array_equal(BPE(vocab=400).fit(DOCUMENTS).encode(DOCUMENTS), tokens)
    assert {path.name for path in cache.iterdir()} == set(files)


def test_training_is_announced_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("to be, or not to be: " * 2000)
    source = f"{{kind: text, path: {tmp_path / 'a.txt'}, seq_len: 4, tokenizer: {{kind: bpe, vocab: 280}}}}"
    (tmp_path / "s.yaml").write_text(f"dense_lab: 1\ndata: {source}")
    first, again = (CliRunner().invoke(group, ["check", str(tmp_path / "s.yaml"), "--json"]) for _ in range(2))
    assert first.stderr == "training a tokenizer of 280 entries on 0.0378 MB of text, once\n"
    assert again.stderr == ""
    assert json.loads(first.stdout)["valid"]


def test_only_training_text_is_learned(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abcabcabd " * 90 + "xyzzyxyzzy" * 10)
    Text(path=str(path), valid=0.1, test=0, seq_len=4, tokenizer={"kind": "bpe", "vocab": 280}).prepare()
    [learned] = [json.loads(file.read_text())["model"]["vocab"] for file in cache.glob("*.json")]
    assert any("bc" in token for token in learned)
    assert not any("yz" in token for token in learned)


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(bpe.CACHE_VARIABLE, str(tmp_path / "file" / "below"))
    with pytest.raises(MachineError, match="set DENSE_LAB_CACHE"):
        BPE(vocab=300).fit(DOCUMENTS)


def test_vocabulary_holds_all_bytes() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 257"):
        BPE(vocab=256)
