"""Multi-query associative recall. Letters: V vocabulary, S query slots."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from dense_lab.components import Data, Spec
from dense_lab.corpus import IGNORED, Batch, Corpus, Split
from dense_lab.units import Count, Positive

Integers = np.ndarray[Any, np.dtype[np.int64]]
_STREAMS = {"train": 0, "valid": 1, "test": 2}
_BLOCK = 256
"""Rows of validation and test that are made at once."""


class Rows(Spec):
    """Rows of one size."""

    seq_len: Count
    """Tokens of a row; even."""
    pairs: Count
    """Key-value pairs of a row; at most a quarter of seq_len."""
    share: Positive = 1.0
    """How often such rows are trained on, relative to the others."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.seq_len % 2 or self.pairs * 4 > self.seq_len:
            raise ValueError(
                f"{self.pairs} pairs need an even seq_len of at least {self.pairs * 4}, got {self.seq_len}"
            )
        return self


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
    mixture: tuple[Rows, ...] = ()
    """Training and validation rows of several sizes instead of one. Every batch mixes them by share; short rows end in
    unscored zeros, behind the row's own tokens."""
    tests: tuple[Rows, ...] = ()
    """Sizes that the test asks, equally many rows of each; by default those of the training."""
    vocab: Annotated[Count, Field(ge=6)] = 8192
    """V: token 0 is blank, keys are below V/2, values are not."""
    power: Positive = 0.01
    """1 spreads the questions evenly, less moves them towards the pairs."""
    blanks: Literal["random", "zero"] = "random"
    """What stands where nothing is asked: any token at random (zoology's default), or token 0."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.mixture and self.model_fields_set & {"seq_len", "pairs"}:
            raise ValueError("`mixture` lists the sizes of rows: leave out `seq_len` and `pairs`")
        longest = max(rows.seq_len for rows in (*self.sizes("train"), *self.sizes("test")))
        if self.vocab <= longest:
            raise ValueError(f"vocab must be above seq_len {longest}, got {self.vocab}")
        return self

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # What is stored must be readable again, and a mixture with a size beside it is refused.
        dumped: dict[str, Any] = handler(self)
        return {key: value for key, value in dumped.items() if not (self.mixture and key in ("seq_len", "pairs"))}

    def sizes(self, split: Split) -> tuple[Rows, ...]:
        """Sizes of a split's rows."""
        trained = self.mixture or (Rows(seq_len=self.seq_len, pairs=self.pairs),)
        return self.tests or trained if split == "test" else trained

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
        self.spec, self.vocab_size = spec, spec.vocab
        self.seq_len = max(rows.seq_len for rows in spec.sizes("train"))
        self.fingerprint = hashlib.sha256(f"mqar/2/{spec.model_dump_json()}".encode()).hexdigest()

    def train_batches(self, batch_size: int, seed: int, skip: int = 0) -> Iterator[Batch]:
        """New rows for ever; the generator of batch i is seeded by (seed, i), so that any batch can be made alone."""
        index = skip
        while True:
            yield self._mixed(batch_size, (_STREAMS["train"], seed, index))
            index += 1

    def eval_batches(self, split: Literal["valid", "test"], batch_size: int, tokens: int) -> Iterator[Batch]:
        """Rows from a generator that training never uses; they do not depend on batch_size."""
        sizes = self.spec.sizes(split)
        # Validation mixes the sizes as training does; a test asks each of them equally often, at its own length.
        for i, rows in enumerate(sizes if split == "test" else (None,)):
            count = max(1, tokens // (sum(row.seq_len for row in sizes) if rows else self.seq_len))
            blocks = []
            for first in range(0, count, _BLOCK):
                key, number = (_STREAMS[split], i, first), min(_BLOCK, count - first)
                blocks.append(
                    self._make(rows, number, np.random.default_rng(key)) if rows else self._mixed(number, key)
                )
            inputs, targets = (torch.cat(parts) for parts in zip(*blocks, strict=True))
            for first in range(0, count, batch_size):
                yield Batch(inputs[first : first + batch_size], targets[first : first + batch_size])

    def task(self, batch: Batch) -> str:
        """`64-4` for rows of 64 tokens and 4 pairs; nothing for rows of several sizes."""
        pairs = (batch.targets != IGNORED).sum(1)
        return f"{batch.inputs.shape[1]}-{pairs[0]}" if len(self.spec.tests) > 1 and (pairs == pairs[0]).all() else ""

    def _mixed(self, batch_size: int, seed: tuple[int, ...]) -> Batch:
        """Rows of all trained sizes, in random order, brought to the length of the longest."""
        generator, sizes = np.random.default_rng(seed), self.spec.sizes("train")
        if len(sizes) == 1:
            return self._make(sizes[0], batch_size, generator)
        shares = np.array([rows.share for rows in sizes])
        kinds = generator.choice(len(sizes), size=batch_size, p=shares / shares.sum())
        inputs = torch.zeros(batch_size, self.seq_len, dtype=torch.int64)
        targets = torch.full_like(inputs, IGNORED)
        for kind, rows in enumerate(sizes):
            places = torch.from_numpy(np.flatnonzero(kinds == kind))
            if len(places):
                made = self._make(rows, len(places), generator)
                inputs[places, : rows.seq_len], targets[places, : rows.seq_len] = made
        return Batch(inputs, targets)

    def _make(self, rows: Rows, number: int, generator: np.random.Generator) -> Batch:
        spec, half, shown = self.spec, self.spec.vocab // 2, 2 * rows.pairs
        keys = 1 + _distinct(generator, number, half - 1, rows.pairs)
        values = half + _distinct(generator, number, spec.vocab - half, rows.pairs)
        places = shown + 2 * _slots(generator, number, (rows.seq_len - shown) // 2, rows.pairs, spec.power)
        inputs = np.zeros((number, rows.seq_len), np.int64)
        targets = np.full_like(inputs, IGNORED)
        inputs[:, 0:shown:2], inputs[:, 1:shown:2] = keys, values
        np.put_along_axis(inputs, places, keys, 1)
        np.put_along_axis(targets, places, values, 1)
        if spec.blanks == "random":
            inputs = np.where(inputs == 0, generator.integers(spec.vocab, size=inputs.shape), inputs)
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))


def _distinct(generator: np.random.Generator, rows: int, n: int, count: int) -> Integers:
    """[rows, count] of 0, ..., n-1, none twice in a row, all such tuples alike.

    Repeats are drawn again until none is left. Nothing in this tells one value from another, so renaming the values
    leaves the distribution as it is; renaming takes any tuple to any other, so all are equally likely.
    """
    drawn: Integers = generator.integers(n, size=(rows, count))
    while True:
        order = np.argsort(drawn, axis=1, kind="stable")
        ranked = np.take_along_axis(drawn, order, 1)
        row, rank = np.nonzero(ranked[:, 1:] == ranked[:, :-1])
        if not len(row):
            return drawn
        drawn[row, order[row, rank + 1]] = generator.integers(n, size=len(row))


def _slots(generator: np.random.Generator, rows: int, slots: int, count: int, power: float) -> Integers:
    """[rows, count] of S slots drawn without replacement, P(s) proportional to (s+1)^(power-1), in order of drawing.

    The largest of log P + Gumbel noise are such a draw (Kool et al. 2019, arXiv 1903.06059, section 2.3).
    """
    scores = (power - 1) * np.log(np.arange(1, slots + 1)) + generator.gumbel(size=(rows, slots))
    return np.argsort(-scores, axis=1)[:, :count]
