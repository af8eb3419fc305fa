"""Sizes of a model: parameters by part, FLOPs, recurrent state. Counted on modules that own no memory.

A plan or a solver sizes thousands of models that are made of few different parts, so a part is built once for each
spec and width, and models that share it share the module.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from dense_lab import registry as registries
from dense_lab.block import Block, connect
from dense_lab.components import Component
from dense_lab.dense import DenseSpec
from dense_lab.errors import InputError
from dense_lab.model import BlockSpec, ModelSpec
from dense_lab.sharing import KEPT, Key, Shared, key_of, remembered, shared

PARTS = ("embedding", "core", "dense", "ffn", "norm", "head")
"""Of a model's parameters; a tied head has none of its own."""


class Counts(NamedTuple):
    """Sizes of a model."""

    parameters: int
    """All trainable numbers, tied ones once."""
    embedding_parameters: int
    """Embedding and untied head."""
    flops_per_token: float
    """Forward pass: 2 per weight of every linear map, plus each core's recurrence (Kaplan et al. 2020, table 1)."""
    state_bytes: int
    """Recurrent state of one sequence in fp32, measured from the state itself; the token counter is left out."""


def count(spec: ModelSpec, vocab_size: int) -> Counts:
    """Sizes of the model that `spec` describes; raises InputError when it cannot be built."""
    by_part = parameters_by_part(spec, vocab_size)
    outside = by_part["embedding"] + by_part["head"]
    return Counts(sum(by_part.values()), outside, flops_per_token(spec, vocab_size), state_bytes(spec))


def parameters_by_part(spec: ModelSpec, vocab_size: int) -> dict[str, int]:
    """Number of parameters of each of PARTS; raises InputError when the model cannot be built."""
    table = vocab_size * spec.width
    mixers, blocks = _built(spec)
    ffn = sum(n * _tally(block.ffn).parameters for block, n in blocks)
    norm = sum(n * (_tally(block.norm).parameters + _tally(block.ffn_norm).parameters) for block, n in blocks)
    head = table if spec.head == "untied" else 0
    sizes = (table, mixers.core, mixers.dense, ffn, norm + spec.width, head)
    return dict(zip(PARTS, sizes, strict=True))


def flops_per_token(spec: ModelSpec, vocab_size: int) -> float:
    """See `Counts`; raises InputError when the model cannot be built."""
    mixers, blocks = _built(spec)
    linear = vocab_size * spec.width + mixers.linear + sum(n * _tally(block.ffn).linear for block, n in blocks)
    return 2.0 * linear + mixers.recurrences


def state_bytes(spec: ModelSpec) -> int:
    """See `Counts`; raises InputError when the model cannot be built."""
    if any(_reads_states(layer.dense or spec.dense, layer.core, spec.width) for layer in spec.layers()):
        return _state_of_model(spec.model_dump_json())
    return sum(_state_of_core(key_of(layer.core), spec.width) for layer in spec.layers())


def _reads_states(dense: DenseSpec, core: Component, width: int) -> bool:
    """Whether some site is no stream: streams are connected without adding state."""
    if dense.span == 0 or dense.sites == "all":
        return False
    with _weightless():
        streams = shared(core).build(width).streams
    return not set(dense.sites) <= {stream.name for stream in streams}


def check_sizes(spec: ModelSpec) -> None:
    """Raise InputError, with the sentence of the component concerned, when the model cannot be built."""
    try:
        _built(spec)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"model: {error}") from error


class _NothingDrawn(TorchFunctionMode):
    """Initialisers do nothing: on the meta device they would cost more than all the rest."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _INITIALISERS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


_INITIALISERS = {getattr(nn.init, name) for name in dir(nn.init) if name.endswith("_") and name[0] != "_"}
_INITIALISERS |= {Tensor.uniform_, Tensor.normal_}


@contextlib.contextmanager
def _weightless() -> Iterator[None]:
    """Modules built within own no memory."""
    with torch.device("meta"), _NothingDrawn():
        yield


class _Mixers(NamedTuple):
    """Cores with their dense connections, of a layer or of a whole model."""

    core: int
    """Parameters."""
    dense: int
    """Parameters."""
    linear: int
    """Weights of linear maps, as often as they are applied to a token."""
    recurrences: float
    """FLOPs per token."""


def _built(spec: ModelSpec) -> tuple[_Mixers, list[tuple[Block, int]]]:
    """The model's mixers, and its blocks without dense connections with the number of each, on the meta device; equal
    parts are one module."""
    kinds = spec.blocks or (BlockSpec.model_construct(core=spec.core, repeat=spec.depth),)
    parts = [(shared(b.core), shared(b.ffn or spec.ffn), shared(b.dense or spec.dense), b.repeat) for b in kinds]
    blocks = [(_block(core, ffn, spec), repeat) for core, ffn, _, repeat in parts]
    # A feed-forward layer changes nothing about the mixers.
    key = (spec.width, *((core.key, dense.key, repeat) for core, _, dense, repeat in parts))
    dense = [connection for *_, connection, repeat in parts for _ in range(repeat)]
    mixers: _Mixers = remembered(key, lambda: _counted(_connected(_repeated(blocks), dense, spec)))
    return mixers, blocks


def _repeated(blocks: Iterable[tuple[Block, int]]) -> list[Block]:
    return [block for block, repeat in blocks for _ in range(repeat)]


def _connected(blocks: Sequence[Block], dense: Sequence[Any], spec: ModelSpec) -> list[_Layer]:
    """Every layer with its dense connections; layers of one kind that read of the same kinds are one and the same."""
    sources = {block: _Layer(block) for block in dict.fromkeys(blocks)}
    layers: Any = [sources[block] for block in blocks]
    alike: dict[tuple[Any, ...], _Layer] = {}
    found = []
    with _weightless():
        for index, (block, connection) in enumerate(zip(blocks, dense, strict=True)):
            read = connection.pattern.layers(index, connection.span) if connection.span else ()
            kind = (block, connection, *(blocks[i] for i in read))
            if kind not in alike:
                alike[kind] = layers[index] = _Layer(block)
                connect(layers, index, connection, spec)
            found.append(alike[kind])
    return found


def _counted(layers: Sequence[_Layer]) -> _Mixers:
    one = {layer: _mixer(layer) for layer in dict.fromkeys(layers)}
    core, dense, linear, recurrences = zip(*(one[layer] for layer in layers), strict=True)
    return _Mixers(sum(core), sum(dense), sum(linear), sum(recurrences))


def _mixer(layer: Any) -> _Mixers:
    core = _tally(layer.core)
    connections = [(_tally(module), site in layer.reads) for site, module in layer.dense.items()]
    return _Mixers(
        core.parameters,
        sum(tally.parameters for tally, _ in connections),
        core.linear + sum(tally.linear for tally, reads in connections if reads),
        Block.mixing_flops(layer),
    )


class _Layer:
    """A block, as far as dense connections and counts need one; made of modules that it may share with others."""

    def __init__(self, block: Block) -> None:
        vars(self).update({name: copy.copy(value) for name, value in vars(block).items() if not name.startswith("_")})
        self.core = block.core
        self.dense: dict[str, nn.Module] = {}


def _block(core: Shared, ffn: Shared, spec: ModelSpec) -> Block:
    def build() -> Block:
        with _weightless():
            return Block(BlockSpec.model_construct(core=core, ffn=ffn), spec)  # type: ignore[arg-type]

    block: Block = remembered((core.key, ffn.key, spec.width), build)
    return block


class _Tally(NamedTuple):
    """Of one module and all below it."""

    parameters: int
    linear: int
    """Weights of linear maps, as often as they are applied to a token."""


@functools.lru_cache(KEPT)
def _tally(module: nn.Module | None) -> _Tally:
    if module is None:
        return _Tally(0, 0)
    maps = (below for below in module.modules() if isinstance(below, nn.Linear))
    linear = sum(below.weight.numel() * getattr(below, "applications", 1) for below in maps)
    return _Tally(sum(parameter.numel() for parameter in module.parameters()), linear)


@functools.lru_cache(KEPT)
def _state_of_core(core: Key, width: int) -> int:
    with _measuring():
        module = core.component().build(width)
        _, state = module(torch.zeros(1, 1, width))
    return _bytes(state)


@functools.lru_cache(KEPT)
def _state_of_model(model: str) -> int:
    with _measuring():
        return _bytes(ModelSpec.model_validate_json(model).build(1).run(torch.zeros(1, 1, dtype=torch.long)).state)


@contextlib.contextmanager
def _measuring() -> Iterator[None]:
    """For a pass over one token, on the CPU with weights that nobody wrote: they take next to no memory, and on the
    meta device torch would import its compiler for most of the arithmetic, which takes seconds."""
    library = registries.default()
    references = {name: "reference" for kernels in library.kernels for name in kernels.OPERATIONS}
    with _NothingDrawn(), torch.no_grad(), one_thread(), library.kernel_session(references):
        yield


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For work so small that threads would mostly wait for each other, for long where a machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _bytes(state: Any) -> int:
    tensors = (leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    return sum(leaf.numel() * leaf.element_size() for leaf in tensors)
