"""Byte pair encoding, learned on the spot and kept in a cache."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from dense_lab.components import Tokenizer
from dense_lab.corpus import Encoder
from dense_lab.errors import MachineError
from dense_lab.units import Count

if TYPE_CHECKING:
    import tokenizers

CACHE_VARIABLE = "DENSE_LAB_CACHE"
"""Folder for trained tokenizers and encoded text; by default `dense-lab` in the user's cache folder."""
END = "<|end|>"
"""Ends a document; token 0."""
_log = logging.getLogger("dense_lab")
_PIECE = 1 << 10
"""Characters after which a document is cut at the next line end: many small pieces are encoded in parallel."""


class BPE(Tokenizer):
    """Byte-level byte pair encoding (Sennrich et al. 2016, arXiv 1508.07909; GPT-2's splitting of words), trained with
    the `tokenizers` library on the training split alone.
    """

    kind: Literal["bpe"] = "bpe"
    vocab: Annotated[Count, Field(ge=257)] = 4096
    """Number of tokens: 256 bytes, the end of a document, and merges. Small texts may give fewer."""

    def fit(self, documents: Sequence[bytes]) -> Encoder:
        """Train, or read what an earlier run trained on the same text."""
        key = _digest(documents, f"bpe/{self.vocab}")
        path = _cached(f"{key}.json", lambda file: self._train(documents).save(str(file)))
        return _Merges(key, path)

    def _train(self, documents: Sequence[bytes]) -> tokenizers.Tokenizer:
        from tokenizers import Tokenizer as Model
        from tokenizers import decoders, models, pre_tokenizers, trainers

        size = sum(map(len, documents)) / 1e6
        _log.info("training a tokenizer of %d entries on %.3g MB of text, once", self.vocab, size)
        model = Model(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        )
        pieces = (piece for document in documents for piece in _pieces(document))
        model.train_from_iterator(pieces, trainer)
        return model


class _Merges(Encoder):
    unit = "token"

    def __init__(self, key: str, path: Path) -> None:
        from tokenizers import Tokenizer as Model

        self.key, self.model = key, Model.from_file(str(path))
        self.vocab_size = self.model.get_vocab_size()

    def encode(self, documents: Sequence[bytes]) -> np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]:
        def save(file: Path) -> None:
            with file.open("wb") as stream:
                np.save(stream, self._encode(documents))

        tokens: np.ndarray[Any, Any] = np.load(_cached(f"{_digest(documents, self.key)}.npy", save), mmap_mode="r")
        return tokens

    def _encode(self, documents: Sequence[bytes]) -> np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]:
        dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        end = np.array([self.model.token_to_id(END)], dtype)
        pieces = [list(_pieces(document)) for document in documents]
        encoded = iter(self.model.encode_batch_fast([piece for document in pieces for piece in document]))
        parts = [end[:0]]
        for document in pieces:
            parts += [np.array(next(encoded).ids, dtype) for _ in document] + [end]
        return np.concatenate(parts[:-1])


def _pieces(document: bytes) -> Iterator[str]:
    text, start = document.decode(errors="replace"), 0
    while start < len(text):
        cut = text.find("\n", start + _PIECE) + 1 or len(text)
        yield text[start:cut]
        start = cut


def _digest(documents: Sequence[bytes], salt: str) -> str:
    digest = hashlib.sha256(salt.encode())
    for document in documents:
        digest.update(len(document).to_bytes(8, "little") + document)
    return digest.hexdigest()


def _cached(name: str, save: Callable[[Path], None]) -> Path:
    """A file of the cache, made by `save` unless it is there; workers that make it at once do not meet."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dense-lab"
    folder = Path(os.environ.get(CACHE_VARIABLE) or default)
    path = folder / name
    if path.exists():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            save(Path(scratch) / name)
            os.replace(Path(scratch) / name, path)
    except OSError as error:
        raise MachineError(
            f"cannot write the cache folder {folder} ({error}): set {CACHE_VARIABLE} to a folder that can be written"
        ) from error
    return path
