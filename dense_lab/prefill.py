"""The pass over a prompt, as a CUDA graph from the second prompt of a shape on where that is asked for.

Hundreds of launches over a few hundred tokens are bound by the host. What the first prompt of a shape costs remains.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dense_lab.model import LanguageModel
from dense_lab.modules import State
from dense_lab.recording import recorded

_KEPT = 4
"""Shapes of which a model keeps the pass, and with it the memory of its tensors."""
_MOST_TOKENS = 8192
"""In all sequences; longer prompts keep a GPU busy anyway."""


class Prefilled(NamedTuple):
    """What a pass over a prompt gives; if recorded, valid until the next pass over one of the same shape."""

    logits: Tensor
    """[B, V] after the last token."""
    state: tuple[State, ...]


@torch.no_grad()
def prefill(model: LanguageModel, ids: Tensor, how: Literal["eager", "recorded"] = "eager") -> Prefilled:
    """Logits after the prompts ids [B, T], and the state; "recorded" keeps a GPU's pass over a shape that returns."""
    if how == "eager" or not ids.is_cuda or ids.numel() > _MOST_TOKENS:
        return _run(model, ids)
    passes = _passes.setdefault(model, OrderedDict())
    key = _key(model, ids)
    known = passes.get(key, _Pass())
    passes[key] = known
    passes.move_to_end(key)
    if len(passes) > _KEPT:
        passes.popitem(last=False)
    return known.run(model, ids)


def _run(model: LanguageModel, ids: Tensor) -> Prefilled:
    x, state = model.features(ids)
    return Prefilled(model.head(x[:, -1]), state)


def _key(model: LanguageModel, ids: Tensor) -> Any:
    """What a recording holds for; new values in the same weights are read by a replay."""
    weights = tuple((weight.data_ptr(), weight.dtype) for weight in model.parameters())
    autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    return tuple(ids.shape), ids.device, model.training, autocast, tuple(model.kernels.items()), weights


class _Pass:
    """The pass for prompts of one shape: eager at first, so that kernels compile, then recorded."""

    def __init__(self) -> None:
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._ids: Tensor | None = None
        self._result: Prefilled | None = None

    def run(self, model: LanguageModel, ids: Tensor) -> Prefilled:
        self._calls += 1
        if self._calls == 2:
            self._record(model, ids)
        if self._graph is None or self._ids is None or self._result is None:
            return _run(model, ids)
        self._ids.copy_(ids)
        self._graph.replay()
        return self._result

    def _record(self, model: LanguageModel, ids: Tensor) -> None:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(ids.device)
        self._ids = ids.clone()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with recorded(graph, stream):
                self._result = _run(model, self._ids)
        except RuntimeError:  # What torch and CUDA raise for an operation that cannot be recorded: it stays eager.
            return
        self._graph = graph


_passes: weakref.WeakKeyDictionary[LanguageModel, OrderedDict[Any, _Pass]] = weakref.WeakKeyDictionary()
