"""What text sources share: split, tokenise, cut into windows. Letters: B batch, T tokens of a window, N of a split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import model_validator

from dense_lab.components import Spec, Tokenizer, TokenizerSlot
from dense_lab.corpus import Batch, Corpus, Encoder, Split
from dense_lab.errors import InputError, Problem
from dense_lab.units import Count, Fraction

Tokens = np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]
Documents = Sequence[bytes]
"""UTF-8 texts that belong together, such as files."""
Positions = np.ndarray[Any, np.dtype[np.int64]]
_SLACK = 0.1
"""How far a cut may move to a boundary of documents, as a fraction of the smallest split."""


class TextFields(Spec):
    """Fields of every source of text."""

    seq_len: Count = 256
    """Tokens of a training sequence."""
    tokenizer: TokenizerSlot = "byte"  # type: ignore[assignment]
    """How text becomes tokens."""
    valid: Fraction = 0.05
    """Fraction of the text that validates: what follows the training text."""
    test: Fraction = 0.05
    """Fraction of the text that tests: the end. 0 for none."""

    @model_validator(mode="after")
    def _training_text_remains(self) -> Self:
        if self.valid == 0:
            raise ValueError("`valid` must be above 0: models are selected by their validation loss")
        if self.valid + self.test >= 1:
            raise ValueError(f"`valid` + `test` is {self.valid + self.test:g}: nothing would be left to train on")
        return self

    def divided(self, documents: Documents) -> dict[Split, Documents]:
        """Contiguous ranges in order, cut between documents, or within one where no boundary is near enough."""
        sizes = [len(_characters(document)) for document in documents]
        bounds = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        fractions: dict[Split, float] = {"train": 1 - (self.valid + self.test), "valid": self.valid, "test": self.test}
        slack = _SLACK * min(fraction for fraction in fractions.values() if fraction)
        parts: dict[Split, Documents] = {}
        start, end = 0, 0.0
        for split, fraction in fractions.items():
            end = 1 - self.test if split == "valid" else end + fraction
            stop = _near_boundary(bounds, min(end, 1.0), slack)
            if fraction:
                parts[split] = _between(documents, bounds, start, stop)
            start = stop
        return parts

    def corpus(self, splits: dict[Split, Documents]) -> Corpus:
        """Tokenise; raises InputError when a split is too short for one sequence."""
        for split, documents in splits.items():
            if not documents:
                raise InputError(Problem(f"the {split} split is empty: give more text", "data"))
        encoder = self.tokenizer.fit(splits["train"])
        tokens = {split: encoder.encode(documents) for split, documents in splits.items()}
        for split, sequence in tokens.items():
            if len(sequence) <= self.seq_len:
                raise InputError(
                    Problem(
                        f"the {split} split has {len(sequence)} {encoder.unit}s, a sequence of {self.seq_len} needs "
                        f"{self.seq_len + 1}: lower `seq_len`, raise the split's fraction, or give more text",
                        "data.seq_len",
                    )
                )
        return TokenCorpus(tokens, encoder, self.seq_len, _fingerprint(splits, self.tokenizer, self.seq_len))


def _characters(document: bytes) -> str:
    return document.decode(errors="surrogateescape")


def _near_boundary(bounds: Positions, end: float, slack: float) -> int:
    """Character at which to cut: int(n * end), or the boundary of documents nearest to it if it is near enough."""
    total = int(bounds[-1])
    exact = int(total * end)
    nearest = int(bounds[np.abs(bounds - exact).argmin()])
    return nearest if abs(nearest - exact) <= slack * total else exact


def _between(documents: Documents, bounds: Positions, start: int, stop: int) -> list[bytes]:
    """The documents, or pieces of them, from character `start` up to `stop`."""
    parts = []
    for document, first, last in zip(documents, bounds[:-1], bounds[1:], strict=True):
        if start <= first and last <= stop:
            parts.append(document)
        elif start < last and first < stop:
            piece = _characters(document)[max(start - first, 0) : stop - first]
            parts.append(piece.encode(errors="surrogateescape"))
    return parts


def _fingerprint(splits: dict[Split, Documents], tokenizer: Tokenizer, seq_len: int) -> str:
    digest = hashlib.sha256(f"{tokenizer.model_dump_json()}/{seq_len}".encode())
    for split, documents in splits.items():
        digest.update(f"/{split}".encode())
        for document in documents:
            digest.update(len(document).to_bytes(8, "little") + document)
    return digest.hexdigest()


class TokenCorpus(Corpus):
    """Windows of T + 1 tokens cut from long arrays of tokens."""

    def __init__(self, splits: dict[Split, Tokens], encoder: Encoder, seq_len: int, fingerprint: str) -> None:
        self.vocab_size, self.unit = encoder.vocab_size, encoder.unit
        self.seq_len, self.fingerprint = seq_len, fingerprint
        self._splits = splits

    def train_batches(self, batch_size: int, seed: int, skip: int = 0) -> Iterator[Batch]:
        """Each epoch visits every window once, in an order and from an offset of its own."""
        tokens = self._splits["train"]
        windows = (len(tokens) - 1) // self.seq_len
        starts = _Epochs(windows, len(tokens) - 1 - windows * self.seq_len, self.seq_len, seed)
        for batch in _count_from(skip):
            yield self._batch(tokens, starts.between(batch * batch_size, (batch + 1) * batch_size))

    def eval_batches(self, split: Literal["valid", "test"], batch_size: int, tokens: int) -> Iterator[Batch]:
        """Windows spread evenly over the split; the last batch may be smaller."""
        sequence = self._splits.get(split)
        if sequence is None:
            return
        windows = (len(sequence) - 1) // self.seq_len
        wanted = max(1, min(windows, tokens // self.seq_len))
        starts = np.arange(wanted) * windows // wanted * self.seq_len
        for first in range(0, wanted, batch_size):
            yield self._batch(sequence, starts[first : first + batch_size])

    def tokens(self, split: Split) -> int:
        """N of a split; 0 when there is none."""
        return len(self._splits.get(split, ()))

    def _batch(self, tokens: Tokens, starts: Positions) -> Batch:
        rows = tokens[starts[:, None] + np.arange(self.seq_len + 1)].astype(np.int64)
        return Batch(torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy()))


class _Epochs:
    """The start of the i-th window ever drawn, for any i at once."""

    def __init__(self, windows: int, slack: int, seq_len: int, seed: int) -> None:
        self.windows, self.slack, self.seq_len, self.seed = windows, slack, seq_len, seed
        self._epoch, self._starts = -1, np.empty(0, np.int64)

    def between(self, first: int, last: int) -> Positions:
        """Starts of windows first, ..., last - 1."""
        starts = np.empty(last - first, np.int64)
        while first < last:
            epoch, index = divmod(first, self.windows)
            count = min(last - first, self.windows - index)
            starts[len(starts) - (last - first) :][:count] = self._order(epoch)[index : index + count]
            first += count
        return starts

    def _order(self, epoch: int) -> Positions:
        if epoch != self._epoch:
            generator = np.random.default_rng((self.seed, epoch))
            offset = generator.integers(self.slack + 1)
            self._epoch, self._starts = epoch, generator.permutation(self.windows) * self.seq_len + offset
        return self._starts


def _count_from(start: int) -> Iterator[int]:
    while True:
        yield start
        start += 1
