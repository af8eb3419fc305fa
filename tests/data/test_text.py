"""Sources of text: what is in which split, which batches come out, and what is said when they cannot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from dense_lab.corpus import Corpus
from dense_lab.errors import InputError
from dense_lab_plugins.data.python_source import PythonSource
from dense_lab_plugins.data.text import Text


@pytest.fixture
def letter(tmp_path: Path) -> Path:
    """1003 characters, no two windows of 8 alike."""
    path = tmp_path / "letter.txt"
    path.write_text("".join(f"{i:03d} " for i in range(251))[:1003])
    return path


def stream(corpus: Corpus, split: str) -> list[int]:
    """The tokens of a validation or test split, read through its batches."""
    inputs = [row for batch in corpus.eval_batches(split, 3, 10**9) for row in batch.inputs]
    return torch.cat(inputs).tolist()


def test_one_file_is_split_in_order_at_the_character(letter: Path) -> None:
    corpus = Text(path=str(letter), valid=0.1, test=0, seq_len=8, tokenizer="character").prepare()
    text = letter.read_text()
    # nanoGPT: the first int(0.9 n) characters train, the rest validates.
    assert (corpus.tokens("train"), corpus.tokens("valid"), corpus.tokens("test")) == (902, 101, 0)
    assert (corpus.vocab_size, corpus.unit) == (12, "character")
    alphabet = ["unknown", *sorted(set(text))]
    assert "".join(alphabet[token] for token in stream(corpus, "valid")) == text[902 : 902 + 12 * 8]
    assert list(corpus.eval_batches("test", 4, 100)) == []


def test_characters_that_training_never_saw_are_one_token(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab" * 45 + "abc b\U0001f600aabb")
    corpus = Text(path=str(tmp_path / "a.txt"), valid=0.1, test=0, seq_len=3, tokenizer="character").prepare()
    assert corpus.vocab_size == 3
    assert stream(corpus, "valid") == [1, 2, 0, 0, 2, 0, 1, 1, 2]


def test_a_cut_falls_between_characters_not_within(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("é" * 101)
    corpus = Text(path=str(tmp_path / "a.txt"), valid=0.5, test=0, seq_len=4).prepare()
    assert (corpus.tokens("train"), corpus.tokens("valid")) == (100, 102)  # 50 and 51 characters of two bytes


def test_targets_are_the_next_tokens(letter: Path) -> None:
    corpus = Text(path=str(letter), seq_len=16).prepare()
    data = np.frombuffer(letter.read_bytes(), np.uint8)
    for batch in (next(corpus.train_batches(5, seed=0)), next(corpus.eval_batches("valid", 5, 64))):
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64
        assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
        for row, target in zip(batch.inputs, batch.targets, strict=True):
            text = bytes([*row.tolist(), int(target[-1])])
            assert text in data.tobytes()


def test_an_epoch_visits_every_window_once(letter: Path) -> None:
    corpus = Text(path=str(letter), seq_len=8, valid=0.1, test=0.1).prepare()
    windows = (corpus.tokens("train") - 1) // 8
    batches = corpus.train_batches(windows, seed=3)
    first, second = next(batches), next(batches)
    rows = [bytes(row.tolist()) for row in first.inputs]
    assert len(set(rows)) == windows
    assert not torch.equal(first.inputs, second.inputs)
    train = letter.read_bytes()[: corpus.tokens("train")]
    starts = sorted(train.index(row) for row in rows)
    assert set(np.diff(starts)) == {8}


def test_batches_depend_on_the_seed_alone(letter: Path) -> None:
    torch.manual_seed(1)
    corpus = Text(path=str(letter), seq_len=8).prepare()
    reference = [batch for batch, _ in zip(corpus.train_batches(7, seed=1), range(60), strict=False)]
    torch.manual_seed(2)
    np.random.seed(3)
    again = Text(path=str(letter), seq_len=8).prepare()
    for skip in (0, 1, 16, 17, 59):  # 17 batches of 7 are more than the 113 windows of an epoch
        batch = next(again.train_batches(7, seed=1, skip=skip))
        assert torch.equal(batch.inputs, reference[skip].inputs)
        assert torch.equal(batch.targets, reference[skip].targets)
    assert not torch.equal(next(again.train_batches(7, seed=2)).inputs, reference[0].inputs)


def test_evaluation_is_spread_evenly_and_repeatable(letter: Path) -> None:
    corpus = Text(path=str(letter), seq_len=8, valid=0.4, test=0).prepare()
    rows = torch.cat([batch.inputs for batch in corpus.eval_batches("valid", 2, 40)])
    again = torch.cat([batch.inputs for batch in corpus.eval_batches("valid", 5, 40)])
    assert torch.equal(rows, again)
    valid = letter.read_bytes()[corpus.tokens("train") :]
    starts = [valid.index(bytes(row.tolist())) for row in rows]
    assert len(starts) == 5
    assert starts == [0, 80, 160, 240, 320]


def test_splits_share_no_document(tmp_path: Path) -> None:
    for i in range(60):
        (tmp_path / f"{i:02d}.txt").write_text(f"document {i:02d} " * 20)
    corpus = Text(path=str(tmp_path), seq_len=32, valid=0.2, test=0.2).prepare()
    valid, test = (bytes(stream(corpus, split)).decode() for split in ("valid", "test"))
    names = [{int(word) for word in text.replace("\0", " ").split() if word.isdigit()} for text in (valid, test)]
    assert names[0] == set(range(36, 48))
    assert names[1] == set(range(48, 60))
    assert valid.count("\0") == 11


def test_fingerprint_names_everything_that_fixes_the_batches(letter: Path, tmp_path: Path) -> None:
    base = {"path": str(letter), "seq_len": 8}
    copy = tmp_path / "copy.txt"
    copy.write_bytes(letter.read_bytes())
    reference = Text(**base).prepare().fingerprint
    assert Text(**base | {"path": str(copy)}).prepare().fingerprint == reference
    variants = [{"seq_len": 9}, {"valid": 0.1}, {"test": 0.0}, {"tokenizer": "character"}]
    found = {Text(**base | variant).prepare().fingerprint for variant in variants}
    copy.write_bytes(letter.read_bytes()[:-1] + b"!")
    found.add(Text(**base | {"path": str(copy)}).prepare().fingerprint)
    assert len(found | {reference}) == 6


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_of_tables_are_documents(tmp_path: Path, suffix: str) -> None:
    rows = [{"body": f"row {i} " * 10, "n": i} for i in range(40)]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import pandas

        pandas.DataFrame(rows).to_parquet(path)
    corpus = Text(path=str(path), field="body", seq_len=16, valid=0.25, test=0.25).prepare()
    assert bytes(stream(corpus, "test")).decode().startswith(("row 30 " * 10)[:60])
    with pytest.raises(InputError, match=r"has no field 'text'.*It has: body, n"):
        Text(path=str(path), seq_len=16).prepare()
    with pytest.raises(InputError, match="field 'n' of row 0 is int, not text"):
        Text(path=str(path), field="n", seq_len=16).prepare()


def test_python_source_is_read_fast_and_alike_every_time() -> None:
    first, second = PythonSource().prepare(), PythonSource().prepare()
    assert first.fingerprint == second.fingerprint
    total = sum(first.tokens(split) for split in ("train", "valid", "test"))
    assert 8e6 < total < 12e6
    assert first.tokens("valid") / total == pytest.approx(0.05, abs=0.01)
    assert first.tokens("test") / total == pytest.approx(0.05, abs=0.01)
    text = bytes(stream(first, "valid")).decode(errors="replace")
    assert "def " in text
    assert "import unittest.mock" not in text.split("\0")[0]


class TestErrors:
    def test_no_such_path(self) -> None:
        with pytest.raises(InputError, match=r"data.path: no file or folder 'nowhere.txt' \(looked in "):
            Text(path="nowhere.txt").prepare()

    def test_folder_without_text(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"holds no .txt, .jsonl or .parquet file"):
            Text(path=str(tmp_path)).prepare()

    def test_empty_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").touch()
        with pytest.raises(InputError, match="the train split is empty"):
            Text(path=str(tmp_path / "a.txt")).prepare()

    def test_binary_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.bin").write_bytes(bytes(100))
        with pytest.raises(InputError, match="is not text"):
            Text(path=str(tmp_path / "a.bin")).prepare()

    def test_broken_table(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "x"\nnothing')
        with pytest.raises(InputError, match=r"a.jsonl cannot be read as json"):
            Text(path=str(tmp_path / "a.jsonl")).prepare()

    def test_too_short_for_a_sequence(self, letter: Path) -> None:
        with pytest.raises(InputError, match="the valid split has 51 bytes, a sequence of 64 needs 65"):
            Text(path=str(letter), seq_len=64, test=0).prepare()

    def test_not_utf8(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes("é".encode("latin-1") * 1000)
        with pytest.raises(InputError, match="not UTF-8"):
            Text(path=str(tmp_path / "a.txt"), seq_len=4, tokenizer="character").prepare()
        assert Text(path=str(tmp_path / "a.txt"), seq_len=4).prepare().tokens("train") == 900

    @pytest.mark.parametrize("fractions", [{"valid": 0}, {"valid": 0.5, "test": 0.5}])
    def test_fractions(self, fractions: dict[str, float]) -> None:
        with pytest.raises(ValidationError, match=r"nothing would be left|must be above 0"):
            Text(path="x", **fractions)


def test_python_source_takes_installed_packages_in() -> None:
    plain, more = PythonSource().prepare(), PythonSource(packages=("click", "rich")).prepare()
    assert more.tokens("train") > plain.tokens("train") + 100_000
    assert more.fingerprint != plain.fingerprint
    assert more.fingerprint == PythonSource(packages=("rich", "click")).prepare().fingerprint


@pytest.mark.parametrize("name", ["no_such_package", "os.path", "this", "../x"])
def test_a_package_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(InputError, match=f"no package '{name}' is installed here"):
        PythonSource(packages=(name,)).prepare()
