"""Shared by all tests: the GPU marker, and a quiet, offline environment."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DENSE_LAB_VERIFY", "off")  # Hundreds of tiny runs need no proof of the same kernels each.


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full-product", action="store_true", help="every combination of components instead of every pair"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU: run `make gpu-test` on a GPU host"))
