"""Decoding: the prompt in one chunkwise pass (`prefill`), then one token at a time from a state of constant size.

On a GPU the single-token step is recorded as a CUDA graph over static buffers that hold the state, which kernels update
in place; a replay costs one launch. Linear maps of one tensor become one product there, on a copy of their weights.
Elsewhere, and where a step cannot be recorded, it runs operation by operation.
Letters: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dense_lab import registry as registries
from dense_lab.errors import InputError
from dense_lab.model import LanguageModel
from dense_lab.prefill import prefill
from dense_lab.recording import MergedProducts, recorded

_WARM_UP = 2
"""Eager steps before the recording, in which kernels compile; their tokens count."""


class Sampling(NamedTuple):
    """How the next token is chosen from its logits."""

    temperature: float = 0.0
    """0 takes the most likely token."""
    top_k: int | None = None
    """Only the k most likely tokens may be drawn; None means all."""

    def choose(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Tokens [B] from logits [B, V]."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.float() / self.temperature
        if self.top_k is not None:
            least = logits.topk(min(self.top_k, logits.shape[-1]), -1).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        # The smallest of exponential variables with rates p is number i with probability p_i.
        waits = torch.empty_like(logits).exponential_(generator=generator)
        return (logits.softmax(-1) / waits).argmax(-1)


GREEDY = Sampling()


class Decoder:
    """A model with the state after a prompt; every `advance` gives one more token for each sequence.

    Changes of the model's weights after the first step go unseen on a GPU.
    """

    def __init__(
        self,
        model: LanguageModel,
        ids: Tensor,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        prompt: Literal["eager", "recorded"] = "eager",
    ) -> None:
        """ids [B, T] on the model's device; T >= 1. The model is used as it is: put it in evaluation mode before.

        prompt: how the pass over ids is run, see `prefill`.
        """
        if ids.ndim != 2 or not ids.numel():
            raise InputError(f"generate: the prompt must have shape [batch, tokens >= 1], got {list(ids.shape)}")
        self.model, self.sampling = model, sampling
        self.generator = torch.Generator(ids.device).manual_seed(seed)
        self.mode = "graph" if ids.is_cuda else "eager: no GPU"
        self._steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream = torch.cuda.Stream(ids.device) if ids.is_cuda else None
        self._products = MergedProducts() if ids.is_cuda else contextlib.nullcontext()
        with torch.no_grad():
            logits, state = prefill(model, ids, prompt)
            self._state = _buffers(state)
            self.token = sampling.choose(logits, self.generator)
            """[B] int64: the newest token of each sequence; overwritten by the next `advance`."""

    def advance(self) -> Tensor:
        """Feed the newest tokens [B] to the model and choose the next ones."""
        self._steps += 1
        if self._stream is None:
            self._step()
        elif not self._replayed():
            if self.mode == "graph" and self._steps > _WARM_UP:
                self._record(self._stream)
                if self._replayed():
                    return self.token
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._step()
            torch.cuda.current_stream().wait_stream(self._stream)
        return self.token

    def _replayed(self) -> bool:
        """Whether there was a graph to replay."""
        if self._graph is not None:
            self._graph.replay()
        return self._graph is not None

    @torch.no_grad()
    def _step(self) -> None:
        with registries.default().states_reused(), self._products:
            logits, state = self.model.step(self.token, self._state)
        old, new = (pytree.tree_leaves(tree) for tree in (self._state, state))
        # A kernel that wrote in place returned the buffer itself; layers share the buffer of their position.
        moved = {id(a): (a, b) for a, b in zip(old, new, strict=True) if isinstance(a, Tensor) and a is not b}
        for dtype in {a.dtype for a, _ in moved.values()}:
            pairs = [(a, b) for a, b in moved.values() if a.dtype == dtype]
            torch._foreach_copy_([a for a, _ in pairs], [b for _, b in pairs])  # One launch for all layers.
        self.token.copy_(self.sampling.choose(logits, self.generator))

    def _record(self, stream: torch.cuda.Stream) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with recorded(graph, stream, [self.generator] if self.sampling.temperature != 0 else []):
                self._step()
        except RuntimeError as error:  # What torch and CUDA raise for an operation that cannot be recorded.
            self.mode = f"eager: {' '.join(str(error).split())[:200]}"
            warnings.warn(f"decoding cannot be a CUDA graph and runs eagerly ({self.mode})", stacklevel=3)
        else:
            self._graph = graph


def _buffers(state: Any) -> Any:
    """The state after one pass from the start, in buffers of its own; what counts tokens (0-dimensional integers, see
    `dense_lab.modules.State`) is one buffer for all layers."""
    counters: list[Tensor] = []

    def copy(tensor: Tensor) -> Tensor:
        if tensor.ndim or tensor.is_floating_point():
            return tensor.clone()
        counters.extend([] if counters else [tensor.clone()])
        return counters[0]

    return pytree.tree_map_only(Tensor, copy, state)


def generate(
    model: LanguageModel,
    ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Tensor:
    """New tokens [B, max_new_tokens] behind the prompts ids [B, T], in the precision of the model's weights.

    temperature 0 takes the most likely token; otherwise tokens are drawn, from the `top_k` most likely ones if given,
    by a generator of their own that starts from `seed`. The model is switched to evaluation mode meanwhile.
    Raises InputError for an empty prompt or options that make no sense.
    """
    if max_new_tokens < 1 or temperature < 0 or (top_k is not None and top_k < 1):
        got = f"max_new_tokens={max_new_tokens}, temperature={temperature}, top_k={top_k}"
        raise InputError(f"generate: needs max_new_tokens >= 1, temperature >= 0 and top_k >= 1 or None, got {got}")
    training = model.training
    model.eval()
    try:
        decoder = Decoder(model, ids, Sampling(temperature, top_k), seed)
        tokens = torch.empty(len(ids), max_new_tokens, dtype=torch.int64, device=ids.device)
        tokens[:, 0] = decoder.token
        for i in range(1, max_new_tokens):
            tokens[:, i] = decoder.advance()
    finally:
        model.train(training)
    return tokens
