"""Recording work on a GPU as a CUDA graph, and making less work of it before.

Torch leaves two things behind when a recording fails: its side stream as the current one, and random generators that
think they are still being recorded. `recorded` puts both back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@contextmanager
def recorded(
    graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, generators: Sequence[torch.Generator] = ()
) -> Iterator[None]:
    """Record what the block launches into `graph`; `generators` are those it draws from, besides torch's own.

    Raises RuntimeError for what cannot be recorded; every generator is then where it was before.
    """
    drawn = [torch.cuda.default_generators[stream.device.index], *generators]
    before = [generator.get_state() for generator in drawn]
    for generator in generators:
        graph.register_generator_state(generator)
    try:
        # Other threads (a tracker, a loader) may call CUDA meanwhile. The outer block restores the current stream.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
        ):
            yield
    except BaseException:
        for generator, state in zip(drawn, before, strict=True):
            fresh = torch.Generator(generator.device)
            fresh.set_state(state)
            generator.graphsafe_set_state(fresh)
        raise


class MergedProducts(TorchFunctionMode):
    """Linear maps of one and the same tensor as one product, whose parts are handed out.

    The first block entered finds out which maps read the same tensor; the following ones merge them. The weights are
    copied after the first block: later changes of them go unseen. For a token at a time: many small products wait for
    memory longer than one large one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._read: list[tuple[Tensor, list[Tensor]]] = []
        self._groups: dict[Any, _Group] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every call of torch comes by here; linear maps without a bias are caught."""
        if func is nn.functional.linear and not kwargs and (len(args) == 2 or args[2] is None):
            return (
                self._observe(args[0], args[1])
                if self._groups is None
                else self._product(args[0], args[1], self._groups)
            )
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        if self._groups is None:
            groups = [_Group(weights) for _, weights in self._read if len(weights) > 1]
            self._groups = {key: group for group in groups for key in group.keys}
            self._read.clear()
        for group in self._groups.values():
            group.forget()

    def _observe(self, x: Tensor, weight: Tensor) -> Tensor:
        for known, weights in self._read:
            if known is x:
                weights.append(weight)
                break
        else:
            self._read.append((x, [weight]))
        return nn.functional.linear(x, weight)

    def _product(self, x: Tensor, weight: Tensor, groups: dict[Any, _Group]) -> Tensor:
        group = groups.get(_key(weight))
        return nn.functional.linear(x, weight) if group is None else group.parts(x)[_key(weight)]


class _Group:
    """Maps of one tensor: their weights below each other, and the results for the tensor seen last."""

    def __init__(self, weights: list[Tensor]) -> None:
        self.keys = [_key(weight) for weight in weights]
        self._weight, self._sizes = torch.cat(weights), [len(weight) for weight in weights]
        self.forget()

    def forget(self) -> None:
        """Let the results go."""
        self._x: Tensor | None = None
        self._parts: dict[Any, Tensor] = {}

    def parts(self, x: Tensor) -> dict[Any, Tensor]:
        """The results [..., size] by weight."""
        if self._x is not x:
            self._x = x
            parts = nn.functional.linear(x, self._weight).split(self._sizes, -1)
            self._parts = dict(zip(self.keys, parts, strict=True))
        return self._parts


def _key(weight: Tensor) -> Any:
    """What is the same for a weight whenever it is cut out of its parameter."""
    return weight.data_ptr(), weight.shape
