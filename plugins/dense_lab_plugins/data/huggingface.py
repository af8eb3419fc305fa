"""Any dataset of the Hugging Face hub."""

from __future__ import annotations

import itertools
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from dense_lab.components import Data
from dense_lab.corpus import Corpus, Split
from dense_lab.errors import InputError, MachineError, Problem
from dense_lab.units import Count
from dense_lab_plugins.data._datasets import check_field, root_cause, texts
from dense_lab_plugins.data._text import Documents, TextFields

_PATIENCE = 5.0
"""Seconds to wait for the hub before saying that it cannot be reached."""


class HuggingFace(TextFields, Data):
    """A dataset of the Hugging Face hub, or a local folder laid out like one, read through `datasets`.

    Validation and test text are the dataset's own splits where `valid_split` and `test_split` name them, else they are
    cut from the end of `split`.
    """

    kind: Literal["huggingface"] = "huggingface"
    name: str
    """Name on the hub, such as `roneneldan/TinyStories`, or a local folder."""
    config: str | None = None
    """Which configuration, for datasets that have several."""
    revision: str | None = None
    """Commit or tag on the hub; pin it for results that can be repeated."""
    split: str = "train"
    """Split to train on."""
    valid_split: str | None = None
    """Split to validate on."""
    test_split: str | None = None
    """Split to test on."""
    field: str = "text"
    """Which field holds the text."""
    access: Literal["download", "stream"] = "download"
    """stream reads only the rows that are needed, without storing the dataset."""
    rows: Count | None = None
    """Read only so many rows of each split; must be given when streaming."""

    @model_validator(mode="after")
    def _streams_end(self) -> Self:
        if self.access == "stream" and self.rows is None:
            raise ValueError("`access: stream` needs `rows`: how many rows of each split to read")
        return self

    def prepare(self) -> Corpus:
        """Raises InputError (no such dataset, split or field) or MachineError (no network)."""
        if not Path(self.name).is_dir() and os.environ.get("HF_HUB_OFFLINE", "0").upper() not in ("1", "TRUE", "YES"):
            _reach_hub(self.name)
        own: dict[Split, str | None] = {"valid": self.valid_split, "test": self.test_split}
        # What the dataset brings itself is not cut from the training text as well.
        cut = self.model_copy(update={split: 0.0 for split, name in own.items() if name})
        splits = cut.divided(self._read(self.split))
        splits |= {split: self._read(name) for split, name in own.items() if name}
        return self.corpus(splits)

    def prepare_here(self) -> Corpus | None:
        """None unless it is a local folder."""
        return self.prepare() if Path(self.name).is_dir() else None

    def _read(self, split: str) -> Documents:
        import datasets

        datasets.disable_progress_bars()
        source = f"dataset {self.name!r}, split {split!r}"
        try:
            rows = datasets.load_dataset(
                self.name, self.config, split=split, revision=self.revision, streaming=self.access == "stream"
            )
            check_field(rows.features, self.field, source)
            return [text for text in texts(itertools.islice(rows, self.rows), self.field, source) if text]
        except FileNotFoundError as error:
            raise InputError(Problem(f"no dataset {self.name!r}: {root_cause(error)}", "data.name")) from error
        except OSError as error:
            raise MachineError(_offline(self.name, root_cause(error))) from error
        except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
            raise InputError(Problem(f"{source}: {root_cause(error)}", "data")) from error


def _reach_hub(name: str) -> None:
    """Raise MachineError soon when the hub cannot be reached: `datasets` would try for half a minute, silently."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(hub, method="HEAD"), timeout=_PATIENCE).close()
    except urllib.error.HTTPError:
        return  # It answers.
    except OSError as error:
        raise MachineError(_offline(name, f"{hub}: {getattr(error, 'reason', error)}")) from error


def _offline(name: str, reason: str) -> str:
    return (
        f"dataset {name!r} is on the Hugging Face hub, which cannot be reached ({reason}). Connect to the network, set "
        f"HF_HUB_OFFLINE=1 to use what is already downloaded, or give local files: `data: {{kind: text, path: ...}}`"
    )
