"""Text in local files."""

from pathlib import Path
from typing import Literal

from dense_lab.components import Data
from dense_lab.corpus import Corpus
from dense_lab.errors import InputError, Problem
from dense_lab_plugins.data._datasets import read_files
from dense_lab_plugins.data._text import TextFields

_TABLES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
"""How `datasets` calls the formats in which a file holds many documents."""


class Text(TextFields, Data):
    """A local file, or a folder of them: .jsonl and .parquet hold a document in every row, any other file is one.

    The split is in order: with one text file, `valid: 0.1` and `test: 0` train on its first 90 % and validate on the
    rest, cut at the character.
    """

    kind: Literal["text"] = "text"
    path: str
    """File or folder, absolute or relative to the current folder. Of a folder, all .txt, .jsonl and .parquet files are
    read, those in folders below as well, in order of their names."""
    field: str = "text"
    """Which field of a row holds the text, in .jsonl and .parquet files."""

    def prepare(self) -> Corpus:
        """Raises InputError when there is no such path, no such field, or too little text."""
        documents: list[bytes] = []
        for file in self._files():
            table = _TABLES.get(file.suffix.lower())
            documents += read_files(table, [file], self.field) if table else [_read(file)]
        return self.corpus(self.divided([document for document in documents if document]))

    def _files(self) -> list[Path]:
        path = Path(self.path).expanduser()
        if path.is_file():
            return [path]
        if not path.is_dir():
            message = f"no file or folder {self.path!r} (looked in {Path.cwd()}): name one, from there or in full"
            raise InputError(Problem(message, "data.path"))
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in {".txt", *_TABLES} and file.is_file())
        if not files:
            raise InputError(Problem(f"folder {self.path!r} holds no .txt, .jsonl or .parquet file", "data.path"))
        return files


def _read(file: Path) -> bytes:
    text = file.read_bytes()
    if b"\0" in text[:4096]:
        raise InputError(Problem(f"{file} is not text: it has zero bytes at its beginning", "data.path"))
    return text
