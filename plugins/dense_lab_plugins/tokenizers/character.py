"""Characters as tokens."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from dense_lab.components import Tokenizer
from dense_lab.corpus import Encoder
from dense_lab.errors import InputError


class Character(Tokenizer):
    """The characters that occur in the training split, from token 1 on in code point order; token 0 stands for all
    others. A line feed stands between documents.
    """

    kind: Literal["character"] = "character"

    def fit(self, documents: Sequence[bytes]) -> Encoder:
        """Collects the characters; raises InputError when the text is not UTF-8."""
        return _Characters(np.unique(_code_points(documents)))


class _Characters(Encoder):
    unit = "character"

    def __init__(self, alphabet: np.ndarray[Any, np.dtype[np.uint32]]) -> None:
        self.alphabet, self.vocab_size = alphabet, len(alphabet) + 1

    def encode(self, documents: Sequence[bytes]) -> np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]:
        points = _code_points(documents)
        places = np.searchsorted(self.alphabet, points).clip(max=len(self.alphabet) - 1)
        known = self.alphabet[places] == points
        return np.where(known, places + 1, 0).astype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)


def _code_points(documents: Sequence[bytes]) -> np.ndarray[Any, np.dtype[np.uint32]]:
    try:
        text = b"\n".join(documents).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"tokenizer character: the text is not UTF-8 ({error}): use `tokenizer: byte`") from None
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
