"""Bytes as tokens."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from dense_lab.components import Tokenizer
from dense_lab.corpus import Encoder


class Byte(Tokenizer):
    """The bytes of the text (UTF-8), 256 of them; byte 0 stands between documents."""

    kind: Literal["byte"] = "byte"

    def fit(self, documents: Sequence[bytes]) -> Encoder:
        """Nothing is learned."""
        return _Bytes()


class _Bytes(Encoder):
    vocab_size = 256
    unit = "byte"

    def encode(self, documents: Sequence[bytes]) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return np.frombuffer(b"\0".join(documents), dtype=np.uint8)
