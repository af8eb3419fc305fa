"""What a data component prepares: token batches that depend on the seed and on nothing else.

Letters: B batch, T tokens, N tokens of a whole text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

Split = Literal["train", "valid", "test"]
IGNORED = -100
"""Target value of positions that are not scored."""


class Batch(NamedTuple):
    """Inputs and the token to be predicted at each position."""

    inputs: Tensor
    """[B, T] int64."""
    targets: Tensor
    """[B, T] int64; IGNORED where nothing is scored."""


class Encoder(ABC):
    """Turns text into tokens."""

    vocab_size: int
    unit: str
    """What one token is: `byte`, `character`, `token`."""

    @abstractmethod
    def encode(self, documents: Sequence[bytes]) -> np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]:
        """Tokens [N], unsigned, of UTF-8 documents joined by whatever separates them; InputError if it cannot."""


class Corpus(ABC):
    """Tokenised text or a task, split into train, valid and test, which are disjoint."""

    vocab_size: int
    seq_len: int
    """T of every batch."""
    unit: str
    """What one token is, for `nats per <unit>`: `byte`, `character`, `token`."""
    fingerprint: str
    """sha256 over everything that fixes the batches: text, tokenizer, split, sequence length."""
    scores_accuracy: bool = False
    """Whether accuracy at the scored positions is worth reporting (recall tasks)."""

    @abstractmethod
    def train_batches(self, batch_size: int, seed: int, skip: int = 0) -> Iterator[Batch]:
        """Endless batches from a generator of their own; `skip` batches are passed over without being made."""

    @abstractmethod
    def eval_batches(self, split: Literal["valid", "test"], batch_size: int, tokens: int) -> Iterator[Batch]:
        """The same batches every time: about `tokens` tokens spread evenly over the split (all of it if smaller)."""

    def task(self, batch: Batch) -> str:
        """Which of several tasks an evaluation batch asks, where each has an accuracy of its own, or nothing."""
        return ""

    def tokens(self, split: Split) -> int | None:
        """Number of tokens in a split, or None when it is generated or streamed."""
        return None
