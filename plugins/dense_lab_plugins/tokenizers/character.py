"""Characters as tokens."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from dense_lab.components import Tokenizer
from dense_lab.corpus import Encoder
from dense_lab.errors import InputError


class Character(Tokenizer):
    """The characters that occur in the training split, in code point order; a line feed stands between documents."""

    kind: Literal["character"] = "character"

    def fit(self, documents: Sequence[bytes]) -> Encoder:
        """Collects the characters; raises InputError when the text is not UTF-8."""
        return _Characters(np.unique(_code_points(documents)))


class _Characters(Encoder):
    unit = "character"

    def __init__(self, alphabet: np.ndarray[Any, np.dtype[np.uint32]]) -> None:
        self.alphabet, self.vocab_size = alphabet, len(alphabet)

    def encode(self, documents: Sequence[bytes]) -> np.ndarray[Any, np.dtype[np.uint16 | np.uint32]]:
        points = _code_points(documents)
        tokens = np.searchsorted(self.alphabet, points).clip(max=self.vocab_size - 1)
        unknown = np.unique(points[self.alphabet[tokens] != points])
        if len(unknown):
            examples = ", ".join(repr(chr(point)) for point in unknown[:5])
            raise InputError(
                f"tokenizer character: {len(unknown)} characters of validation or test never occur in the training "
                f"text ({examples}): use `tokenizer: byte`, or split otherwise"
            )
        return tokens.astype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)


def _code_points(documents: Sequence[bytes]) -> np.ndarray[Any, np.dtype[np.uint32]]:
    try:
        text = b"\n".join(documents).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"tokenizer character: the text is not UTF-8 ({error}): use `tokenizer: byte`") from None
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
