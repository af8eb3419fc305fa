"""The built-in data components and tokenizers against the conformance kit."""

from __future__ import annotations

from pathlib import Path

import pytest

from dense_lab import registry, testing
from dense_lab.components import Data, Tokenizer
from dense_lab_plugins.data.huggingface import HuggingFace
from dense_lab_plugins.data.mqar import MQAR
from dense_lab_plugins.data.python_source import PythonSource
from dense_lab_plugins.data.text import Text
from dense_lab_plugins.tokenizers import bpe
from dense_lab_plugins.tokenizers.bpe import BPE
from dense_lab_plugins.tokenizers.byte import Byte
from dense_lab_plugins.tokenizers.character import Character

DATA = {cls.kind_name(): cls for cls in (HuggingFace, MQAR, PythonSource, Text)}
TOKENIZERS = {cls.kind_name(): cls for cls in (BPE, Byte, Character)}


class TestData(testing.DataTests):
    @pytest.fixture(params=sorted(DATA))
    def component(self, request: pytest.FixtureRequest, tmp_path: Path) -> Data:
        lines = "".join(f"line {i} of the text\n" for i in range(500))
        (tmp_path / "text.txt").write_text(lines)
        if request.param == "text":
            return Text(path=str(tmp_path / "text.txt"), seq_len=16)
        if request.param == "huggingface":
            return HuggingFace(name=str(tmp_path), seq_len=16)
        return DATA[request.param]()


class TestTokenizer(testing.TokenizerTests):
    @pytest.fixture(params=sorted(TOKENIZERS))
    def component(self, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
        monkeypatch.setenv(bpe.CACHE_VARIABLE, str(tmp_path))
        return TOKENIZERS[request.param]()


def test_none_is_forgotten() -> None:
    assert set(DATA) == set(registry.default().kinds("data"))
    assert set(TOKENIZERS) == set(registry.default().kinds("tokenizer"))
