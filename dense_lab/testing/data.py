"""What a data source and a tokenizer promise."""

from __future__ import annotations

import torch

from dense_lab.components import Data, Tokenizer
from dense_lab.testing.component import ComponentTests


class DataTests(ComponentTests):
    """Batches depend on the seed alone; splits are fixed."""

    def test_batches_repeat(self, component: Data) -> None:
        """The same seed gives the same batches, another one others; `skip` passes over batches."""
        corpus = component.prepare()
        torch.manual_seed(1)
        first = [next(b) for b in [corpus.train_batches(3, seed=7)] for _ in range(3)]
        torch.manual_seed(2)
        again = [next(b) for b in [component.prepare().train_batches(3, seed=7)] for _ in range(3)]
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a.inputs, b.inputs)
            assert torch.equal(a.targets, b.targets)
        assert not torch.equal(first[0].inputs, next(corpus.train_batches(3, seed=8)).inputs)
        assert torch.equal(next(corpus.train_batches(3, seed=7, skip=2)).inputs, first[2].inputs)

    def test_batches_fit(self, component: Data) -> None:
        """Shapes, types, and tokens within the vocabulary."""
        corpus = component.prepare()
        batches = [next(corpus.train_batches(3, seed=0)), *corpus.eval_batches("valid", 3, 3 * corpus.seq_len)]
        for inputs, targets in batches:
            assert inputs.shape == targets.shape
            assert inputs.shape[1] == corpus.seq_len
            assert inputs.dtype == targets.dtype == torch.int64
            assert int(inputs.min()) >= 0
            assert int(max(inputs.max(), targets.max())) < corpus.vocab_size

    def test_evaluation_is_fixed(self, component: Data) -> None:
        """Validation and test give the same batches every time, and differ from each other."""
        corpus = component.prepare()
        drawn = {
            split: torch.cat([b.inputs for b in corpus.eval_batches(split, 2, 4 * corpus.seq_len)])
            for split in ("valid", "test")
        }
        again = torch.cat([b.inputs for b in corpus.eval_batches("valid", 2, 4 * corpus.seq_len)])
        assert torch.equal(drawn["valid"], again)
        assert not torch.equal(drawn["valid"], drawn["test"])

    def test_has_a_fingerprint(self, component: Data) -> None:
        """Equal for equal data."""
        corpus = component.prepare()
        assert corpus.fingerprint
        assert corpus.fingerprint == component.prepare().fingerprint


class TokenizerTests(ComponentTests):
    """Tokens depend on the text alone."""

    def test_tokens_repeat_and_fit(self, component: Tokenizer) -> None:
        """The same text gives the same tokens, within the vocabulary; text that was never seen can be encoded too."""
        documents = ["the first document\n" * 20, "é, the second one\n" * 20]
        texts = [document.encode() for document in documents]
        encoder, again = component.fit(texts), component.fit(texts)
        assert encoder.unit
        assert encoder.vocab_size == again.vocab_size
        for seen in (texts, ["Ω ≠ \U0001f600".encode()]):
            tokens = encoder.encode(seen)
            assert tokens.ndim == 1
            assert tokens.dtype.kind == "u"
            assert len(tokens) > 0
            assert int(tokens.max()) < encoder.vocab_size
            assert (tokens == again.encode(seen)).all()
