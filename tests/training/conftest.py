"""A run that takes well under a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dense_lab.study import RunSpec

SMALL: dict[str, Any] = {
    "data": {"kind": "text", "seq_len": 16, "tokenizer": "character", "valid": 0.2, "test": 0.2},
    "model": {"width": 16, "depth": 2, "core": {"kind": "retnet", "heads": 2}, "dropout": 0.1},
    "train": {"tokens": 64 * 24, "batch_tokens": 64, "evaluations": 3, "valid_tokens": 128, "test_tokens": 128},
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Words in an order that nothing predicts, and their letters, which can be learned."""
    words = np.random.default_rng(0).choice(["retention ", "mamba ", "dense ", "state "], size=600)
    path = tmp_path / "text.txt"
    path.write_text("".join(words))
    return path


@pytest.fixture
def small(text: Path) -> Callable[..., RunSpec]:
    """`small({"train.lr": 0.1})` is the small run with some values changed by dotted path."""

    def make(changes: dict[str, Any] | None = None) -> RunSpec:
        tree = {part: dict(value) for part, value in SMALL.items()}
        tree["data"]["path"] = str(text)
        for path, value in (changes or {}).items():
            *above, last = path.split(".")
            node = tree
            for key in above:
                node = node.setdefault(key, {})
            node[last] = value
        return RunSpec.model_validate(tree)

    return make
