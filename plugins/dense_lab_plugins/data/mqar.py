"""Multi-query associative recall. Letters: B batch, T tokens, V vocabulary, S query slots."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from dense_lab.components import Data
from dense_lab.corpus import IGNORED, Batch, Corpus
from dense_lab.units import Count, Positive

Integers = np.ndarray[Any, np.dtype[np.int64]]
_STREAMS = {"train": 0, "valid": 1, "test": 2}
_BLOCK = 256
"""Rows of validation and test that are made at once."""


class MQAR(Data):
    """Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927; zoology's `multiquery_ar`).

    A row shows `pairs` keys, each followed by its value, then asks for every key once, in any order; the value is to
    be named where the key stands again. With seq_len 16, pairs 3, vocab 20 (keys 1-9, values 10-19), blanks zero:

        input    4 17   9 12   2 10   0  0   2  0   4  0   0  0   9  0
        target   .  .   .  .   .  .   .  .  10  .  17  .   .  .  12  .        (. is not scored)

    A key is asked at an even place; a place s slots behind the pairs is drawn with probability proportional to
    (s + 1)^(power - 1), so most questions follow soon.
    """

    kind: Literal["mqar"] = "mqar"
    seq_len: Count = 64
    """Tokens of a row; even."""
    pairs: Count = 4
    """Key-value pairs of a row; at most a quarter of seq_len."""
    vocab: Annotated[Count, Field(ge=6)] = 8192
    """V: token 0 is blank, keys are below V/2, values are not."""
    power: Positive = 0.01
    """1 spreads the questions evenly, less moves them towards the pairs."""
    blanks: Literal["random", "zero"] = "random"
    """What stands where nothing is asked: any token at random (zoology's default), or token 0."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.seq_len % 2 or self.pairs * 4 > self.seq_len:
            raise ValueError(
                f"{self.pairs} pairs need an even seq_len of at least {self.pairs * 4}, got {self.seq_len}"
            )
        if self.vocab <= self.seq_len:
            raise ValueError(f"vocab must be above seq_len {self.seq_len}, got {self.vocab}")
        return self

    def prepare(self) -> Corpus:
        """Rows are made when they are asked for."""
        return _Rows(self)

    def vocabulary(self) -> int:
        """V, known without making a row."""
        return self.vocab


class _Rows(Corpus):
    unit = "question"
    scores_accuracy = True

    def __init__(self, spec: MQAR) -> None:
        self.spec, self.vocab_size, self.seq_len = spec, spec.vocab, spec.seq_len
        self.fingerprint = hashlib.sha256(f"mqar/1/{spec.model_dump_json()}".encode()).hexdigest()

    def train_batches(self, batch_size: int, seed: int, skip: int = 0) -> Iterator[Batch]:
        """New rows for ever; the generator of batch i is seeded by (seed, i), so that any batch can be made alone."""
        index = skip
        while True:
            yield self._make(batch_size, (_STREAMS["train"], seed, index))
            index += 1

    def eval_batches(self, split: Literal["valid", "test"], batch_size: int, tokens: int) -> Iterator[Batch]:
        """Rows from a generator that training never uses; they do not depend on batch_size."""
        count = max(1, tokens // self.seq_len)
        blocks = [
            self._make(min(_BLOCK, count - first), (_STREAMS[split], 0, first)) for first in range(0, count, _BLOCK)
        ]
        inputs, targets = (torch.cat(parts) for parts in zip(*blocks, strict=True))
        for first in range(0, count, batch_size):
            yield Batch(inputs[first : first + batch_size], targets[first : first + batch_size])

    def _make(self, batch_size: int, seed: tuple[int, ...]) -> Batch:
        spec, generator = self.spec, np.random.default_rng(seed)
        half = spec.vocab // 2
        keys = 1 + _distinct(generator, batch_size, half - 1, spec.pairs)
        values = half + _distinct(generator, batch_size, spec.vocab - half, spec.pairs)
        shown = 2 * spec.pairs
        places = shown + 2 * _slots(generator, batch_size, (spec.seq_len - shown) // 2, spec.pairs, spec.power)
        inputs = np.zeros((batch_size, spec.seq_len), np.int64)
        targets = np.full_like(inputs, IGNORED)
        inputs[:, 0:shown:2], inputs[:, 1:shown:2] = keys, values
        np.put_along_axis(inputs, places, keys, 1)
        np.put_along_axis(targets, places, values, 1)
        if spec.blanks == "random":
            inputs = np.where(inputs == 0, generator.integers(spec.vocab, size=inputs.shape), inputs)
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))


def _distinct(generator: np.random.Generator, rows: int, n: int, count: int) -> Integers:
    """[rows, count] of 0, ..., n-1, none twice in a row: the first steps of a Fisher-Yates shuffle."""
    deck = np.tile(np.arange(n), (rows, 1))
    row = np.arange(rows)
    for i in range(count):
        j = generator.integers(i, n, size=rows)
        deck[row, j], deck[:, i] = deck[:, i].copy(), deck[row, j]
    return deck[:, :count]


def _slots(generator: np.random.Generator, rows: int, slots: int, count: int, power: float) -> Integers:
    """[rows, count] of S slots drawn without replacement, P(s) proportional to (s+1)^(power-1), in order of drawing.

    The largest of log P + Gumbel noise are such a draw (Kool et al. 2019, arXiv 1903.06059, section 2.3).
    """
    scores = (power - 1) * np.log(np.arange(1, slots + 1)) + generator.gumbel(size=(rows, slots))
    return np.argsort(-scores, axis=1)[:, :count]
